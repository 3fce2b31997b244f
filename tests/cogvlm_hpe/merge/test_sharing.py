"""Every layer is one rank's, and no rank has much more to do than another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvlm_hpe.merge.sharing import share_of
from launcher.comm import Comm


def ranks(size: int) -> list[Comm]:
    out = [Comm() for _ in range(size)]
    for number, comm in enumerate(out):
        comm.rank, comm.size = number, size
    return out


@given(st.dictionaries(st.text("ab.0123", min_size=1), st.integers(1, 50)), st.integers(1, 7))
def test_each_layer_is_one_ranks(sizes: dict[str, int], count: int) -> None:
    shares = [share_of(sizes, comm) for comm in ranks(count)]
    assert sorted(layer for share in shares for layer in share) == sorted(sizes)
    assert all(share == sorted(share) for share in shares)
    loads = [sum(sizes[layer] for layer in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


@pytest.mark.parametrize("count", [2, 64])
def test_projections_of_differing_width_are_mixed(count: int) -> None:
    """Both kinds take turns in name order: dealt out one by one, one rank would have three times as much."""
    sizes = {f"layers.{n:04d}.{kind}": size for n in range(count) for kind, size in (("dense", 1), ("qkv", 3))}
    loads = [sum(sizes[layer] for layer in share_of(sizes, comm)) for comm in ranks(count)]
    assert set(loads) == {4}
