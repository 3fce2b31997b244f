"""Which sample comes when: pure functions of (sizes, ratios, seed, batch, n), the same on every rank and machine.

The stream of all samples is one endless row of positions 0, 1, 2, …; global batch n is the positions [n·B, (n+1)·B).
A repeating pattern says which set a position draws from, so every period of it has the exact ratios; the j-th draw
from a set of S samples is number j mod S of its epoch j // S. Each epoch of each set is shuffled afresh by a keyed
permutation that is computed, not stored: a plan over 10^8 samples costs no more memory than one over ten, and any batch
can be asked for directly.
"""

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from launcher.errors import UsageError
from shards.shuffle import BlockShuffle, Ints, Shuffle, mix, shuffled

T = TypeVar("T")

MAX_PERIOD = 10_000
_OF_BATCHES = 0xB0C4
_WINDOWS_KEPT = 2
_AT_ONCE = 2048  # samples of a share that are worked out ahead, at most
_NEAR = 64  # batches that a reader among several may skip
_SHARES_KEPT = 64
_NOTHING = np.empty((4, 0), np.int64)


class Slot(NamedTuple):
    """One place in the stream: `sample` of `set`, drawn in that set's `epoch`; `position` counts all sets together."""

    set: int
    sample: int
    epoch: int
    position: int


class Indexed(Protocol):
    """What a plan asks of a shard set."""

    def __len__(self) -> int: ...

    @property
    def shard_sizes(self) -> list[int]: ...

    @property
    def n_heads(self) -> Any: ...

    @property
    def digest(self) -> str: ...


