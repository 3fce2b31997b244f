"""Keyed permutations: an order of samples that is computed, not stored, the same on every machine and for ever.

Only whole numbers and mixing of our own are used: library versions cannot change an order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from launcher.errors import UsageError

Ints = NDArray[np.int64]
Key = tuple[int, ...]

_ROUNDS = 8
_MASK = (1 << 64) - 1
_OF_SHARDS, _WITHIN_BLOCK = 0x5A4D, 0xB10C
_QUALITY_PAIRS = 50_000


class Shuffle:
    """The order of one set of `size` samples in each epoch: a permutation of all of it for each key."""

    def __init__(self, size: int) -> None:
        self.size = size

    def samples(self, places: Ints, key: Key) -> Ints:
        """The samples that come at `places` of the epoch of that key."""
        return shuffled(places, self.size, key)

    def places(self, samples: Ints, key: Key) -> Ints:
        """The places of the epoch where `samples` come: the inverse of samples()."""
        return unshuffled(samples, self.size, key)


class BlockShuffle(Shuffle):
    """For slow disks and remote sets: shards are shuffled, every `block_shards` of them make a block, and samples are
    shuffled within their block only. So at most two blocks' shards are read at a time, and each once an epoch.
    """

    def __init__(self, shard_sizes: Sequence[int] | Ints, block_shards: int) -> None:
        """Raises UsageError where a block has no shard."""
        super().__init__(int(np.sum(shard_sizes)))
        if block_shards < 1:
            raise UsageError(f"block_shards {block_shards}: a block needs at least one shard, 0 turns blocks off")
        self._shard_sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._shard_sizes)])
        self._block_shards = block_shards
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)

    def __reduce__(self) -> tuple[type["BlockShuffle"], tuple[Ints, int]]:
        return (BlockShuffle, (self._shard_sizes, self._block_shards))

    def samples(self, places: Ints, key: Key) -> Ints:
        """The samples that come at `places` of the epoch of that key."""
        epoch = self._epoch(key)
        mixed = self._within_blocks(np.asarray(places, np.int64), key, shuffled)
        turn = np.searchsorted(epoch.starts, mixed, "right") - 1
        return self._starts[epoch.shards[turn]] + mixed - epoch.starts[turn]

    def places(self, samples: Ints, key: Key) -> Ints:
        """The places of the epoch where `samples` come."""
        epoch = self._epoch(key)
        shards = np.searchsorted(self._starts, samples, "right") - 1
        mixed = epoch.starts[epoch.turns[shards]] + samples - self._starts[shards]
        return self._within_blocks(mixed, key, unshuffled)

    def _make_epoch(self, key: Key) -> "_Epoch":
        count = len(self._shard_sizes)
        shards = shuffled(np.arange(count), count, (*key, _OF_SHARDS))
        starts = np.concatenate([[0], np.cumsum(self._shard_sizes[shards])])
        blocks = np.append(starts[:-1][:: self._block_shards], starts[-1])
        return _Epoch(shards, np.argsort(shards), starts, blocks)

    def _within_blocks(self, places: Ints, key: Key, permute: Callable[[Ints, int, Key], Ints]) -> Ints:
        borders = self._epoch(key).blocks
        blocks = np.searchsorted(borders, places, "right") - 1
        result = np.empty_like(places)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            start, stop = int(borders[block]), int(borders[block + 1])
            result[here] = start + permute(places[here] - start, stop - start, (*key, _WITHIN_BLOCK, block))
        return result


class _Epoch(NamedTuple):
    """One epoch of a block shuffle: K shards in their order of reading."""

    shards: Ints
    """(K,) the shard read k-th."""
    turns: Ints
    """(K,) when each shard is read: the inverse of `shards`."""
    starts: Ints
    """(K + 1,) place where the shard read k-th begins."""
    blocks: Ints
    """Places where blocks begin, and the end."""


@dataclass(frozen=True)
class Quality:
    """How well an order mixes: mean distances, beside (N + 1) / 3, that of a shuffle which is fair to all orders."""

    expected: float
    stored: float
    """How far apart in the set two samples lie that come one after the other."""
    streamed: float
    """How far apart in the epoch two samples come that lie side by side in the set."""

    def __str__(self) -> str:
        stored, streamed = (100 * value / self.expected for value in (self.stored, self.streamed))
        return (
            f"one after the other in the stream lie {self.stored:,.0f} apart in the set ({stored:.0f} % of the "
            f"{self.expected:,.0f} of a full shuffle); side by side in the set come {self.streamed:,.0f} apart "
            f"({streamed:.0f} %)"
        )


def quality(shuffle: Shuffle, key: Key) -> Quality:
    """Distances achieved by `shuffle` in the epoch of that key, over evenly spread pairs where there are too many."""
    if shuffle.size < 2:
        return Quality(1.0, 1.0, 1.0)
    firsts = np.unique(np.linspace(0, shuffle.size - 2, min(shuffle.size - 1, _QUALITY_PAIRS)).astype(np.int64))

    def distance(order: Callable[[Ints, Key], Ints]) -> float:
        return float(np.abs(order(firsts + 1, key) - order(firsts, key)).mean())

    return Quality((shuffle.size + 1) / 3, distance(shuffle.samples), distance(shuffle.places))


def shuffled(places: Ints, size: int, key: Sequence[int]) -> Ints:
    """Where `places` of [0, size) stand after a shuffle keyed by `key`: one permutation of [0, size) for each key.

    A Feistel network over [0, a) x [0, b), a·b just above `size`; values beyond `size` walk on until they fall within.
    """
    return _walk(places, size, key, _forward)


def unshuffled(places: Ints, size: int, key: Sequence[int]) -> Ints:
    """The way back: unshuffled(shuffled(places, size, key), size, key) is `places`."""
    return _walk(places, size, key, _backward)


def _walk(places: Ints, size: int, key: Sequence[int], step: Callable[[Ints, int, int, Sequence[int]], Ints]) -> Ints:
    wide = isqrt(size - 1) + 1
    tall = -(-size // wide)
    keys = _round_keys(tuple(key))
    result = step(np.asarray(places, np.int64), wide, tall, keys)
    while (todo := result >= size).any():
        result[todo] = step(result[todo], wide, tall, keys)
    return result


@lru_cache(maxsize=256)
def _round_keys(key: Key) -> tuple[int, ...]:
    base = mix(*key)
    return tuple(mix(base, turn) for turn in range(_ROUNDS))


def _forward(values: Ints, wide: int, tall: int, keys: Sequence[int]) -> Ints:
    left, right = np.divmod(values.astype(np.uint64), np.uint64(tall))
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix_array(right, first, wide)) % np.uint64(wide)
        right = (right + _mix_array(left, second, tall)) % np.uint64(tall)
    return (left * np.uint64(tall) + right).astype(np.int64)


def _backward(values: Ints, wide: int, tall: int, keys: Sequence[int]) -> Ints:
    left, right = np.divmod(values.astype(np.uint64), np.uint64(tall))
    for second, first in zip(keys[::-2], keys[-2::-2], strict=True):
        right = (right + np.uint64(tall) - _mix_array(left, second, tall)) % np.uint64(tall)
        left = (left + np.uint64(wide) - _mix_array(right, first, wide)) % np.uint64(wide)
    return (left * np.uint64(tall) + right).astype(np.int64)


def mix(*values: int) -> int:
    """Whole numbers to one well-mixed number of 64 bits (splitmix64's finaliser, chained)."""
    state = 0
    for value in values:
        state = (state * 3 + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _mix_array(values: NDArray[np.uint64], key: int, modulus: int) -> NDArray[np.uint64]:
    """The same mixing of an array, below `modulus`; in place, for speed."""
    state = values * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(key)
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    state %= np.uint64(modulus)
    return state
