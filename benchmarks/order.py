"""One order of keys, whatever reads it: real ranks (mpirun) with real readers over the whole matrix.

For ranks 1, 2, 3, 4 x readers 0, 1, 2 and each kind of plan, a job is started at step 0 and at a step in the middle;
its global batches must be those of the plan, so any start may go on where any other stopped: that is checked for all
pairs of them, at every step. Prints a line a kind; exits with 1 where an order differs.

python benchmarks/order.py [--steps 8] [--kinds mix,blocks] [--ranks 1,2,3,4] [--workers 0,1,2]
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

BATCH, SEED = 12, 11
KINDS = {"one": ([1.0], 0, 0), "mix": ([0.9, 0.1], 0, 0), "blocks": ([3.0, 1.0], 2, 0), "buckets": ([0.75, 0.25], 2, 3)}
Found = dict[tuple[str, tuple[int, int], int], list[list[str]]]
"""Batches of keys by kind, (ranks, readers) and start."""


def make_sets(folder: Path) -> list[Path]:
    """Two small sets of the synthetic source."""
    from launcher.comm import single
    from shards.sources.synthetic.source import SyntheticSource
    from shards.write import build

    sets = []
    for domain, scenes in (("A", 61), ("B", 13)):
        build(SyntheticSource(domain, scenes, image_size=48), folder / domain, single(), samples_per_shard=7)
        sets.append(folder / domain)
    return sets


def be_a_rank(arguments: list[str]) -> None:
    """Under mpirun: read this rank's share for every kind, readers and start; rank 0 prints the keys of all ranks."""
    from launcher.comm import mpi
    from shards.stream import Stream

    kinds, readers, starts, steps, *paths = arguments
    comm = mpi()
    for kind, workers, start in itertools.product(kinds.split(","), _numbers(readers), _numbers(starts)):
        sets, plan = plan_of(kind, [Path(path) for path in paths])
        stream = Stream(sets, plan, comm.rank, comm.size, 16, start, workers)
        for n, items in islice(stream, int(steps) - start):
            shares = comm.gather([item.key for item in items])
            if shares is not None:
                print(kind, workers, start, n, *(key for share in shares for key in share), flush=True)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def plan_of(kind: str, paths: list[Path]):  # type: ignore[no-untyped-def]
    """The sets and the plan of a kind."""
    from shards.index import open_set
    from shards.plan import Plan

    ratios, block_shards, bucket_batches = KINDS[kind]
    sets = [open_set(path) for path in paths[: len(ratios)]]
    return sets, Plan.of(sets, ratios, SEED, BATCH, block_shards=block_shards, bucket_batches=bucket_batches)


def read(ranks: int, options: argparse.Namespace, starts: list[int], paths: list[Path]) -> Found:
    """What so many real ranks deliver: global batches from each start, for each kind and number of readers."""
    mpirun = [str(Path(sys.executable).with_name("mpirun")), "-np", str(ranks)]
    lists = [",".join(map(str, values)) for values in (options.kinds, options.workers, starts)]
    words = [*lists, str(options.steps), *map(str, paths)]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PMI_", "SLURM_", "OMPI_"))}
    done = subprocess.run(
        [*mpirun, sys.executable, __file__, "--rank", *words], env=env, capture_output=True, text=True, timeout=3000
    )
    if done.returncode:
        raise SystemExit(f"{ranks} ranks: {done.stderr.strip()[-500:]}")
    found: Found = {}
    for line in done.stdout.splitlines():
        kind, workers, start, _, *keys = line.split()
        found.setdefault((kind, (ranks, int(workers)), int(start)), []).append(keys)
    return found


def check_kind(kind: str, found: Found, layouts: list[tuple[int, int]], starts: list[int], paths: list[Path]) -> int:
    """How many joins of a stop and a start, of any two layouts, differ from the plan."""
    sets, plan = plan_of(kind, paths)
    steps = len(found[kind, layouts[0], 0])
    whole = [[sets[slot.set].key(slot.sample) for slot in plan.batch_at(n)] for n in range(steps)]
    joins = wrong = 0
    for before, after, stop in itertools.product(layouts, layouts, starts):
        joins += 1
        wrong += found[kind, before, 0][:stop] + found[kind, after, stop] != whole
    jobs = len(layouts) * len(starts)
    print(
        f"{kind}: {jobs} streams of real ranks and readers, {joins} joins of a stop and a start: {joins - wrong} equal "
        f"to the plan, {wrong} different"
    )
    return wrong


def main() -> int:
    if "--rank" in sys.argv:
        be_a_rank(sys.argv[sys.argv.index("--rank") + 1 :])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--ranks", type=_numbers, default=[1, 2, 3, 4])
    parser.add_argument("--workers", type=_numbers, default=[0, 1, 2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        paths = make_sets(Path(temporary))
        starts = [0, options.steps // 3, options.steps // 2 + 1]
        found: Found = {}
        for ranks in options.ranks:
            begun = time.monotonic()
            found |= read(ranks, options, starts, paths)
            print(f"{ranks} ranks: read in {time.monotonic() - begun:.0f} s", file=sys.stderr)
        layouts = list(itertools.product(options.ranks, options.workers))
        return int(any([check_kind(kind, found, layouts, starts, paths) for kind in options.kinds]))


if __name__ == "__main__":
    sys.exit(main())
