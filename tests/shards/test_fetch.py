"""Batches through worker processes: what arrives is what was fetched, of any size, and stays so while it is held."""

import itertools
import time
from collections.abc import Iterator

import pytest
import torch

from launcher.errors import UserError
from shards.fetch import _Buffers, _Ring, _Sent, fetch_in_order
from shards.plan import Slot
from shards.stream import Item


def image(n: int, k: int) -> torch.Tensor:
    """Of a size and content that depend on both."""
    side = 4 + (n * 7 + k * 3) % 23
    return torch.arange(3 * side * side, dtype=torch.int64).mul(n + 1).add(k).to(torch.uint8).reshape(3, side, side)


def fetch(n: int) -> list[Item]:
    """Batch n of n mod 5 images; every third place is a hole."""
    places = range(n % 5 + n // 20)
    return [Item(Slot(0, k, 0, k), f"{n}-{k}", None if k % 3 == 2 else image(n, k), None) for k in places]


def check(n: int, items: list[Item]) -> None:
    assert [item.key for item in items] == [item.key for item in fetch(n)]
    for item, expected in zip(items, fetch(n), strict=True):
        if expected.image is None:
            assert item.image is None
        else:
            assert item.image is not None and torch.equal(item.image, expected.image)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_arrive_whole_and_are_not_written_over_while_they_are_held(workers: int) -> None:
    held: list[tuple[int, list[Item]]] = []
    for n, items in fetch_in_order(fetch, lambda: iter(range(60)), workers):
        check(n, items)
        held.append((n, items))
        if n % 11 == 0:
            time.sleep(0.05)  # readers get as far ahead as they may
    assert [n for n, _ in held] == list(range(60))
    for n, items in held:
        check(n, items)


def test_a_buffer_that_is_written_again_too_early_is_noticed() -> None:
    ring, buffers = _Ring(), _Buffers()
    lent = [ring.write([image(n, 0)]) for n in range(3)]
    for n in range(3):
        assert torch.equal(buffers.copy(lent[n], pin=False), image(n, 0).reshape(-1))
    first, *_ = [ring.write([image(n, 0)]) for n in range(3, 7)]
    with pytest.raises(AssertionError, match="written batch 6 over batch 3"):
        buffers.copy(first, pin=False)


def test_buffers_are_used_again_and_grow_when_they_must() -> None:
    ring, buffers = _Ring(), _Buffers()
    large, small = [torch.ones(50, dtype=torch.uint8)], [torch.zeros(7, dtype=torch.uint8)]
    fresh = []
    for images in (small, small, small, large, small, small, large, small):
        lent = ring.write(images)
        fresh.append(lent.buffer is not None)
        assert torch.equal(buffers.copy(lent, pin=False), images[0])
    assert fresh == [True, True, True, True, False, False, False, False]


def test_errors_travel_as_values() -> None:
    with pytest.raises(UserError, match="shard 3 is gone"):
        _Sent([], UserError("shard 3 is gone")).items()


@pytest.mark.slow
def test_a_reader_that_dies_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match="a reader process died .*give it more memory or /dev/shm") as caught:
        for _ in fetch_in_order(dies, itertools.count, 1):
            pass
    assert "\n" not in str(caught.value)


def dies(n: int) -> list[Item]:
    """The third batch kills its process, as running out of memory does."""
    import os
    import signal

    if n == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return fetch(n)


def test_no_workers_fetch_in_this_process() -> None:
    numbers: Iterator[int] = iter([3, 1, 2])
    assert [n for n, items in fetch_in_order(fetch, lambda: numbers, 0) if not check(n, items)] == [3, 1, 2]
