"""The order of keys is one, whatever reads it: ranks 1 to 4, readers 0 to 2, stopped anywhere, resumed on any other."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from shards.index import ShardSet, open_set
from shards.plan import Plan
from shards.stream import Stream

ROOT = Path(__file__).parents[2]
RANKS, WORKERS, STARTS, BATCH = (1, 2, 3, 4), (0, 1, 2), (0, 1, 4), 12
VARIANTS = {
    "one set": ([1.0, 0.0], 0, 0),
    "mix": ([0.75, 0.25], 0, 0),
    "mix in blocks": ([3.0, 1.0], 2, 0),
    "mix in blocks and buckets": ([0.9, 0.1], 2, 3),
}
# Every pair of (ranks, variant, workers, start) comes at least once.
COVER = [
    (RANKS[a], list(VARIANTS)[b], WORKERS[(a + b) % 3], STARTS[(a + 2 * b) % 3])
    for a, b in itertools.product(range(4), range(4))
]


@pytest.fixture
def sets(tiny_set: Callable[..., Path]) -> list[ShardSet]:
    return [open_set(tiny_set(samples=31)), open_set(tiny_set(samples=7, split="more", samples_per_shard=2))]


def plan_of(sets: list[ShardSet], variant: str) -> tuple[list[ShardSet], Plan]:
    ratios, block_shards, bucket_batches = VARIANTS[variant]
    used = [s for s, ratio in zip(sets, ratios, strict=True) if ratio]
    ratios = [ratio for ratio in ratios if ratio]
    return used, Plan.of(used, ratios, 7, BATCH, block_shards=block_shards, bucket_batches=bucket_batches)


def keys_of_plan(sets: list[ShardSet], plan: Plan, n: int) -> list[str]:
    return [sets[slot.set].key(slot.sample) for slot in plan.batch_at(n)]


def test_the_cover_has_every_pair() -> None:
    factors: list[list[object]] = [list(RANKS), list(VARIANTS), list(WORKERS), list(STARTS)]
    for i, j in itertools.combinations(range(4), 2):
        assert {(row[i], row[j]) for row in COVER} == set(itertools.product(factors[i], factors[j]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_ranks_and_readers_and_stops_by_the_plan(sets: list[ShardSet], variant: str) -> None:
    """The whole matrix in one process: ranks and readers before a stop at any step, and after it."""
    used, plan = plan_of(sets, variant)
    steps = 9
    whole = [plan.batch_at(n) for n in range(steps)]

    def delivered(ranks: int, workers: int, start: int, stop: int) -> list[list[object]]:
        # Each rank's readers take its batches in turn, and hand them over in that order.
        fresh = plan_of(sets, variant)[1]
        hands = [
            {n: fresh.share_at(n, rank, ranks) for n in range(start, stop) if (n - start) % max(1, workers) == k}
            for rank in range(ranks)
            for k in range(max(1, workers))
        ]
        return [[slot for hand in hands if n in hand for slot in hand[n]] for n in range(start, stop)]

    layouts = list(itertools.product(RANKS, WORKERS))
    # Where every layout delivers the whole from any step on, one may go on where any other stopped.
    for layout, start in itertools.product(layouts, range(steps)):
        assert delivered(*layout, start, steps) == whole[start:]
    assert [slot.set for slot in whole[0]].count(0) >= BATCH * 0.7


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "variant", "workers", "start"), COVER)
def test_real_readers_deliver_what_the_plan_says(
    sets: list[ShardSet], ranks: int, variant: str, workers: int, start: int
) -> None:
    used, plan = plan_of(sets, variant)
    streams = [Stream(used, plan, rank, ranks, 16, start, workers) for rank in range(ranks)]
    for n, parts in zip(range(start, start + 4), islice(zip(*streams, strict=True), 4), strict=True):
        assert {m for m, _ in parts} == {n}
        assert [item.key for _, items in parts for item in items] == keys_of_plan(used, plan, n)


@pytest.mark.slow
def test_real_ranks_with_real_readers_deliver_what_the_plan_says(sets: list[ShardSet]) -> None:
    used, plan = plan_of(sets, "mix in blocks and buckets")
    mpirun = [str(Path(sys.executable).with_name("mpirun")), "-np", "3", sys.executable]
    mix = ",".join(f"{s.path}:{ratio}" for s, ratio in zip(used, plan.ratios, strict=True))
    arguments = [str(Path(__file__).with_name("order_ranks.py")), mix, "7", "12", "2", "3", "2", "1", "4"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PMI_", "SLURM_", "OMPI_"))}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*mpirun, *arguments], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines == [[str(n), *keys_of_plan(used, plan, n)] for n in range(1, 5)]
