"""From shard sets to batches: reads and decodes what the plan says, in its order, with any number of worker processes.

One item of the loader is one rank's share of one global batch, so workers can only change who decodes a batch, never
which samples are in it or in which order they come. The whole state of a stream is the number of the next batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np

from launcher.errors import UsageError, UserError
from shards.index import SampleError, ShardSet
from shards.plan import Plan, Slot, consecutive_batches, is_mirrored, rank_share
from shards.record import Record

if TYPE_CHECKING:
    import torch

OnBadSample = Literal["fail", "skip"]
T = TypeVar("T")
_PREFETCH = 2


@dataclass(frozen=True)
class Item:
    """One place of a batch. A bad sample that is skipped has neither image nor record: a hole of weight 0."""

    slot: Slot
    key: str
    image: "torch.Tensor | None"
    """(3, S, S) uint8, RGB."""
    record: Record | None
    """Boxes and camera in pixels of the stored image, mirrored if `mirrored`."""
    mirrored: bool = False
    problem: str = ""
    """Why it was skipped."""


class Stream:
    """Yields (n, items) for n = start, start + 1, … without end: `rank`'s share of global batch n, in the plan's order.

    image_size: side S in pixels; None reads and checks the bytes but decodes no image. workers: reader processes (0:
    decode in this one). Bad samples raise UserError, or with "skip" leave a hole and are counted in `skipped`. With
    `flip` a fair coin of (seed, position) mirrors a sample: image, boxes, poses and the words left and right.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        plan: Plan,
        rank: int,
        size: int,
        image_size: int | None,
        start: int = 0,
        workers: int = 0,
        on_bad_sample: OnBadSample = "fail",
        flip: bool = False,
    ) -> None:
        if tuple(map(len, sets)) != plan.sizes:
            raise UsageError(f"shard sets of {[*map(len, sets)]} samples, but the plan is for {[*plan.sizes]}")
        if not 0 <= rank < size:
            raise UsageError(f"rank {rank} of {size}: ranks count from 0")
        rank_share(range(plan.batch), rank, size)
        self.skipped = 0
        self._start, self._workers = start, workers
        reader = Reader(list(sets), image_size, on_bad_sample)
        self._fetch = _PlannedBatch(reader, plan, rank, size, flip)

    def __iter__(self) -> Iterator[tuple[int, list[Item]]]:
        for n, items in fetch_in_order(self._fetch, lambda: count(self._start), self._workers):
            self.skipped += sum(item.record is None for item in items)
            yield n, items


def read_all(
    shard_set: ShardSet,
    rank: int,
    size: int,
    batch: int,
    image_size: int | None,
    workers: int = 0,
    limit: int | None = None,
    on_bad_sample: OnBadSample = "fail",
) -> Iterator[tuple[int, list[Item]]]:
    """Every sample once, for evaluation: yields (b, items) for the batches b that are `rank`'s (b mod size).

    Batch b is samples [b·batch, (b+1)·batch) in the order of keys, whatever the ranks; the last may be smaller. `limit`
    takes the first so many samples. Slots count positions in key order. Ranks may get one batch more or less.
    """
    order = shard_set.key_order()[:limit]
    batches = consecutive_batches(len(order), batch)
    fetch = _EvaluationBatch(Reader([shard_set], image_size, on_bad_sample), order, batches)
    return fetch_in_order(fetch, lambda: range(rank, len(batches), size), workers)


class Reader:
    """Reads slots into items; the part of a stream that runs in the workers."""

    def __init__(self, sets: list[ShardSet], image_size: int | None, on_bad_sample: OnBadSample) -> None:
        self._sets, self._image_size = sets, image_size
        self._skips = on_bad_sample == "skip"

    def item(self, slot: Slot, mirrored: bool = False) -> Item:
        """The sample of `slot`. Raises UserError where it is bad and bad samples are not skipped."""
        shard_set = self._sets[slot.set]
        try:
            stored = shard_set.read(slot.sample)
            known = shard_set.parse(slot.sample, stored.json)
            image = None
            if self._image_size is not None:
                image = self._image(shard_set, slot.sample, stored.image, stored.extension, known)
        except SampleError as error:
            if not self._skips:
                raise
            return Item(slot, error.key, None, None, mirrored, str(error))
        if mirrored:
            known, image = known.mirrored(), None if image is None else image.flip(-1)
        return Item(slot, stored.key, image, known, mirrored)

    def _image(self, shard_set: ShardSet, i: int, data: bytes, extension: str, known: Record) -> "torch.Tensor":
        try:
            pixels = decode_pixels(data, extension)
        except ValueError as error:
            raise shard_set.sample_error(i, f"the {extension} does not decode ({error})") from None
        height, width = pixels.shape[:2]
        if (width, height) != (known.image.width, known.image.height):
            said = f"{known.image.width}x{known.image.height}"
            raise shard_set.sample_error(i, f"the image is {width}x{height}, its record says {said}")
        return resize(pixels, self._image_size or width)


