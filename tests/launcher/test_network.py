"""Who meets whom, and what is said of those who are slow."""

import pytest

from launcher import network
from launcher.comm import single
from launcher.errors import UserError
from launcher.network import Pair, neighbour
from launcher.world import discover


@pytest.mark.parametrize("places", [2, 3, 4, 7, 64])
def test_everybody_meets_a_neighbour_who_meets_him(places: int) -> None:
    met: set[frozenset[int]] = set()
    for turn in (0, 1):
        for place in range(places):
            other = neighbour(place, places, turn)
            if other is not None:
                assert other != place and neighbour(other, places, turn) == place
                met.add(frozenset((place, other)))
    assert set().union(*met) == set(range(places))
    links = {frozenset((place, (place + 1) % places)) for place in range(places)}
    assert met == (links if places % 2 == 0 else links - {frozenset((places - 1, 0))})


def test_a_slow_pair_is_named() -> None:
    pairs = [Pair("n1", "n2", 10e9), Pair("n2", "n3", 9e9), Pair("n3", "n4", 11e9)]
    assert "n2 and n3 at 9.00 GB/s each way" in network.judge_pairs(pairs)
    with pytest.raises(
        UserError, match=r"n5 and n6 at 0.10 GB/s each way, where half of all pairs reach 9.50; .*network"
    ):
        network.judge_pairs([*pairs, Pair("n5", "n6", 0.1e9)])


def test_one_host_has_no_neighbours() -> None:
    assert network.time_pairs(single(), discover({})) == []


def test_clocks() -> None:
    assert "0.50 s" in network.judge_clocks(0.5)
    with pytest.raises(UserError, match="set the hosts' clocks"):
        network.judge_clocks(5.0)
