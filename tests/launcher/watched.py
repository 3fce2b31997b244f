"""What each rank of test_watchdog.py does: one of two goes silent while the other one waits for it."""

import os
import signal
import sys
import time
from pathlib import Path

from launcher import world
from launcher.comm import from_torch
from launcher.watchdog import Watchdog


def fall_asleep() -> None:
    time.sleep(600)


def main() -> None:
    folder, silent, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    comm = from_torch(world.discover(), timeout_s=120)
    with Watchdog(comm, 2.0, folder, aside_s=3.0) as watchdog:
        for _ in range(3):
            comm.barrier()
            watchdog.beat()
        if comm.rank == silent and how == "asleep":
            fall_asleep()
        elif comm.rank == silent:
            os.kill(os.getpid(), signal.SIGSTOP)
        comm.barrier()


main()
