"""What each rank of tests/shards/test_write.py runs: builds a tiny set over the ranks of mpirun."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_source import TinySource

from launcher.comm import mpi
from launcher.errors import run_main
from shards.write import build


def main() -> None:
    out, samples = sys.argv[1:]
    build(TinySource(samples=int(samples)), Path(out), mpi(), samples_per_shard=10)


if __name__ == "__main__":
    sys.exit(run_main("build", main))
