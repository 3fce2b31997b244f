"""Reads four batches through one reader; requests to stop come before the second. `python deaf_readers.py new|old`.

new: fetching starts the fork server, and the requests go to all processes, as a launcher sends them.
old: the fork server is there already, started by others, who let requests through; they go to the reader.
"""

import multiprocessing
import os
import signal
import sys
import time
from types import FrameType

import torch

from shards.fetch import Fetched, Room, fetch_in_order
from shards.plan import Slot
from shards.stream import Item, gathered

REQUESTS = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)
HEARD: set[str] = set()


def fetch(n: int, room: Room) -> Fetched:
    """A batch of one image full of n."""
    image = torch.full((3, 4, 4), n, dtype=torch.uint8)
    return gathered([Item(Slot(0, n, 0, n), f"{n}", image, None)], room)


def asks_all(n: int, room: Room) -> Fetched:
    """The requests reach the whole run before the second batch."""
    if n == 1:
        for request in REQUESTS:
            os.killpg(0, request)
            time.sleep(0.2)
    return fetch(n, room)


def asks_itself(n: int, room: Room) -> Fetched:
    """The requests reach the reader before the second batch."""
    if n == 1:
        for request in REQUESTS:
            os.kill(os.getpid(), request)
    return fetch(n, room)


def heard(number: int, frame: FrameType | None) -> None:
    """What a rank does with a request: it goes on to its next step."""
    HEARD.add(signal.Signals(number).name)


def main(server: str) -> None:
    """Print the batches that came, and what the rank has heard."""
    for request in REQUESTS:
        signal.signal(request, heard)
    if server == "old":
        other = multiprocessing.get_context("forkserver").Process(target=os.getpid)
        other.start()
        other.join()
    found = fetch_in_order(asks_all if server == "new" else asks_itself, lambda: iter(range(4)), 1)
    came = [int(fetched.items[0].image[0, 0, 0]) for _, fetched in found if fetched.items[0].image is not None]
    print(came, *sorted(HEARD))


if __name__ == "__main__":
    main(sys.argv[1])