class Plan:
    """The order of samples. `ratios` need not add up to 1; they are kept to within 1e-4 and exactly in each period.

    block_shards, shard_sizes: shuffle by blocks of so many shards of each set (shard_sizes: one row a set), see
    BlockShuffle; 0: a full shuffle. bucket_batches, heads: within every so many batches, samples of a set change places
    so that a batch has images of about as many heads (heads: one row a set); the ratios of each batch stay. Both keep
    every epoch exact. digests: which builds the sets are, told by the state. Raises UsageError where a set is empty, a
    ratio is not positive (or below 1e-4 of all), the batch is below 1, or an option is negative.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        ratios: Sequence[float],
        seed: int,
        batch: int,
        block_shards: int = 0,
        shard_sizes: Sequence[Sequence[int]] = (),
        bucket_batches: int = 0,
        heads: Sequence[Sequence[int] | Ints] = (),
        digests: Sequence[str] = (),
    ) -> None:
        if not sizes or len(sizes) != len(ratios):
            raise UsageError(
                f"{len(sizes)} shard sets with {len(ratios)} ratios: name at least one set, one ratio each"
            )
        for index, size in enumerate(sizes):
            if size < 1:
                raise UsageError(f"shard set {index} has no samples; leave it out of the mix")
        if batch < 1:
            raise UsageError(f"batch {batch}: at least one image is needed")
        for name, value in (("block_shards", block_shards), ("bucket_batches", bucket_batches)):
            if value < 0:
                raise UsageError(f"{name} {value}: it must be 0 (off) or more")
        self.sizes = tuple(int(size) for size in sizes)
        self.ratios = tuple(float(ratio) for ratio in ratios)
        self.seed, self.batch = int(seed), int(batch)
        self.block_shards, self.bucket_batches = int(block_shards), int(bucket_batches)
        self.shuffles = [Shuffle(size) for size in self.sizes]
        if block_shards:
            self.shuffles = [BlockShuffle(sizes_, block_shards) for sizes_ in shard_sizes]
        if tuple(shuffle.size for shuffle in self.shuffles) != self.sizes:
            raise UsageError("block_shards needs the sizes of all shards of all sets")
        if bucket_batches and tuple(map(len, heads)) != self.sizes:
            raise UsageError("bucket_batches needs the number of heads of every sample")
        self._heads, self._digests = heads, [*digests] if any(digests) else []
        self._windows: OrderedDict[int, Ints] = OrderedDict()
        self._shares: OrderedDict[tuple[int, int], tuple[int, Ints]] = OrderedDict()
        self.weights = mix_weights(self.ratios)
        """Draws from each set in one period."""
        self.pattern = smooth_round_robin(self.weights)
        """(period,) set of each position of a period."""
        one_hot = self.pattern[:, None] == np.arange(len(self.sizes))
        self._before = np.vstack([np.zeros(len(self.sizes), np.int64), np.cumsum(one_hot, axis=0, dtype=np.int64)])

    @classmethod
    def of(cls, sets: Sequence[Indexed], ratios: Sequence[float], seed: int, batch: int, **options: int) -> "Plan":
        """The plan over shard sets; options: block_shards, bucket_batches."""
        sizes, shard_sizes = [len(s) for s in sets], [s.shard_sizes for s in sets]
        heads, digests = [s.n_heads for s in sets], [s.digest for s in sets]
        return cls(sizes, ratios, seed, batch, shard_sizes=shard_sizes, heads=heads, digests=digests, **options)

    def options(self) -> dict[str, Any]:
        """What Plan.of takes besides the sets."""
        options = {name: getattr(self, name) for name in ("block_shards", "bucket_batches")}
        return {"ratios": [*self.ratios], "seed": self.seed, "batch": self.batch} | options

    def batch_at(self, n: int) -> list[Slot]:
        """The B slots of global batch n, in order."""
        return self.share_at(n, 0, 1)

    def share_at(self, n: int, rank: int, size: int) -> list[Slot]:
        """`rank`'s slots of global batch n: rank_share of batch_at(n), without working out the other ranks' slots."""
        if not self.bucket_batches:
            return _slots(self._share(n, rank, size))
        window, place = divmod(n, self.bucket_batches)
        whole = range(place * self.batch, (place + 1) * self.batch)
        share = rank_share(whole, rank, size)
        return _slots(self._window(window)[:, np.array(share)])

    def _share(self, n: int, rank: int, size: int) -> Ints:
        """(4, B / size) the draws of one share.

        Who asks for one batch after the other gets more and more of them worked out at once, as numpy's calls cost what
        hundreds of samples do; who asks here and there pays for what is asked.
        """
        share = np.array(rank_share(range(self.batch), rank, size))
        first, rows = self._shares.pop((rank, size), (-_NEAR, _NOTHING))
        count = rows.shape[1] // len(share)
        if not first <= n < first + count:
            goes_on = 0 <= n - first - count < _NEAR
            count = min(2 * count, max(1, _AT_ONCE // len(share))) if goes_on else 1
            first, starts = n, np.arange(n, n + count) * self.batch
            rows = self.draws((starts[:, None] + share).ravel())
        self._shares[rank, size] = (first, rows)
        if len(self._shares) > _SHARES_KEPT:
            self._shares.popitem(last=False)
        place = (n - first) * len(share)
        return rows[:, place : place + len(share)]

    def batches(self, first: int, last: int) -> Ints:
        """(4, (last - first) · B) set, sample, epoch and position of global batches [first, last), in order."""
        if not self.bucket_batches:
            return self.draws(np.arange(first * self.batch, last * self.batch))
        whole = range(first // self.bucket_batches, -(-last // self.bucket_batches))
        before = (first - whole.start * self.bucket_batches) * self.batch
        rows = np.concatenate([self._window(window) for window in whole], axis=1)
        return rows[:, before : before + (last - first) * self.batch]

    def draws(self, positions: Sequence[int] | Ints) -> Ints:
        """(4, P) set, sample, epoch and position of the given positions of the stream, before any bucketing."""
        positions = np.asarray(positions, np.int64)
        period, phase = np.divmod(positions, len(self.pattern))
        sets = self.pattern[phase]
        draws = period * np.asarray(self.weights, np.int64)[sets] + self._before[phase, sets]
        epochs, places = np.divmod(draws, np.asarray(self.sizes, np.int64)[sets])
        samples = np.empty_like(places)
        for set_, shuffle in enumerate(self.shuffles):
            of_set = sets == set_
            for epoch in np.unique(epochs[of_set]).tolist():
                here = of_set & (epochs == epoch)
                samples[here] = shuffle.samples(places[here], (self.seed, set_, epoch))
        return np.stack([sets, samples, epochs, positions])

    def _window(self, window: int) -> Ints:
        """(4, bucket_batches · B) the draws of one window of batches, bucketed."""
        if window not in self._windows:
            count = self.bucket_batches * self.batch
            draws = self.draws(range(window * count, (window + 1) * count))
            turns = shuffled(np.arange(self.bucket_batches), self.bucket_batches, (self.seed, window, _OF_BATCHES))
            self._windows[window] = _bucketed(draws, self._heads, turns, self.batch)
            if len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        return self._windows[window]

    def epochs_at(self, n: int) -> list[float]:
        """How many epochs of each set have been drawn before global batch n."""
        period, phase = divmod(n * self.batch, len(self.pattern))
        drawn = [period * w + int(b) for w, b in zip(self.weights, self._before[phase], strict=True)]
        return [count / size for count, size in zip(drawn, self.sizes, strict=True)]

    def state(self, n: int) -> dict[str, Any]:
        """All that a resumed run needs to go on with global batch n, on any number of ranks and workers."""
        state = {"step": n, "seed": self.seed, "batch": self.batch, "sizes": [*self.sizes], "ratios": [*self.ratios]}
        options = {"block_shards": self.block_shards, "bucket_batches": self.bucket_batches, "digests": self._digests}
        return state | {name: value for name, value in options.items() if value}


def _slots(draws: Ints) -> list[Slot]:
    return [*map(Slot._make, draws.T.tolist())]


def _bucketed(draws: Ints, heads: Sequence[Sequence[int] | Ints], turns: Ints, batch: int) -> Ints:
    """`draws` (4, M·B) in another order: each set's, sorted by heads, are dealt to the batches in the order of `turns`.

    Within a batch a set's draws keep the order of their positions, so ranks' shares stay as even as chance makes them.
    """
    result = np.empty_like(draws)
    turn_of_batch = np.argsort(turns)
    turn = turn_of_batch[np.arange(draws.shape[1]) // batch]
    for set_ in np.unique(draws[0]).tolist():
        places = np.flatnonzero(draws[0] == set_)
        targets = places[np.argsort(turn[places], kind="stable")]
        n_heads = np.asarray(heads[set_])[draws[1, places]]
        dealt = places[np.argsort(n_heads, kind="stable")]
        dealt = dealt[np.lexsort((dealt, turn[targets]))]
        result[:, targets] = draws[:, dealt]
    return result


def mix_weights(ratios: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportion of `ratios`, adding up to one period of at most MAX_PERIOD positions.

    Ratios that are simple fractions are met exactly; others to 1 / MAX_PERIOD by the largest remainders.
    """
    total = sum(ratios)
    for index, ratio in enumerate(ratios):
        if not 0.0 < ratio < float("inf") or ratio * MAX_PERIOD < total:
            raise UsageError(f"ratio {ratio:g} of shard set {index}: it must be at least 1/{MAX_PERIOD} of all ratios")
    fractions = [Fraction(ratio / total).limit_denominator(MAX_PERIOD) for ratio in ratios]
    denominator = lcm(*(fraction.denominator for fraction in fractions))
    weights = [int(fraction * denominator) for fraction in fractions]
    if sum(weights) // gcd(*weights) > MAX_PERIOD:
        weights = _apportion(ratios, MAX_PERIOD)
    divisor = gcd(*weights)
    return tuple(weight // divisor for weight in weights)


def _apportion(ratios: Sequence[float], seats: int) -> list[int]:
    shares = [ratio * seats / sum(ratios) for ratio in ratios]
    weights = [max(1, int(share)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: weights[k] - shares[k])
    for k in by_remainder[: max(0, seats - sum(weights))]:
        weights[k] += 1
    return weights


@lru_cache(maxsize=64)
def smooth_round_robin(weights: tuple[int, ...]) -> Ints:
    """(period,) the set to draw from at each position, as evenly spread as can be; set k comes weights[k] times."""
    wanted = np.asarray(weights, np.int64)
    period = int(wanted.sum())
    credit = np.zeros_like(wanted)
    pattern = np.empty(period, np.int64)
    for position in range(period):
        credit += wanted
        pattern[position] = winner = int(np.argmax(credit))
        credit[winner] -= period
    pattern.setflags(write=False)
    return pattern


def is_mirrored(seed: int, position: int) -> bool:
    """Whether flip augmentation mirrors the slot at `position`: a fair coin, the same at every reading."""
    return bool(mix(seed, position, 0xF11B) & 1)


def rank_share(slots: Sequence[T], rank: int, size: int) -> Sequence[T]:
    """The contiguous part of a global batch that is `rank`'s. Raises UsageError unless the ranks divide the batch."""
    if len(slots) % size:
        near = sorted({max(1, len(slots) // size) * size, (len(slots) // size + 1) * size})
        raise UsageError(
            f"batch {len(slots)}: must be a multiple of the {size} ranks; take {' or '.join(map(str, near))}"
        )
    share = len(slots) // size
    return slots[rank * share : (rank + 1) * share]


def rank_slots(slots: Sequence[T], rank: int, size: int, micro_batch: int) -> list[Sequence[T]]:
    """`rank`'s share of a global batch, cut into micro-batches (the last may be smaller; alike on all ranks)."""
    if micro_batch < 1:
        raise UsageError(f"micro_batch {micro_batch}: at least one image is needed")
    share = rank_share(slots, rank, size)
    return [share[start : start + micro_batch] for start in range(0, len(share), micro_batch)]


def consecutive_batches(samples: int, batch: int) -> list[range]:
    """[0, samples) cut into batches of `batch` consecutive places: the fixed batches of an evaluation."""
    if batch < 1:
        raise UsageError(f"batch {batch}: at least one image is needed")
    return [range(start, min(start + batch, samples)) for start in range(0, samples, batch)]
