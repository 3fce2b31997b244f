"""What a plan does on any number of ranks, computed without starting one: who reads what, how evenly, how often.

Every sample of every global batch is drawn by the plan itself and dealt by the same rules as in training, also over a
lost node and a changed number of ranks. 10^8 samples take tens of seconds and a byte of memory each.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from launcher.errors import UsageError
from shards.plan import Plan, rank_share
from shards.shuffle import Ints

_CHUNK = 1 << 18  # samples worked on at a time


@dataclass(frozen=True)
class Start:
    """One start of a job: from step `first` until it ends before step `last`, on `world` ranks of `workers` readers."""

    first: int
    last: int
    world: int
    workers: int


@dataclass(frozen=True)
class Outcome:
    """What reached the weights, over all starts of a job."""

    steps: int
    repeated_steps: int
    """Done before a stop, lost with it, and done again."""
    images_a_rank: list[tuple[int, int]]
    """Fewest and most images a rank reads for one step, for each start."""
    batches_a_worker: list[tuple[int, int]]
    """Fewest and most batches that one reader process makes, for each start."""
    epochs: list[list[int]]
    """Samples drawn in each epoch of each set; all but the last are whole."""
    problems: list[str] = field(default_factory=list)
    """Samples that came twice or never; none: every epoch is exact."""
    heads_a_rank: list[float] = field(default_factory=list)
    """For each start, how many times the mean the most loaded rank's heads are, on average over steps; if known."""


def after_a_loss(steps: int, world: int, workers: int, lose_at: int, world_after: int, save_every: int) -> list[Start]:
    """The starts of a job of so many steps that loses a node before step `lose_at` and goes on with fewer ranks.

    It goes on from its last checkpoint: what came after is done again. Raises UsageError for steps out of order.
    """
    if not 0 < lose_at < steps or save_every < 1:
        raise UsageError(f"a loss at step {lose_at} of {steps}, saved every {save_every}: it must lie within the job")
    return [Start(0, lose_at, world, workers), Start(lose_at // save_every * save_every, steps, world_after, workers)]


def simulate(plan: Plan, starts: Sequence[Start], heads: Sequence[Sequence[int] | Ints] | None = None) -> Outcome:
    """Play `starts` in turn; a start's steps count up to where the next one begins.

    heads: of every sample of every set. Raises UsageError where the ranks of a start do not divide the batch, or where
    a start leaves steps out.
    """
    seen = _Seen(plan)
    images, batches, loads = [], [], []
    repeated = 0
    for k, start in enumerate(starts):
        until = starts[k + 1].first if k + 1 < len(starts) else start.last
        if not start.first <= until <= start.last or (k == 0 and start.first):
            raise UsageError(f"start {k} does steps {start.first} to {start.last}, the next begins at {until}: a gap")
        repeated += start.last - until
        shares = [np.array(rank_share(range(plan.batch), rank, start.world)) for rank in range(start.world)]
        sizes = [len(share) for share in shares]
        images.append((min(sizes), max(sizes)))
        turns = np.bincount(
            np.arange(start.last - start.first) % max(1, start.workers), minlength=max(1, start.workers)
        )
        batches.append((int(turns.min()), int(turns.max())))
        loads.append(_play(plan, range(start.first, until), np.stack(shares), seen, heads))
    known = [load for load in loads if load is not None]
    return Outcome(starts[-1].last, repeated, images, batches, seen.epochs(), seen.problems(), known)


def _play(
    plan: Plan, steps: range, shares: Ints, seen: "_Seen", heads: Sequence[Sequence[int] | Ints] | None
) -> float | None:
    """Deal the global batches of `steps` by `shares` (W, B / W places of a batch); the mean overload, if known."""
    at_once = max(1, _CHUNK // plan.batch)
    overloads = []
    for first in range(steps.start, steps.stop, at_once):
        last = min(first + at_once, steps.stop)
        drawn = plan.batches(first, last).reshape(4, last - first, plan.batch)
        dealt = drawn[:, :, shares]  # (4, steps, W, B / W)
        seen.add(dealt.reshape(4, -1))
        if heads is not None:
            of_rank = _heads(dealt, heads).sum(axis=2)
            overloads.append(of_rank.max(axis=1) / np.maximum(of_rank.mean(axis=1), 1e-9))
    return float(np.concatenate(overloads).mean()) if overloads else None


def _heads(dealt: Ints, heads: Sequence[Sequence[int] | Ints]) -> Ints:
    found = np.zeros(dealt.shape[1:], np.int64)
    for set_, of_samples in enumerate(heads):
        here = dealt[0] == set_
        found[here] = np.asarray(of_samples)[dealt[1][here]]
    return found


class _Seen:
    """Which samples have come, in each epoch of each set: a byte a sample, for the epochs that are not whole."""

    def __init__(self, plan: Plan) -> None:
        self._sizes = plan.sizes
        self._flags: dict[tuple[int, int], np.ndarray] = {}
        self._drawn: Counter[tuple[int, int]] = Counter()
        self._bad: list[str] = []

    def add(self, draws: Ints) -> None:
        """(4, n) set, sample, epoch, position."""
        for set_ in np.unique(draws[0]).tolist():
            of_set = draws[:, draws[0] == set_]
            for epoch in np.unique(of_set[2]).tolist():
                samples = of_set[1, of_set[2] == epoch]
                name = (set_, epoch)
                self._flags.setdefault(name, np.zeros(self._sizes[set_], bool))[samples] = True
                self._drawn[name] += len(samples)
                if self._drawn[name] >= self._sizes[set_]:
                    self._close(name)

    def _close(self, name: tuple[int, int]) -> None:
        distinct, drawn, (set_, epoch) = int(self._flags.pop(name).sum()), self._drawn[name], name
        if distinct < drawn:
            self._bad.append(f"set {set_}, epoch {epoch}: of {drawn:,} draws {drawn - distinct:,} came before")

    def epochs(self) -> list[list[int]]:
        """Draws by set and epoch."""
        return [
            [count for (of, _), count in sorted(self._drawn.items()) if of == set_] for set_ in range(len(self._sizes))
        ]

    def problems(self) -> list[str]:
        """What came twice or never."""
        for name in sorted(self._flags):
            self._close(name)
        for set_, drawn in enumerate(self.epochs()):
            for epoch, count in enumerate(drawn[:-1]):
                if count != self._sizes[set_]:
                    self._bad.append(f"set {set_}, epoch {epoch}: {count:,} draws of {self._sizes[set_]:,} samples")
        return self._bad
