"""Packing branches into rows, and what plain rows see."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from cogvlm_hpe.model.attention import flex_kernel, packed_kernel
from cogvlm_hpe.model.layout import branch_seen, lay_out_rows, pack_branches

BRANCHES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=9)


def pack(branches: list[tuple[int, int]]):
    lengths = torch.tensor([length for _, length in branches])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return mask, pack_branches(torch.tensor([image for image, _ in branches]), mask, 4)


@given(BRANCHES)
def test_every_token_has_its_own_slot_in_its_images_row(branches: list[tuple[int, int]]) -> None:
    mask, layout = pack(branches)
    slots = layout.slot_of_token[mask]
    assert len(set(slots.tolist())) == int(mask.sum())
    assert torch.equal(layout.token_of_slot.flatten()[slots], mask.flatten().nonzero()[:, 0])
    for number, (image, length) in enumerate(branches):
        own = layout.slot_of_token[number, :length]
        assert torch.equal(own // layout.slots, torch.full((length,), image))
        assert own.tolist() == list(range(int(own[0]), int(own[0]) + length))
        assert torch.equal(layout.position.flatten()[own], 4 + torch.arange(length))
        assert int(layout.last_slot[number]) == int(own[-1])


@given(BRANCHES)
def test_a_token_sees_the_prefix_and_its_own_branch_so_far(branches: list[tuple[int, int]]) -> None:
    mask, layout = pack(branches)
    seen = branch_seen(layout.branch_of_slot, n_prefix=3)[:, 0]
    for number, (image, length) in enumerate(branches):
        first = int(layout.slot_of_token[number, 0]) % layout.slots
        for step in range(length):
            expected = [0, 1, 2, *range(3 + first, 3 + first + step + 1)]
            assert seen[image, first + step].nonzero()[:, 0].tolist() == expected


def test_flex_attention_sees_what_the_bias_says() -> None:
    _, layout = pack([(0, 3), (1, 5), (0, 2), (3, 1)])
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 2, layout.slots, 16, generator=generator)
    k, v = (torch.randn(4, 2, 7 + layout.slots, 16, generator=generator) for _ in "kv")
    expected = packed_kernel(layout.branch_of_slot, 7, q.dtype)(q, k, v)
    torch.testing.assert_close(flex_kernel(layout.branch_of_slot, 7, flex_attention)(q, k, v), expected)


def test_plain_rows_build_a_mask_only_where_causal_does_not_say_it() -> None:
    types = torch.zeros(2, 4, dtype=torch.long)
    right = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert lay_out_rows(types, torch.ones_like(types), 4).seen is None
    assert lay_out_rows(types, right, 4).seen is None
    assert lay_out_rows(types, right.flip(1), 4).seen is not None
    assert lay_out_rows(types, right, 1).seen is not None


@pytest.mark.parametrize("mask", [[[0, 1]], [[0, 0]]])
def test_a_branch_without_tokens_or_padded_left_is_refused(mask: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="padding stands on the right only"):
        pack_branches(torch.tensor([0]), torch.tensor(mask), 1)
