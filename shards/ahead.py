"""Remote shards before they are needed: a thread that fetches them, and whether the cache has the room."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from launcher.errors import UsageError, UserError
from shards.cache import GIGABYTES_VARIABLE

if TYPE_CHECKING:
    from shards.index import ShardSet
    from shards.plan import Plan

_BLOCKS_AT_A_TIME = 2


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
            # Whoever reads a sample of it meets the same error, and says it.
            with contextlib.suppress(UserError):
                shard_set.bring(shard)
            self._under_way.discard((id(shard_set), shard))


def check_caches(sets: "Sequence[ShardSet]", plan: "Plan") -> None:
    """Raise UsageError where remote sets would be fetched over and over: their cache is too small for the plan.

    A full shuffle reads all shards at once; one by blocks two blocks of each set.
    """
    needed, cache = 0, None
    for shard_set in sets:
        if shard_set.remote is None:
            continue
        cache = shard_set.remote.cache
        sizes = [shard["bytes"] for shard in shard_set.info["shards"]]
        at_a_time = min(len(sizes), _BLOCKS_AT_A_TIME * plan.block_shards) if plan.block_shards else len(sizes)
        needed += sum(sorted(sizes)[-at_a_time:])
    if cache is not None and needed > cache.most_bytes:
        raise UsageError(
            f"{cache.folder}: {needed / 1e9:,.3f} GB of remote shards are read at a time, the cache may hold "
            f"{cache.most_bytes / 1e9:,.3f} GB; raise {GIGABYTES_VARIABLE}, or shuffle by fewer block_shards"
        )
