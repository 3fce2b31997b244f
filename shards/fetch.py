"""Batches fetched ahead in worker processes and handed over in order, as uint8 through shared memory.

The processes come from a fork server that has torch loaded: forking the training process itself would copy its threads'
locks (CUDA, NCCL, OpenMP) in whatever state they are, and a fresh interpreter for each worker costs seconds and an
import of torch each. A worker decodes its batches into a few buffers in turn, which stay mapped on both sides: fresh
shared pages would cost a third of what decoding does. It holds _PREFETCH + 1 batches in memory, never more.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from launcher.errors import UserError

if TYPE_CHECKING:
    import torch

    from shards.stream import Item

T = TypeVar("T")
Room = Callable[[int], "torch.Tensor"]
"""Gives so many bytes, a row of uint8, for all images of one batch; asked once a batch."""
Fetch = Callable[[int, Room], "Fetched"]
_PREFETCH = 2
_TURN_BYTES = 8
_REQUESTS = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)
_LOOK_S = 1.0


@dataclass(frozen=True)
class Fetched:
    """A batch whose images all lie in `row`, memory that its fetcher was given."""

    items: "list[Item]"
    images: "torch.Tensor | None" = None
    """(B, 3, S, S) uint8: the items' images as one tensor, black where there is none; None where sizes may differ."""
    row: "torch.Tensor | None" = None


def fetch_in_order(
    fetch: Fetch, numbers: Callable[[], Iterable[int]], workers: int, pin: bool = False
) -> Iterator[tuple[int, Fetched]]:
    """Yield (n, fetch(n, …)) for each of numbers(), in their order; with workers > 0 fetched ahead in processes.

    pin: images lie in page-locked memory where there is CUDA, so that copies to the device need not wait.
    """
    room = _room(pin and _has_cuda())
    if workers == 0:
        for n in numbers():
            yield n, fetch(n, room)
        return
    loader, buffers = _loader(_Fetching(fetch), numbers, workers), _Buffers(room)
    try:
        with _signals_held():
            batches = iter(loader)
        for n, sent in zip(numbers(), batches, strict=True):
            yield n, sent.fetched(buffers)
    except (RuntimeError, EOFError, ConnectionError) as error:
        if not _tells_of_a_death(error):
            raise
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"a reader process died ({first_line}); give it more memory or /dev/shm, or fewer workers"
        ) from None


@contextmanager
def _signals_held() -> Iterator[None]:
    """Requests to stop wait; a fork server started meanwhile never hears any, nor do the readers it forks."""
    from multiprocessing import resource_tracker

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        resource_tracker.ensure_running()  # which lets some through again, so that these are held after it
        signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_reader(_: int) -> None:
    """A reader hears no request, as its rank still needs what it reads, and ends with its rank.

    A fork server from before `_signals_held` lets requests come.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)
    threading.Thread(target=_end_with_rank, name="rank", daemon=True).start()


def _end_with_rank() -> None:
    """End this reader once its rank is gone, however it died, or sends SIGTERM, as multiprocessing does at its exit.

    Torch looks for the parent, which is the fork server; and that one lives as long as its readers.
    """
    from multiprocessing import parent_process

    rank = parent_process()
    assert rank is not None, "a reader is a child of its rank"
    while rank.is_alive():
        told = signal.sigtimedwait({signal.SIGTERM}, _LOOK_S)
        if told is not None and told.si_pid == rank.pid:
            break
    os._exit(0)


def _tells_of_a_death(error: Exception) -> bool:
    """Torch says it, or a batch of the dead process broke off on its way here before torch has noticed."""
    said = str(error)
    return "DataLoader worker (pid" in said if isinstance(error, RuntimeError) else "in DataLoader worker" not in said


def _loader(dataset: "_Fetching", numbers: Callable[[], Iterable[int]], workers: int) -> Any:
    import multiprocessing

    from torch.utils.data import DataLoader

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.utils.data", "simplejpeg", "shards.stream"])
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=_Numbers(numbers()),
        num_workers=workers,
        prefetch_factor=_PREFETCH,
        multiprocessing_context=context,
        worker_init_fn=_begin_reader,
    )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _room(pin: bool) -> Room:
    import torch

    return lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=pin)


class _Numbers(Generic[T]):
    """What a loader takes for a sampler: any iterable, here without end."""

    def __init__(self, numbers: Iterable[T]) -> None:
        self._numbers = numbers

    def __iter__(self) -> Iterator[T]:
        return iter(self._numbers)


class _Fetching:
    """What a worker does; one object in each worker."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._ring = _Ring()

    def __getitem__(self, n: int) -> "_Sent":
        # The loader would turn an exception into its traceback as text; sent as a value it stays one line.
        try:
            return _Sent.of(self._fetch(n, self._ring.take), self._ring)
        except UserError as error:
            return _Sent([], error=error)


