"""What each rank of test_command.py's mpirun runs: several evaluations in one start, since importing takes far longer.

judge_ranks.py FILE, where FILE holds turns, one after the other; a turn is [[ranks, [word, …]], …]: evaluations side by
side, each on so many ranks of its own.
"""

import json
import sys
from pathlib import Path

from launcher import comm


def main() -> int:
    from mpi4py import MPI

    from cogvlm_hpe import cli

    codes = []
    for turn in json.loads(Path(sys.argv[1]).read_text()):
        owners = [number for number, (ranks, _) in enumerate(turn) for _ in range(ranks)]
        rank = MPI.COMM_WORLD.Get_rank()
        mine = owners[rank] if rank < len(owners) else None
        part = MPI.COMM_WORLD.Split(MPI.UNDEFINED if mine is None else mine)
        if mine is not None:
            comm.mpi = lambda part=part: comm._Mpi(part)
            codes.append(cli.main(["evaluate", *turn[mine][1]]))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
