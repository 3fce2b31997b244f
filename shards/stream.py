"""From shard sets to batches: reads and decodes what the plan says, in its order, with any number of worker processes.

One item of the loader is one rank's share of one global batch, so workers can only change who decodes a batch, never
which samples are in it or in which order they come. The whole state of a stream is the number of the next batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from launcher.errors import UsageError, UserError
from shards.ahead import AHEAD_BATCHES, Ahead, check_cache_in_order, check_caches
from shards.augment import Augment, Change
from shards.fetch import Fetched, Room, fetch_in_order
from shards.index import SampleError, ShardSet
from shards.pixels import Scratch, resize
from shards.plan import Plan, Slot, consecutive_batches, rank_share
from shards.record import Record

if TYPE_CHECKING:
    import torch

OnBadSample = Literal["fail", "skip"]
View: TypeAlias = "Callable[[np.ndarray, Record], torch.Tensor]"
"""What else may be made of an image (H, W, 3) and its record: any uint8 tensor, such as crops of its heads."""
Note: TypeAlias = Callable[["Item"], Any]
"""What a reader writes about an item for whoever takes it; anything that can be pickled."""
MOST_BAD_IN_A_ROW = 100
_AS_STORED = Augment()


@dataclass(frozen=True)
class Item:
    """One place of a batch. A bad sample that is skipped has neither image nor record: a hole of weight 0."""

    slot: Slot
    key: str
    image: "torch.Tensor | None"
    """(3, S, S) uint8, RGB; or what a view made of it."""
    record: Record | None
    """Boxes and camera in pixels of the stored image, or of the crop that augmentation made of it."""
    mirrored: bool = False
    problem: str = ""
    """Why it was skipped."""
    note: Any = None
    """What the stream was asked to write about it."""


class Batch(tuple[int, list[Item]]):
    """One rank's share of one global batch; unpacks as (n, items)."""

    state: dict[str, Any]
    """What a run that has taken this batch needs to go on after it, on any number of ranks and workers."""
    images: "torch.Tensor | None"
    """(B, 3, S, S) uint8: all images as one tensor, holes black, no copy of the items'; None unless all are of side S.
    The colours of a pixel lie side by side."""

    def __new__(cls, n: int, fetched: Fetched, state: dict[str, Any]) -> "Batch":
        batch = super().__new__(cls, (n, fetched.items))
        batch.state, batch.images = state, fetched.images
        return batch


