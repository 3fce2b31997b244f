"""TCP ports that the tests' ranks and daemons meet at.

A port that the system hands out may go to somebody else before the ranks have come to bind it; so these are from below
the range that it hands out, and each xdist worker has a band of its own.
"""

import os
import random

from launcher.world import free_port

_FIRST, _BAND, _WORKERS = 10_000, 500, 16  # below 20000, where the ports of Slurm's jobs begin


class _Ports:
    """The band of this process; two runs of the tests side by side begin anywhere in it."""

    def __init__(self, worker: str) -> None:
        number = int(worker.removeprefix("gw")) + 1 if worker else 0
        self.first = _FIRST + number % _WORKERS * _BAND
        self.given = random.SystemRandom().randrange(_BAND)

    def next(self) -> int:
        """One that is free now; the next call gives a later one, until the band begins anew."""
        port = free_port(self.first + self.given % _BAND)
        self.given = port - self.first + 1
        return port


next_port = _Ports(os.environ.get("PYTEST_XDIST_WORKER", "")).next
