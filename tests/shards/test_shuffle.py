"""Orders that are computed: permutations for every size and key, blocks that keep shards together, quality."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import UsageError
from shards.shuffle import BlockShuffle, Shuffle, quality, shuffled, unshuffled

shard_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=20)
keys = st.tuples(st.integers(0, 2**40), st.integers(0, 9), st.integers(0, 50))


@given(st.integers(1, 3000), keys)
def test_the_way_back_undoes_a_shuffle(size: int, key: tuple[int, ...]) -> None:
    places = np.arange(size)
    there = shuffled(places, size, key)
    assert sorted(there.tolist()) == list(range(size))
    np.testing.assert_array_equal(unshuffled(there, size, key), places)
    np.testing.assert_array_equal(shuffled(unshuffled(places, size, key), size, key), places)


@given(shard_sizes, st.integers(1, 25), keys)
@settings(max_examples=60)
def test_a_block_shuffle_is_a_permutation_with_its_inverse(sizes: list[int], block: int, key: tuple[int, ...]) -> None:
    order = BlockShuffle(sizes, block)
    places = np.arange(sum(sizes))
    samples = order.samples(places, key)
    assert sorted(samples.tolist()) == list(range(sum(sizes)))
    np.testing.assert_array_equal(order.places(samples, key), places)
    some = places[::-3]
    np.testing.assert_array_equal(order.samples(some, key), samples[some])


@given(shard_sizes, st.integers(1, 5), keys)
@settings(max_examples=60)
def test_a_block_holds_its_shards_whole_and_no_other(sizes: list[int], block: int, key: tuple[int, ...]) -> None:
    order = BlockShuffle(sizes, block).samples(np.arange(sum(sizes)), key)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[order]
    seen: set[int] = set()
    place = 0
    for _ in range(-(-len(sizes) // block)):
        here = [shard_of[place]]
        while place < len(order) and (shard_of[place] in here or len(here) < block):
            if shard_of[place] not in here:
                here.append(shard_of[place])
            place += 1
        assert not seen & set(here)
        assert sum(sizes[shard] for shard in here) == np.isin(shard_of, here).sum()
        seen |= set(here)
        if place == len(order):
            break
    assert seen == set(range(len(sizes)))


def test_the_order_is_fixed_for_ever() -> None:
    """A changed order breaks every run that resumes: never change these numbers."""
    assert shuffled(np.arange(10), 10, (1, 2, 3)).tolist() == [2, 5, 0, 6, 4, 3, 9, 8, 1, 7]
    blocks = BlockShuffle([3, 4, 2, 3], 2).samples(np.arange(12), (1, 2, 3)).tolist()
    assert blocks == [1, 0, 8, 2, 7, 10, 5, 11, 9, 3, 4, 6]


def test_epochs_differ_and_a_shuffle_travels_to_other_processes() -> None:
    order = BlockShuffle([30] * 20, 4)
    places = np.arange(600)
    first, second = (order.samples(places, (1, 0, epoch)) for epoch in (0, 1))
    assert (first == second).mean() < 0.05
    again = pickle.loads(pickle.dumps(order))
    np.testing.assert_array_equal(again.samples(places, (1, 0, 1)), second)


def test_quality_of_a_full_shuffle_is_what_is_expected_and_of_blocks_what_blocks_can_give() -> None:
    full = quality(Shuffle(20_000), (1, 0, 0))
    assert full.stored == pytest.approx(full.expected, rel=0.03) and full.streamed == pytest.approx(
        full.expected, rel=0.03
    )
    blocks = quality(BlockShuffle([100] * 200, 20), (1, 0, 0))
    # Two samples of a block of n shards come from one shard once in n times; side by side means in one block of 2,000.
    assert blocks.stored == pytest.approx(blocks.expected * 19 / 20, rel=0.08)
    assert 0.09 < blocks.streamed / blocks.expected < 0.13
    in_order = quality(BlockShuffle([1] * 2, 1), (1, 0, 0))
    assert in_order.stored == 1.0
    assert "% of the 6,667 of a full shuffle)" in str(blocks)


def test_quality_of_tiny_and_of_very_large_sets() -> None:
    assert quality(Shuffle(1), (0,)).expected == 1.0
    large = quality(Shuffle(10**9), (3,))
    assert large.streamed == pytest.approx(large.expected, rel=0.03)


def test_blocks_without_shards_are_refused() -> None:
    with pytest.raises(UsageError, match="block_shards 0"):
        BlockShuffle([3, 4], 0)
