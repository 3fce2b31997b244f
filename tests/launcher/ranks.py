"""What each rank of tests/launcher/test_comm.py runs: every collective once, results to a JSON file per rank."""

import atexit
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from launcher import comm, errors, world
from launcher.comm import Comm
from launcher.errors import UserError


class Lasting:
    """Says on stderr when the interpreter takes it apart."""

    def __del__(self, say: Callable[[int, bytes], int] = os.write) -> None:
        say(2, b"taken apart\n")


LASTING = Lasting()


def exercise(ranks: Comm) -> dict[str, object]:
    total = ranks.sum(np.array([[ranks.rank, 1.5]]))
    own = np.array([ranks.rank, 2])
    begun = [ranks.begin_sum(own), ranks.begin_sum(own * 10)]
    return {
        "size": ranks.size,
        "sum_int": ranks.sum(2**53 + ranks.rank),
        "sum_float": ranks.sum(0.5),
        "sum_array": [total.tolist(), str(total.dtype)],
        "max": ranks.max(ranks.rank * 1.5),
        "gather": ranks.gather({"rank": ranks.rank}),
        "broadcast": ranks.broadcast(f"from {ranks.rank}", root=1),
        "agree": [ranks.agree(ranks.rank == 1), ranks.agree(False)],
        "barrier": ranks.barrier(),
        "begun_sums": [pending.wait().tolist() for pending in begun],
        "ready": [pending.ready() for pending in begun],
        "own": own.tolist(),
    }


def main() -> int:
    way, out = sys.argv[1:3]
    ranks = comm.mpi() if way.startswith("mpi") else comm.from_torch(world.discover(), timeout_s=60)
    if way.endswith("one-fails") and ranks.rank == 1:
        raise UserError("one rank: fails; the other must not wait for it")
    if way.endswith("all-fail"):
        raise UserError("all ranks: fail alike; said once")
    if way.endswith("one-crashes") and ranks.rank == 1:
        raise ZeroDivisionError("a defect")
    Path(out, f"{ranks.rank}.json").write_text(json.dumps(exercise(ranks)))
    return 0


if __name__ == "__main__":
    atexit.register(print, "at exit", file=sys.stderr)
    code = errors.run_main("ranks", main)
    errors.end(code)