class _Layout(NamedTuple):
    """How a tensor lies in a row: what as_strided takes."""

    shape: "torch.Size"
    strides: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class _Sent:
    """A batch on its way between processes: its items, without images, and where these lie in a lent buffer."""

    items: "list[Item]"
    places: "list[_Layout | None]" = field(default_factory=list)
    images: _Layout | None = None
    lent: "_Lent | None" = None
    error: UserError | None = None

    @staticmethod
    def of(fetched: Fetched, ring: "_Ring") -> "_Sent":
        """What a worker sends of a batch whose row it has taken from the ring."""
        row = fetched.row
        if row is None:
            return _Sent(fetched.items)
        places = [None if item.image is None else _layout(item.image, row) for item in fetched.items]
        images = None if fetched.images is None else _layout(fetched.images, row)
        return _Sent([replace(item, image=None) for item in fetched.items], places, images, ring.lend())

    def fetched(self, buffers: "_Buffers") -> Fetched:
        """The batch as it was, in memory of its own. Raises the UserError that fetching it raised."""
        if self.error is not None:
            raise self.error
        if self.lent is None:
            return Fetched(self.items)
        row = buffers.copy(self.lent)
        items = [
            item if place is None else replace(item, image=row.as_strided(*place))
            for item, place in zip(self.items, self.places, strict=True)
        ]
        return Fetched(items, None if self.images is None else row.as_strided(*self.images), row)


def _layout(tensor: "torch.Tensor", row: "torch.Tensor") -> _Layout:
    return _Layout(tensor.shape, tensor.stride(), tensor.storage_offset() - row.storage_offset())


class _Lent(NamedTuple):
    """Images in a worker's buffer: `size` bytes, the `turn`-th batch of that worker."""

    worker: int
    turn: int
    size: int
    buffer: "torch.Tensor | None"
    """The buffer itself, when it is a new one."""


class _Ring:
    """A worker's buffers, used in turn: one more than there may be batches under way.

    The loader asks a worker for another batch only once an earlier one of it has been taken, so a buffer is written
    again after the loop has copied it. Each buffer begins with its turn: the loop looks whether that is still so.
    """

    def __init__(self) -> None:
        self._turn, self._size = -1, 0
        self._buffers: list[torch.Tensor | None] = [None] * (_PREFETCH + 1)
        self._known = [False] * (_PREFETCH + 1)

    def take(self, size: int) -> "torch.Tensor":
        """The next buffer's bytes: a Room."""
        import torch

        self._turn, self._size = self._turn + 1, size
        slot = self._turn % len(self._buffers)
        buffer = self._buffers[slot]
        if buffer is None or buffer.numel() < _TURN_BYTES + size:
            buffer = torch.empty(0, dtype=torch.uint8)
            buffer.set_(torch.UntypedStorage._new_shared(_TURN_BYTES + size))
            self._buffers[slot], self._known[slot] = buffer, False
        buffer[:_TURN_BYTES].view(torch.int64)[0] = self._turn
        return buffer[_TURN_BYTES : _TURN_BYTES + size]

    def lend(self) -> _Lent:
        """What tells the loop where the bytes taken last are."""
        from torch.utils.data import get_worker_info

        worker, slot = get_worker_info(), self._turn % len(self._buffers)
        fresh = None if self._known[slot] else self._buffers[slot]
        self._known[slot] = True
        return _Lent(0 if worker is None else worker.id, self._turn, self._size, fresh)


class _Buffers:
    """The loop's side of all workers' rings."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._buffers: dict[tuple[int, int], torch.Tensor] = {}

    def copy(self, lent: _Lent) -> "torch.Tensor":
        """The images in memory of our own."""
        import torch

        name = (lent.worker, lent.turn % (_PREFETCH + 1))
        if lent.buffer is not None:
            self._buffers[name] = lent.buffer
        buffer = self._buffers[name]
        row = self._room(lent.size).copy_(buffer[_TURN_BYTES : _TURN_BYTES + lent.size])
        turn = int(buffer[:_TURN_BYTES].view(torch.int64)[0])
        assert turn == lent.turn, f"a reader has written batch {turn} over batch {lent.turn} before it was copied"
        return row
