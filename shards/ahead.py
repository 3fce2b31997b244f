"""Remote shards before they are needed: a thread that fetches them, and whether the cache has the room."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from launcher.errors import UsageError, UserError
from shards.cache import FOLDER_VARIABLE, GIGABYTES_VARIABLE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shards.index import ShardSet
    from shards.plan import Plan

AHEAD_BATCHES = 16
"""So many batches before they are needed, shards of remote sets are asked for."""
_BATCHES_A_READER = 2  # that the loader has readers make before they are taken


class Ahead:
    """Fetches shards in the background, in the order in which they are wanted. One thread of the reading process."""

    def __init__(self) -> None:
        self._wanted: queue.Queue[tuple[ShardSet, int]] = queue.Queue()
        self._under_way: set[tuple[int, int]] = set()
        self._thread: threading.Thread | None = None

    def want(self, shards: "Iterable[tuple[ShardSet, int]]") -> None:
        """Fetch these soon, unless they are here."""
        for shard_set, shard in shards:
            name = (id(shard_set), shard)
            if name not in self._under_way and not shard_set.tar(shard).exists():
                self._under_way.add(name)
                self._wanted.put((shard_set, shard))
        if self._thread is None and not self._wanted.empty():
            self._thread = threading.Thread(target=self._run, name="shards-ahead", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            shard_set, shard = self._wanted.get()
            # Whoever reads a sample of it meets the same error, waits, and says it.
            with contextlib.suppress(UserError):
                shard_set.bring(shard, patient=False)
            self._under_way.discard((id(shard_set), shard))


def check_caches(sets: "Sequence[ShardSet]", plan: "Plan", workers: int) -> None:
    """Raise UserError where remote sets would be fetched over and over: their cache is too small for the plan.

    A full shuffle reads all shards at once. One by blocks needs those of all batches between the fetching of a shard
    and its last reading: the cache drops what was used longest ago, and that may be what was fetched ahead.
    """
    needed = 0
    # Once for what is read until a shard's turn comes, once for what is fetched by then.
    batches = 2 * (AHEAD_BATCHES + _BATCHES_A_READER * workers + plan.bucket_batches)
    for shard_set, weight in zip(sets, plan.weights, strict=True):
        if shard_set.remote is None:
            continue
        sizes = [shard["bytes"] for shard in shard_set.info["shards"]]
        at_a_time = len(sizes)
        if plan.block_shards:
            samples = -(-batches * plan.batch * weight // sum(plan.weights))
            # As many whole shards as that can be, its own block, and the blocks that are cut by both ends.
            whole = int(np.searchsorted(np.cumsum(np.sort(shard_set.shard_sizes)), samples, "right"))
            at_a_time = min(at_a_time, whole + 3 * plan.block_shards)
        needed += sum(sorted(sizes)[-at_a_time:])
    _check_room(sets, needed, ", or shuffle by fewer block_shards")


def check_cache_in_order(shard_set: "ShardSet", samples: "NDArray[np.int64]") -> None:
    """As check_caches, for samples that are read once in this order: each shard by itself needs no room to speak of."""
    shards = shard_set.arrays["shard"][samples]
    distinct = np.unique(shards)
    if np.count_nonzero(np.diff(shards)) >= len(distinct):
        needed = sum(shard_set.info["shards"][shard]["bytes"] for shard in distinct.tolist())
        _check_room([shard_set], needed, ", or copy the set to a disk: in the order of its keys shards are mixed")


def _check_room(sets: "Sequence[ShardSet]", needed: int, or_else: str) -> None:
    cache = next((shard_set.remote.cache for shard_set in sets if shard_set.remote is not None), None)
    if cache is None:
        return
    said = f"{cache.folder}: {needed / 1e9:,.3f} GB of remote shards are read at a time"
    if needed > cache.most_bytes:
        limit = f"the cache may hold {cache.most_bytes / 1e9:,.3f} GB"
        raise UsageError(f"{said}, {limit}; raise {GIGABYTES_VARIABLE}{or_else}")
    room = cache.held_bytes() + cache.free_bytes()
    if needed > room:
        limit = f"its disk has room for {room / 1e9:,.3f} GB"
        raise UserError(f"{said}, {limit}; free some space, name another folder in {FOLDER_VARIABLE}{or_else}")