class Stream:
    """Yields Batch (n, items) for n = start, start + 1, … without end: `rank`'s share of global batch n, in plan order.

    image_size: side S in pixels; None reads and checks the bytes but decodes no image; or a view, a function that can
    be pickled, of images as they are stored. workers: reader processes (0: decode in this one). Bad samples raise
    UserError, or with "skip" leave a hole and are counted in `skipped`; a hundred of them in a row are no bad luck and
    raise UserError too. augment: what may happen to images and records. note: what the readers write about each item,
    a function that can be pickled. pin: images lie in page-locked memory where there is CUDA.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        plan: Plan,
        rank: int,
        size: int,
        image_size: "int | View | None",
        start: int = 0,
        workers: int = 0,
        on_bad_sample: OnBadSample = "fail",
        augment: Augment | None = None,
        note: Note | None = None,
        pin: bool = False,
    ) -> None:
        if tuple(map(len, sets)) != plan.sizes:
            raise UsageError(f"shard sets of {[*map(len, sets)]} samples, but the plan is for {[*plan.sizes]}")
        if not 0 <= rank < size:
            raise UsageError(f"rank {rank} of {size}: ranks count from 0")
        rank_share(range(plan.batch), rank, size)
        check_caches(sets, plan, workers)
        if callable(image_size) and augment not in (None, _AS_STORED):
            raise UsageError("a view of images as they are stored is not augmented; leave augment out")
        self.skipped = 0
        self._plan, self._start, self._workers, self._pin = plan, start, workers, pin
        reader = Reader(list(sets), image_size, on_bad_sample)
        self._fetch = _PlannedBatch(reader, plan, rank, size, augment or Augment(), note)

    def __iter__(self) -> Iterator[Batch]:
        bad_in_a_row = 0
        for n, fetched in fetch_in_order(self._fetch, lambda: count(self._start), self._workers, self._pin):
            for item in fetched.items:
                if item.record is not None:
                    bad_in_a_row = 0
                    continue
                bad_in_a_row += 1
                self.skipped += 1
                if bad_in_a_row >= MOST_BAD_IN_A_ROW:
                    raise UserError(f"{bad_in_a_row} bad samples in a row are not skipped; the last: {item.problem}")
            yield Batch(n, fetched, self._plan.state(n + 1))


def read_all(
    shard_set: ShardSet,
    rank: int,
    size: int,
    batch: int,
    image_size: "int | View | None",
    workers: int = 0,
    limit: int | None = None,
    on_bad_sample: OnBadSample = "fail",
    only: Sequence[int] | None = None,
) -> Iterator[tuple[int, list[Item]]]:
    """Every sample once, for evaluation: yields (b, items) for the batches b that are `rank`'s, dealt round-robin.

    Batch b is samples [b·batch, (b+1)·batch) in the order of keys, whatever the ranks; the last may be smaller. `limit`
    takes the first so many samples, `only` these batches alone. Slots count positions in key order. Ranks may get one
    batch more or less. Raises UserError where the cache of a remote set is too small for this order.
    """
    order = shard_set.key_order()[:limit]
    batches = consecutive_batches(len(order), batch)
    fetch = _EvaluationBatch(Reader([shard_set], image_size, on_bad_sample), order, batches)
    dealt = range(len(batches)) if only is None else only
    if shard_set.remote is not None:
        places = [place for b in dealt for place in batches[b]]
        check_cache_in_order(shard_set, order[np.array(places, np.int64)])
    return ((b, fetched.items) for b, fetched in fetch_in_order(fetch, lambda: dealt[rank::size], workers))


class Reader:
    """Reads slots into items; the part of a stream that runs in the workers."""

    def __init__(self, sets: list[ShardSet], image_size: "int | View | None", on_bad_sample: OnBadSample) -> None:
        self.sets, self._image_size = sets, image_size
        self._skips = on_bad_sample == "skip"
        # A view may give back the pixels themselves.
        self._scratch = Scratch() if isinstance(image_size, int) else None

    def batch(self, slots: Sequence[Slot], augment: Augment, seed: int, room: Room) -> Fetched:
        """The samples of `slots`, their images in one row of memory. Raises UserError as item() does."""
        if not isinstance(self._image_size, int):
            return gathered([self.item(slot, augment, seed) for slot in slots], room)
        count, size_px = len(slots), self._image_size
        row = room(count * size_px * size_px * 3)
        images = row.view(count, size_px, size_px, 3).permute(0, 3, 1, 2)
        items = [self.item(slot, augment, seed, images[k]) for k, slot in enumerate(slots)]
        for image, item in zip(images, items, strict=True):
            if item.image is None:
                image.zero_()
        return Fetched(items, images, row)

    def item(self, slot: Slot, augment: Augment, seed: int, out: "torch.Tensor | None" = None) -> Item:
        """The sample of `slot`, its image in `out` if that is given: (3, S, S), best with a pixel's colours together.

        Raises UserError where it is bad and bad samples are not skipped.
        """
        shard_set = self.sets[slot.set]
        try:
            stored = shard_set.read(slot.sample)
            known = shard_set.parse(slot.sample, stored.json)
            change = None if augment is _AS_STORED else augment.at(seed, slot.position, known)
            image = None
            if self._image_size is not None:
                pixels = shard_set.pixels(slot.sample, stored, known, self._scratch)
                image = self._image(pixels, known, change, out)
        except SampleError as error:
            if not self._skips:
                raise
            return Item(slot, error.key, None, None, problem=str(error))
        if change is None:
            return Item(slot, stored.key, image, known)
        return Item(slot, stored.key, image, change.record(known), change.mirrored)

    def _image(
        self, pixels: np.ndarray, known: Record, change: Change | None, out: "torch.Tensor | None"
    ) -> "torch.Tensor":
        if not isinstance(self._image_size, int):
            assert self._image_size is not None, "no image is wanted"
            return self._image_size(pixels, known)
        if change is None:
            return resize(pixels, self._image_size, out)
        image = change.finish(resize(change.cut(pixels), self._image_size, out))
        return image if out is None else out.copy_(image)


def gathered(items: list[Item], room: Room) -> Fetched:
    """The items with their images, of whatever sizes, in one row of memory."""
    if all(item.image is None for item in items):
        return Fetched(items)
    sizes = [0 if item.image is None else item.image.numel() for item in items]
    row = room(sum(sizes))
    places = zip(items, row.split(sizes), strict=True)
    return Fetched([_moved(item, place) for item, place in places], row=row)


def _moved(item: Item, place: "torch.Tensor") -> Item:
    return item if item.image is None else replace(item, image=place.view(item.image.shape).copy_(item.image))


class _PlannedBatch:
    def __init__(self, reader: Reader, plan: Plan, rank: int, size: int, augment: Augment, note: Note | None) -> None:
        self._reader, self._plan, self._rank, self._size = reader, plan, rank, size
        self._augment, self._note = _AS_STORED if augment == _AS_STORED else augment, note
        self._asked = 0
        self._ahead = Ahead() if any(shard_set.remote for shard_set in reader.sets) else None

    def __call__(self, n: int, room: Room) -> Fetched:
        if self._ahead is not None:
            self._ahead.want(self._shards_until(n + AHEAD_BATCHES))
        share = self._plan.share_at(n, self._rank, self._size)
        fetched = self._reader.batch(share, self._augment, self._plan.seed, room)
        if self._note is None:
            return fetched
        return replace(fetched, items=[replace(item, note=self._note(item)) for item in fetched.items])

    def _shards_until(self, n: int) -> Iterator[tuple[ShardSet, int]]:
        """Remote shards that this rank's batches need up to batch n, from where the last call ended."""
        for m in range(max(self._asked, n - AHEAD_BATCHES), n):
            for slot in self._plan.share_at(m, self._rank, self._size):
                shard_set = self._reader.sets[slot.set]
                if shard_set.remote is not None:
                    yield shard_set, int(shard_set.arrays["shard"][slot.sample])
        self._asked = max(self._asked, n)

    def __reduce__(self) -> tuple[Any, ...]:
        # A plan may hold the heads of all samples: a worker makes its own, over the same mapped index.
        options = self._plan.options()
        return (_planned_batch, (self._reader, options, self._rank, self._size, self._augment, self._note))


def _planned_batch(reader: Reader, options: dict[str, Any], *more: Any) -> _PlannedBatch:
    return _PlannedBatch(reader, Plan.of(reader.sets, **options), *more)


class _EvaluationBatch:
    def __init__(self, reader: Reader, order: np.ndarray, batches: list[range]) -> None:
        self._reader, self._order, self._batches = reader, order, batches

    def __call__(self, b: int, room: Room) -> Fetched:
        slots = [Slot(0, int(self._order[place]), 0, place) for place in self._batches[b]]
        return self._reader.batch(slots, _AS_STORED, 0, room)
