"""Saved at one ZeRO stage and number of ranks, gone on with at another: the next losses are the undisturbed run's."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pytest

from launcher.world import free_port

PROGRAM = Path(__file__).with_name("elastic_ranks.py")
ROOT = Path(__file__).parents[3]
STAGES, RANKS = (0, 1, 2, 3), (1, 2)
Way = tuple[int, int, int, int]  # stage and ranks of the writer, stage and ranks of the reader


def pairwise() -> list[Way]:
    """A greedy cover: every pair of values of every two of the four choices is in one of these ways."""
    ways = list(product(STAGES, RANKS, STAGES, RANKS))

    def pairs(way: Way) -> set[tuple[int, int, int, int]]:
        return {(i, way[i], j, way[j]) for i in range(4) for j in range(i)}

    chosen, left = [], set().union(*map(pairs, ways))
    while left:
        best = max(ways, key=lambda way: len(pairs(way) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def launch(ranks: int, words: Iterable[str]) -> None:
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env = os.environ | place | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    started = [
        subprocess.Popen([sys.executable, str(PROGRAM), *words], env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    assert [process.wait(timeout=540) for process in started] == [0] * ranks


@pytest.mark.slow
def test_any_stage_and_ranks_go_on_from_any_other(tmp_path: Path) -> None:
    ways = pairwise()
    assert len(ways) < 20
    whole = {}
    for ranks in RANKS:
        launch(ranks, ["write", str(tmp_path), *map(str, STAGES)])
        losses = json.loads((tmp_path / f"write-{ranks}.json").read_text())
        whole |= {(int(stage), ranks): values for stage, values in losses.items()}
    for values in whole.values():
        assert values == pytest.approx(whole[0, 1], rel=1e-5), "stages and ranks give the same curve"
    for ranks in RANKS:
        jobs = sorted(f"{stage}:{a}-{b}" for a, b, stage, to in ways if to == ranks)
        launch(ranks, ["read", str(tmp_path), *jobs])
        for job, values in json.loads((tmp_path / f"read-{ranks}.json").read_text()).items():
            assert values == pytest.approx(whole[0, 1][2:], rel=1e-5), f"{job} on {ranks} ranks"
