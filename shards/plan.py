"""Which sample comes when: pure functions of (sizes, ratios, seed, batch, n), the same on every rank and machine.

The stream of all samples is one endless row of positions 0, 1, 2, …; global batch n is the positions [n·B, (n+1)·B).
A repeating pattern says which set a position draws from, so every period of it has the exact ratios; the j-th draw
from a set of S samples is number j mod S of its epoch j // S. Each epoch of each set is shuffled afresh by a keyed
permutation that is computed, not stored: a plan over 10^8 samples costs no more memory than one over ten, and any batch
can be asked for directly. Only whole numbers and mixing of our own are used: library versions cannot change the order.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, isqrt, lcm
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from launcher.errors import UsageError

T = TypeVar("T")
Ints = NDArray[np.int64]

MAX_PERIOD = 10_000
_ROUNDS = 8
_MASK = (1 << 64) - 1


class Slot(NamedTuple):
    """One place in the stream: `sample` of `set`, drawn in that set's `epoch`; `position` counts all sets together."""

    set: int
    sample: int
    epoch: int
    position: int


class Plan:
    """The order of samples. `ratios` need not add up to 1; they are kept to within 1e-4 and exactly in each period.

    Raises UsageError where a set is empty, a ratio is not positive (or below 1e-4 of all) or the batch is below 1.
    """

    def __init__(self, sizes: Sequence[int], ratios: Sequence[float], seed: int, batch: int) -> None:
        if not sizes or len(sizes) != len(ratios):
            raise UsageError(
                f"{len(sizes)} shard sets with {len(ratios)} ratios: name at least one set, one ratio each"
            )
        for index, size in enumerate(sizes):
            if size < 1:
                raise UsageError(f"shard set {index} has no samples; leave it out of the mix")
        if batch < 1:
            raise UsageError(f"batch {batch}: at least one image is needed")
        self.sizes = tuple(int(size) for size in sizes)
        self.ratios = tuple(float(ratio) for ratio in ratios)
        self.seed, self.batch = int(seed), int(batch)
        self.weights = mix_weights(self.ratios)
        """Draws from each set in one period."""
        self.pattern = smooth_round_robin(self.weights)
        """(period,) set of each position of a period."""
        one_hot = self.pattern[:, None] == np.arange(len(self.sizes))
        self._before = np.vstack([np.zeros(len(self.sizes), np.int64), np.cumsum(one_hot, axis=0, dtype=np.int64)])

    def batch_at(self, n: int) -> list[Slot]:
        """The B slots of global batch n, in order."""
        return self.slots(range(n * self.batch, (n + 1) * self.batch))

    def share_at(self, n: int, rank: int, size: int) -> list[Slot]:
        """`rank`'s slots of global batch n: rank_share of batch_at(n), without working out the other ranks' slots."""
        return self.slots(rank_share(range(n * self.batch, (n + 1) * self.batch), rank, size))

    def slots(self, row: Sequence[int]) -> list[Slot]:
        """The slots at the given positions of the stream."""
        positions = np.asarray(row, np.int64)
        period, phase = np.divmod(positions, len(self.pattern))
        sets = self.pattern[phase]
        draws = period * np.asarray(self.weights, np.int64)[sets] + self._before[phase, sets]
        epochs, places = np.divmod(draws, np.asarray(self.sizes, np.int64)[sets])
        samples = np.empty_like(places)
        for set_, epoch in {(int(s), int(e)) for s, e in zip(sets, epochs, strict=True)}:
            here = (sets == set_) & (epochs == epoch)
            samples[here] = shuffled(places[here], self.sizes[set_], (self.seed, set_, epoch))
        return [Slot(*row) for row in np.stack([sets, samples, epochs, positions], axis=1).tolist()]

    def epochs_at(self, n: int) -> list[float]:
        """How many epochs of each set have been drawn before global batch n."""
        period, phase = divmod(n * self.batch, len(self.pattern))
        drawn = [period * w + int(b) for w, b in zip(self.weights, self._before[phase], strict=True)]
        return [count / size for count, size in zip(drawn, self.sizes, strict=True)]

    def state(self, n: int) -> dict[str, Any]:
        """All that a resumed run needs to go on with global batch n, on any number of ranks and workers."""
        return {"step": n, "seed": self.seed, "batch": self.batch, "sizes": [*self.sizes], "ratios": [*self.ratios]}


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


def shuffled(places: Ints, size: int, key: Sequence[int]) -> Ints:
    """Where `places` of [0, size) stand after a shuffle keyed by `key`: one permutation of [0, size) for each key.

    A Feistel network over [0, a) x [0, b), a·b just above `size`; values beyond `size` walk on until they fall within.
    """
    wide = isqrt(size - 1) + 1
    tall = -(-size // wide)
    base = mix(*key)
    keys = [mix(base, turn) for turn in range(_ROUNDS)]
    result = np.array(places, np.int64)
    todo = np.ones(result.shape, bool)
    while todo.any():
        result[todo] = _feistel(result[todo], wide, tall, keys)
        todo = result >= size
    return result


def _feistel(values: Ints, wide: int, tall: int, keys: Sequence[int]) -> Ints:
    left, right = np.divmod(values.astype(np.uint64), np.uint64(tall))
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix_array(right, first) % np.uint64(wide)) % np.uint64(wide)
        right = (right + _mix_array(left, second) % np.uint64(tall)) % np.uint64(tall)
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


def _mix_array(values: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    state = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


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
