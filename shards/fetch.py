"""Batches fetched ahead in worker processes and handed over in order, as uint8 through shared memory.

The processes come from a fork server that has torch loaded: forking the training process itself would copy its threads'
locks (CUDA, NCCL, OpenMP) in whatever state they are, and a fresh interpreter for each worker costs seconds and an
import of torch each. A worker writes its batches into a few buffers in turn, which stay mapped on both sides: fresh
shared pages would cost a third of what decoding does. It holds _PREFETCH + 1 batches in memory, never more.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from launcher.errors import UserError

if TYPE_CHECKING:
    import torch

    from shards.stream import Item

T = TypeVar("T")
Fetch = Callable[[int], "list[Item]"]
_PREFETCH = 2
_TURN_BYTES = 8


def fetch_in_order(
    fetch: Fetch, numbers: Callable[[], Iterable[int]], workers: int, pin: bool = False
) -> "Iterator[tuple[int, list[Item]]]":
    """Yield (n, fetch(n)) for each of numbers(), in their order; with workers > 0 they are fetched ahead in processes.

    pin: images lie in page-locked memory where there is CUDA, so that copies to the device need not wait.
    """
    pins = pin and _has_cuda()
    if workers == 0:
        for n in numbers():
            items = fetch(n)
            yield n, _Sent(items).items(pins) if pins else items
        return
    loader, buffers = _loader(_Fetching(fetch), numbers, workers), _Buffers()
    try:
        for n, batch in zip(numbers(), loader, strict=True):
            yield n, batch.items(pins, buffers)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"a reader process died ({first_line}); give it more memory or /dev/shm, or fewer workers"
        ) from None


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
    )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


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
            return _Sent(self._fetch(n), ring=self._ring)
        except UserError as error:
            return _Sent([], error)


class _Sent:
    """A batch on its way between processes; its images lie in a row, wherever that is."""

    def __init__(self, items: "list[Item]", error: UserError | None = None, ring: "_Ring | None" = None) -> None:
        self._error = error
        self._seen = [item.image is not None for item in items]
        images = [item.image for item in items if item.image is not None]
        self._shapes = [image.shape for image in images]
        self._images = (_in_a_row(images) if ring is None else ring.write(images)) if images else None
        self._items = [replace(item, image=None) for item in items]

    def items(self, pin: bool = False, buffers: "_Buffers | None" = None) -> "list[Item]":
        """The batch as it was, with images in memory of its own. Raises the UserError that fetching it raised."""
        if self._error is not None:
            raise self._error
        row = self._images
        if isinstance(row, _Lent):
            assert buffers is not None, "a batch in shared memory needs the reader's buffers"
            row = buffers.copy(row, pin)
        elif row is not None and pin:
            row = row.pin_memory()
        parts = () if row is None else row.split([shape.numel() for shape in self._shapes])
        images = iter([part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)])
        return [
            replace(item, image=next(images)) if seen else item
            for item, seen in zip(self._items, self._seen, strict=True)
        ]


def _in_a_row(images: "list[torch.Tensor]", out: "torch.Tensor | None" = None) -> "torch.Tensor":
    import torch

    return torch.cat([image.reshape(-1) for image in images], out=out)


class _Lent(NamedTuple):
    """Images in a worker's buffer: `size` values, the `turn`-th batch of that worker."""

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
        self._turn = 0
        self._buffers: list[torch.Tensor | None] = [None] * (_PREFETCH + 1)

    def write(self, images: "list[torch.Tensor]") -> _Lent:
        """Put the images into the next buffer."""
        import torch
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        slot, size = self._turn % len(self._buffers), sum(image.numel() for image in images)
        buffer = self._buffers[slot]
        fresh = buffer is None or buffer.numel() < _TURN_BYTES + size
        if buffer is None or fresh:
            buffer = torch.empty(0, dtype=torch.uint8)
            buffer.set_(torch.UntypedStorage._new_shared(_TURN_BYTES + size))
            self._buffers[slot] = buffer
        buffer[:_TURN_BYTES].view(torch.int64)[0] = self._turn
        _in_a_row(images, out=buffer[_TURN_BYTES : _TURN_BYTES + size])
        self._turn += 1
        return _Lent(0 if worker is None else worker.id, self._turn - 1, size, buffer if fresh else None)


class _Buffers:
    """The loop's side of all workers' rings."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int], torch.Tensor] = {}

    def copy(self, lent: _Lent, pin: bool) -> "torch.Tensor":
        """The images in memory of our own."""
        import torch

        name = (lent.worker, lent.turn % (_PREFETCH + 1))
        if lent.buffer is not None:
            self._buffers[name] = lent.buffer
        buffer = self._buffers[name]
        row = torch.empty(lent.size, dtype=torch.uint8, pin_memory=pin)
        row.copy_(buffer[_TURN_BYTES : _TURN_BYTES + lent.size])
        turn = int(buffer[:_TURN_BYTES].view(torch.int64)[0])
        assert turn == lent.turn, f"a reader has written batch {turn} over batch {lent.turn} before it was copied"
        return row
