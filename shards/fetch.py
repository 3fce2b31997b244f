"""Batches fetched ahead in worker processes and handed over in order, as uint8 in shared memory.

The processes come from a fork server that has torch loaded: forking the training process itself would copy its threads'
locks (CUDA, NCCL, OpenMP) in whatever state they are, and a fresh interpreter for each worker costs seconds and an
import of torch each.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from launcher.errors import UserError

if TYPE_CHECKING:
    import torch

    from shards.stream import Item

T = TypeVar("T")
Fetch = Callable[[int], "list[Item]"]
_PREFETCH = 2


def fetch_in_order(
    fetch: Fetch, numbers: Callable[[], Iterable[int]], workers: int, pin: bool = False
) -> "Iterator[tuple[int, list[Item]]]":
    """Yield (n, fetch(n)) for each of numbers(), in their order; with workers > 0 they are fetched ahead in processes.

    pin: images lie in page-locked memory where there is CUDA, so that copies to the device need not wait.
    """
    if workers == 0:
        pins = pin and _has_cuda()
        for n in numbers():
            items = fetch(n)
            yield n, _Sent(items).pin_memory().items() if pins else items
        return
    loader = _loader(_Fetching(fetch), numbers, workers, pin)
    try:
        for n, batch in zip(numbers(), loader, strict=True):
            yield n, batch.items()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"a reader process died ({first_line}); give it more memory or /dev/shm, or fewer workers"
        ) from None


def _loader(dataset: "_Fetching", numbers: Callable[[], Iterable[int]], workers: int, pin: bool) -> Any:
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
        pin_memory=pin and _has_cuda(),
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
    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch

    def __getitem__(self, n: int) -> "_Sent":
        # The loader would turn an exception into its traceback as text; sent as a value it stays one line.
        try:
            return _Sent(self._fetch(n), shared=True)
        except UserError as error:
            return _Sent([], error)


class _Sent:
    """A batch on its way between processes: one tensor for all images, as each tensor costs a file descriptor."""

    def __init__(self, items: "list[Item]", error: UserError | None = None, shared: bool = False) -> None:
        self._error = error
        self._seen = [item.image is not None for item in items]
        images = [item.image for item in items if item.image is not None]
        self._shapes = [image.shape for image in images]
        self._images = _joined(images, shared) if images else None
        self._items = [replace(item, image=None) for item in items]

    def pin_memory(self) -> "_Sent":
        """The batch with its images in page-locked memory; the loader calls it too."""
        if self._images is not None:
            self._images = self._images.pin_memory()
        return self

    def items(self) -> "list[Item]":
        """The batch as it was. Raises the UserError that fetching it raised."""
        if self._error is not None:
            raise self._error
        parts = () if self._images is None else self._images.split([shape.numel() for shape in self._shapes])
        images = iter([part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)])
        return [
            replace(item, image=next(images)) if seen else item
            for item, seen in zip(self._items, self._seen, strict=True)
        ]


def _joined(images: "list[torch.Tensor]", shared: bool) -> "torch.Tensor":
    """All values in one row; straight into shared memory where it is to be sent, which saves a copy."""
    import torch

    batch = torch.empty(0, dtype=torch.uint8)
    size = sum(image.numel() for image in images)
    if shared:
        batch.set_(torch.UntypedStorage._new_shared(size))
    return torch.cat([image.reshape(-1) for image in images], out=batch.resize_(size))
