"""Work on tensors side by side: as many threads as torch has, each of which computes alone.

One thread of torch inside each: less waiting than with all threads in every small operation, and the same bits for
any number of them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

J = TypeVar("J")
R = TypeVar("R")


def in_order(work: Callable[[J], R], jobs: Iterable[J]) -> Iterator[R]:
    """Results of `work` in the order of their jobs, with at most 2 × threads + 1 of them begun and not yet taken."""
    waiting: deque[Future[R]] = deque()
    with _workers() as (pool, count):
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _workers() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    count = torch.get_num_threads()
    # BLAS inside the pool's threads must not open threads of its own: slower, and another order of sums.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool, count
    finally:
        torch.set_num_threads(count)
