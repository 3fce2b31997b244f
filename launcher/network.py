"""How fast hosts reach each other, each with its neighbours, and whether their clocks agree."""

import socket
import statistics
import time
from dataclasses import dataclass

from launcher.comm import Comm
from launcher.errors import UserError
from launcher.world import World

PROBE_BYTES = 64 * 2**20
_SKEW_S = 2.0  # beyond it, ages of files and times in logs of several hosts mean little
_SLOW = 4.0  # a pair so many times slower than the middle one has something wrong with it


@dataclass(frozen=True)
class Pair:
    """Two hosts that have swapped PROBE_BYTES; bytes_per_s each way."""

    first: str
    second: str
    bytes_per_s: float


def neighbour(place: int, places: int, turn: int) -> int | None:
    """Whom the host at `place` of a ring meets at `turn` 0 or 1; over both, everybody has met somebody."""
    if places == 2 and turn:
        return None  # these two have met
    other = place + 1 if place % 2 == turn else place - 1
    if places % 2 == 0:
        return other % places
    return other if 0 <= other < places else None


def time_pairs(comm: Comm, world: World) -> list[Pair]:
    """All ranks. What neighbouring hosts reach, one rank of each, all pairs at a time; on rank 0, elsewhere empty."""
    gathered = comm.broadcast(comm.gather((world.local_rank, socket.gethostname()))) or []
    heads = [(rank, host) for rank, (local_rank, host) in enumerate(gathered) if local_rank == 0]
    place = next((i for i, (rank, _) in enumerate(heads) if rank == comm.rank), None)
    found = []
    for turn in (0, 1) if len(heads) > 1 else ():
        met = None if place is None else neighbour(place, len(heads), turn)
        taken_s = comm.time_exchange(None if met is None else heads[met][0], PROBE_BYTES)
        if place is not None and met is not None and place < met:
            found.append(Pair(heads[place][1], heads[met][1], PROBE_BYTES / taken_s))
    return [pair for of_rank in comm.gather(found) or [] for pair in of_rank]


def judge_pairs(pairs: list[Pair]) -> str:
    """The slowest pair in words. Raises UserError where it is far slower than the others."""
    slowest = min(pairs, key=lambda pair: pair.bytes_per_s)
    middle = statistics.median(pair.bytes_per_s for pair in pairs)
    said = f"{slowest.first} and {slowest.second} at {slowest.bytes_per_s / 1e9:.2f} GB/s each way"
    if slowest.bytes_per_s * _SLOW < middle:
        raise UserError(
            f"{said}, where half of all pairs reach {middle / 1e9:.2f}; look at the network of these two hosts, or "
            "leave them out (sbatch --exclude)"
        )
    return f"{PROBE_BYTES >> 20} MiB between neighbours, the slowest {said}"


def clock_skew_s(comm: Comm) -> float:
    """All ranks. How far their clocks are apart."""
    comm.barrier()
    now_s = time.time()
    return comm.max(now_s) + comm.max(-now_s)


def judge_clocks(skew_s: float) -> str:
    """Whether hosts agree on the time. Raises UserError where they do not."""
    if skew_s > _SKEW_S:
        raise UserError(f"{skew_s:.1f} s apart; set the hosts' clocks (chronyd, ntpd)")
    return f"at most {skew_s:.2f} s apart"