class _PlannedBatch:
    def __init__(self, reader: Reader, plan: Plan, rank: int, size: int, flip: bool) -> None:
        self._reader, self._plan, self._rank, self._size, self._flip = reader, plan, rank, size, flip

    def __call__(self, n: int) -> list[Item]:
        share = self._plan.share_at(n, self._rank, self._size)
        seed = self._plan.seed
        return [self._reader.item(slot, self._flip and is_mirrored(seed, slot.position)) for slot in share]


class _EvaluationBatch:
    def __init__(self, reader: Reader, order: np.ndarray, batches: list[range]) -> None:
        self._reader, self._order, self._batches = reader, order, batches

    def __call__(self, b: int) -> list[Item]:
        return [self._reader.item(Slot(0, int(self._order[place]), 0, place)) for place in self._batches[b]]


def fetch_in_order(
    fetch: Callable[[int], list[Item]], numbers: Callable[[], Iterable[int]], workers: int
) -> Iterator[tuple[int, list[Item]]]:
    """Yield (n, fetch(n)) for each of numbers(), in their order; with workers > 0 they are fetched ahead in processes.

    The processes come from a fork server that has torch loaded: forking the training process itself would copy its
    threads' locks (CUDA, NCCL, OpenMP) in whatever state they are, and a fresh interpreter for each worker costs
    seconds and an import of torch each.
    """
    if workers == 0:
        for n in numbers():
            yield n, fetch(n)
        return
    loader = _loader(_Fetching(fetch), numbers, workers)
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


def _loader(dataset: "_Fetching", numbers: Callable[[], Iterable[int]], workers: int) -> Any:
    import multiprocessing

    from torch.utils.data import DataLoader

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.utils.data", "shards.stream"])
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=_Numbers(numbers()),
        num_workers=workers,
        prefetch_factor=_PREFETCH,
        multiprocessing_context=context,
    )


class _Numbers(Generic[T]):
    """What a loader takes for a sampler: any iterable, here without end."""

    def __init__(self, numbers: Iterable[T]) -> None:
        self._numbers = numbers

    def __iter__(self) -> Iterator[T]:
        return iter(self._numbers)


class _Fetching:
    def __init__(self, fetch: Callable[[int], list[Item]]) -> None:
        self._fetch = fetch

    def __getitem__(self, n: int) -> "_Sent":
        # The loader would turn an exception into its traceback as text; sent as a value it stays one line.
        try:
            return _Sent(self._fetch(n))
        except UserError as error:
            return _Sent([], error)


class _Sent:
    """A batch on its way between processes: one tensor for all images, as each tensor costs a file descriptor."""

    def __init__(self, items: list[Item], error: UserError | None = None) -> None:
        import torch

        self._error = error
        self._seen = [item.image is not None for item in items]
        images = [item.image for item in items if item.image is not None]
        self._images = torch.stack(images) if images else None
        self._items = [replace(item, image=None) for item in items]

    def items(self) -> list[Item]:
        """The batch as it was. Raises the UserError that fetching it raised."""
        if self._error is not None:
            raise self._error
        images = iter(()) if self._images is None else iter(self._images)
        return [
            replace(item, image=next(images)) if seen else item
            for item, seen in zip(self._items, self._seen, strict=True)
        ]


def decode_image(data: bytes, extension: str, size_px: int) -> "torch.Tensor":
    """Encoded image to (3, size_px, size_px) uint8 RGB. Raises ValueError for bytes that do not decode."""
    return resize(decode_pixels(data, extension), size_px)


def decode_pixels(data: bytes, extension: str) -> np.ndarray:
    """Encoded image to (H, W, 3) uint8 RGB; JPEG by simplejpeg at full size, others by Pillow.

    Raises ValueError for bytes that do not decode.
    """
    if extension == "jpg":
        import simplejpeg

        if simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK"):
            pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB")
            return pixels
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:
        # Damaged bytes make Pillow raise SyntaxError, zlib.error, struct.error, … as well as OSError.
        raise ValueError(str(error) or type(error).__name__) from None


def resize(pixels: np.ndarray, size_px: int) -> "torch.Tensor":
    """(H, W, 3) uint8 to (3, size_px, size_px) uint8: antialiased bicubic, both sides squeezed to the same length."""
    import torch

    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if image.shape[1:] != (size_px, size_px):
        # channels_last in, as decoded: torch's fast path for uint8; within 2 grey levels of Pillow.
        square = (size_px, size_px)
        image = torch.nn.functional.interpolate(image[None], square, mode="bicubic", antialias=True)[0]
    return image.contiguous()
