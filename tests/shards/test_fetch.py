"""Batches through worker processes: what arrives is what was fetched, of any size, and stays so while it is held."""

import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launcher.errors import UserError
from shards import fetch as fetching
from shards.fetch import Fetched, Room, _Buffers, _Lent, _Ring, _Sent, fetch_in_order
from shards.plan import Slot
from shards.stream import Item, gathered


def image(n: int, k: int) -> torch.Tensor:
    """Of a size and content that depend on both."""
    side = 4 + (n * 7 + k * 3) % 23
    return torch.arange(3 * side * side, dtype=torch.int64).mul(n + 1).add(k).to(torch.uint8).reshape(3, side, side)


def items_of(n: int) -> list[Item]:
    """Batch n of n mod 5 images; every third place is a hole."""
    places = range(n % 5 + n // 20)
    return [Item(Slot(0, k, 0, k), f"{n}-{k}", None if k % 3 == 2 else image(n, k), None) for k in places]


def fetch(n: int, room: Room) -> Fetched:
    """Batch n in memory of `room`."""
    return gathered(items_of(n), room)


def check(n: int, items: list[Item]) -> None:
    assert [item.key for item in items] == [item.key for item in items_of(n)]
    for item, expected in zip(items, items_of(n), strict=True):
        if expected.image is None:
            assert item.image is None
        else:
            assert item.image is not None and torch.equal(item.image, expected.image)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_arrive_whole_and_are_not_written_over_while_they_are_held(workers: int) -> None:
    held: list[tuple[int, list[Item]]] = []
    for n, fetched in fetch_in_order(fetch, lambda: iter(range(60)), workers):
        check(n, fetched.items)
        held.append((n, fetched.items))
        if n % 11 == 0:
            time.sleep(0.05)  # readers get as far ahead as they may
    assert [n for n, _ in held] == list(range(60))
    for n, items in held:
        check(n, items)


def bytes_of(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def lend(ring: _Ring, values: list[int]) -> _Lent:
    """What a worker does: take room, fill it, lend it."""
    ring.take(len(values)).copy_(torch.tensor(values))
    return ring.lend()


def test_a_buffer_that_is_written_again_too_early_is_noticed() -> None:
    ring, buffers = _Ring(), _Buffers(bytes_of)
    lent = [lend(ring, [n] * 9) for n in range(3)]
    for n in range(3):
        assert buffers.copy(lent[n]).tolist() == [n] * 9
    first, *_ = [lend(ring, [n] * 9) for n in range(3, 7)]
    with pytest.raises(AssertionError, match="written batch 6 over batch 3"):
        buffers.copy(first)


def test_buffers_are_used_again_and_grow_when_they_must() -> None:
    ring, buffers = _Ring(), _Buffers(bytes_of)
    large, small = [1] * 50, [0] * 7
    fresh = []
    for values in (small, small, small, large, small, small, large, small):
        lent = lend(ring, values)
        fresh.append(lent.buffer is not None)
        assert buffers.copy(lent).tolist() == values
    assert fresh == [True, True, True, True, False, False, False, False]


def test_images_keep_how_they_lie_on_their_way() -> None:
    """Colours side by side on one end, so on the other; the batch as one tensor is the same memory, not a copy."""
    ring, buffers = _Ring(), _Buffers(bytes_of)
    row = ring.take(2 * 5 * 5 * 3)
    images = row.view(2, 5, 5, 3).permute(0, 3, 1, 2).copy_(torch.arange(150).view(2, 3, 5, 5))
    items = [Item(Slot(0, k, 0, k), f"{k}", images[k], None) for k in range(2)]
    sent = pickle.loads(pickle.dumps(_Sent.of(Fetched(items, images, row), ring)))
    assert all(item.image is None for item in sent.items)
    there = sent.fetched(buffers)
    assert there.images is not None and torch.equal(there.images, images) and there.images.stride() == images.stride()
    ring.take(150).zero_()
    assert [item.image.data_ptr() for item in there.items] == [image.data_ptr() for image in there.images]  # type: ignore[union-attr]


def test_errors_travel_as_values() -> None:
    with pytest.raises(UserError, match="shard 3 is gone"):
        _Sent([], error=UserError("shard 3 is gone")).fetched(_Buffers(bytes_of))


@pytest.mark.slow
def test_a_reader_that_dies_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match="a reader process died .*give it more memory or /dev/shm") as caught:
        for _ in fetch_in_order(dies, itertools.count, 1):
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("server", "rank_heard"), [("new", " SIGINT SIGTERM SIGUSR1"), ("old", "")])
def test_readers_do_not_hear_requests_to_stop(server: str, rank_heard: str) -> None:
    """Which a launcher sends to all processes of a run, while the rank wants its last batch."""
    script = [sys.executable, str(Path(__file__).parent / "deaf_readers.py"), server]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert (done.returncode, done.stdout) == (0, f"[0, 1, 2, 3]{rank_heard}\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("way", "code"), [("killed", -9), ("leaves", 1), ("ends", 0)])
def test_readers_and_their_fork_server_end_with_their_rank(way: str, code: int) -> None:
    """Killed, gone without a goodbye, or at its end while it holds the batches: nobody is left, and none hangs."""
    script = [sys.executable, str(Path(__file__).parent / "left_readers.py"), way]
    rank = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    left = {int(word) for word in rank.stdout.readline().split()}
    assert len(left) == 3, "two readers and the fork server"
    assert rank.wait(timeout=60) == code
    deadline_s = time.monotonic() + 20
    try:
        while any(is_running(pid) for pid in left):
            assert time.monotonic() < deadline_s, left
            time.sleep(0.1)
    finally:
        rank.stdout.close()
        for pid in filter(is_running, left):
            os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not only what nobody has reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Broken:
    """A loader whose process is dead, of which torch does not know yet."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Iterator[object]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (EOFError(), UserError),
        (ConnectionResetError(104, "Connection reset by peer"), UserError),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), UserError),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), RuntimeError),
        (ConnectionError("Caught ConnectionError in DataLoader worker process 0."), ConnectionError),
    ],
)
def test_a_death_is_told_from_an_error_in_a_reader(
    error: Exception, seen: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_loader", lambda *_: Broken(error))
    with pytest.raises(seen) as caught:
        list(fetch_in_order(dies, itertools.count, 1))
    assert (seen is UserError) == ("a reader process died" in str(caught.value))


def dies(n: int, room: Room) -> Fetched:
    """The third batch kills its process, as running out of memory does."""
    if n == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return fetch(n, room)


def test_no_workers_fetch_in_this_process() -> None:
    numbers: Iterator[int] = iter([3, 1, 2])
    assert [n for n, found in fetch_in_order(fetch, lambda: numbers, 0) if not check(n, found.items)] == [3, 1, 2]
