"""Prints the ids of two readers and of their fork server, and goes before they do. `python left_readers.py WAY`."""

import itertools
import os
import signal
import sys

from shards.fetch import Fetched, Room, fetch_in_order
from shards.plan import Slot
from shards.stream import Item


def fetch(_: int, room: Room) -> Fetched:
    """Nothing but who has fetched it."""
    return Fetched([Item(Slot(0, 0, 0, 0), f"{os.getpid()} {os.getppid()}", None, None)])


def main(way: str) -> None:
    """killed: by SIGKILL; leaves: without any clean-up; ends: as a program does, the batches still under way."""
    keys = [fetched.items[0].key for _, fetched in itertools.islice(FOUND, 4)]
    print(*{pid for key in keys for pid in key.split()}, flush=True)
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "leaves":
        os._exit(1)


if __name__ == "__main__":
    FOUND = fetch_in_order(fetch, itertools.count, 2)
    main(sys.argv[1])
