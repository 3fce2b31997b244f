"""hpe-shards order and simulate: what a plan delivers, read by real processes or computed for any number of them."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError

if TYPE_CHECKING:
    from shards.plan import Plan
    from shards.simulate import Outcome

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_IMAGINED_SHARD = 1000


def add_order(commands: "Commands") -> None:
    """`hpe-shards order`."""
    text = (
        "Print the keys of global batches, one line a batch, read by W ranks with K worker processes each as in "
        "training (images are not decoded). The lines do not depend on W and K."
    )
    command = commands.add_parser("order", help="which samples come when", description=text)
    command.add_argument("sets", nargs="+", metavar="DIR[:RATIO]", help="shard sets and their shares of the mix (1)")
    _add_plan_options(command)
    command.add_argument("--from", type=int, default=0, dest="start", metavar="N", help="first batch (default: 0)")
    command.add_argument("--count", type=int, default=10, metavar="C", help="how many batches (default: 10)")
    command.set_defaults(run=_order)


def add_simulate(commands: "Commands") -> None:
    """`hpe-shards simulate`."""
    text = (
        "Compute, without starting a process, what W ranks with K workers each read in one epoch of the largest set: "
        "whether each sample comes exactly once, how evenly ranks and workers are loaded, how well samples are mixed, "
        "and what the loss of a node and going on with other ranks does. Exits with 1 if an epoch is not exact. "
        "A hundred million samples take a minute and a byte of memory each."
    )
    command = commands.add_parser("simulate", help="a plan on any number of ranks", description=text)
    sets = "shard sets and their shares of the mix, or numbers of samples to imagine a set of"
    command.add_argument("sets", nargs="+", metavar="DIR|SAMPLES[:RATIO]", help=sets)
    _add_plan_options(command)
    command.add_argument(
        "--lose-at", type=int, metavar="STEP", help="stop before this step and go on from a checkpoint"
    )
    command.add_argument("--world-after", type=int, metavar="W", help="ranks from then on (default: as before)")
    command.add_argument("--save-every", type=int, default=200, metavar="N", help="steps between checkpoints (200)")
    command.set_defaults(run=_simulate)


def _add_plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the shuffle (default: 0)")
    command.add_argument("--batch", type=int, default=16, metavar="B", help="images in a global batch (default: 16)")
    blocks = "shuffle within blocks of so many shards, for slow disks and remote sets (default: 0, a full shuffle)"
    command.add_argument("--block-shards", type=int, default=0, metavar="G", help=blocks)
    buckets = "within every so many batches bring images of as many heads together (default: 0, off)"
    command.add_argument("--bucket-batches", type=int, default=0, metavar="M", help=buckets)
    command.add_argument("--world", type=int, default=1, metavar="W", help="ranks (default: 1)")
    command.add_argument("--workers", type=int, default=0, metavar="K", help="reader processes a rank (default: 0)")


def _check_least(options: argparse.Namespace, least: dict[str, int]) -> None:
    for name, value in least.items():
        found = getattr(options, name)
        if found is not None and found < value:
            flag = "from" if name == "start" else name.replace("_", "-")
            raise UsageError(f"--{flag} {found}: must be at least {value}")


def _order(options: argparse.Namespace) -> int:
    from launcher.comm import mpi
    from shards.index import open_set
    from shards.plan import Plan
    from shards.stream import Stream

    _check_least(options, {"start": 0, "count": 0, "world": 1, "workers": 0})
    if mpi().rank:
        return 0
    paths, ratios = zip(*map(set_and_ratio, options.sets), strict=True)
    sets = [open_set(path) for path in paths]
    plan = Plan.of(sets, ratios, options.seed, options.batch, **_plan_options(options))
    ranks = range(options.world)
    streams = [Stream(sets, plan, r, options.world, None, options.start, options.workers) for r in ranks]
    for _, *shares in zip(range(options.count), *streams, strict=False):
        print(" ".join(item.key for _, items in shares for item in items))
    return 0


def _plan_options(options: argparse.Namespace) -> dict[str, int]:
    return {"block_shards": options.block_shards, "bucket_batches": options.bucket_batches}


class _Imagined:
    """A set of so many samples that is nowhere, in shards of a thousand."""

    digest = ""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    @property
    def shard_sizes(self) -> list[int]:
        whole, rest = divmod(self._samples, _IMAGINED_SHARD)
        return [_IMAGINED_SHARD] * whole + [rest] * (rest > 0)

    @property
    def n_heads(self) -> Any:
        import numpy as np

        return np.ones(self._samples, np.int8)


def _simulate(options: argparse.Namespace) -> int:
    from launcher.comm import mpi
    from shards.index import open_set
    from shards.plan import Plan
    from shards.simulate import Start, after_a_loss, simulate

    _check_least(options, {"world": 1, "workers": 0, "world_after": 1, "save_every": 1})
    if mpi().rank:
        return 0
    paths, ratios = zip(*map(set_and_ratio, options.sets), strict=True)
    sets: list[Any] = [_Imagined(int(str(path))) if _is_number(path) else open_set(path) for path in paths]
    plan = Plan.of(sets, ratios, options.seed, options.batch, **_plan_options(options))
    steps = _steps_of_an_epoch(plan)
    starts = [Start(0, steps, options.world, options.workers)]
    if options.lose_at is not None:
        after = options.world_after or options.world
        starts = after_a_loss(steps, options.world, options.workers, options.lose_at, after, options.save_every)
    heads = None if any(_is_number(path) for path in paths) else [shard_set.n_heads for shard_set in sets]
    outcome = simulate(plan, starts, heads)
    _say_outcome(plan, starts, outcome)
    return 1 if outcome.problems else 0


def _steps_of_an_epoch(plan: "Plan") -> int:
    """Batches until the largest set has been drawn once, in whole windows: a bucketed one is exact at its end only."""
    size, weight = max(zip(plan.sizes, plan.weights, strict=True))
    window = max(1, plan.bucket_batches)
    return -(-size * sum(plan.weights) // (weight * plan.batch * window)) * window


def _say_outcome(plan: "Plan", starts: "Sequence[Any]", outcome: "Outcome") -> None:
    from shards.shuffle import quality

    print(
        f"{sum(plan.sizes):,} samples, batches of {plan.batch:,}: {outcome.steps:,} steps an epoch of the largest set"
    )
    for k, start in enumerate(starts):
        images, batches = outcome.images_a_rank[k], outcome.batches_a_worker[k]
        heads = f"; heads of the fullest rank {outcome.heads_a_rank[k]:.2f} x the mean" if outcome.heads_a_rank else ""
        print(
            f"start {k + 1}: steps {start.first:,} to {start.last:,} on {start.world} ranks x {start.workers} workers: "
            f"{_span(images)} images a rank and step, {_span(batches)} batches a worker{heads}"
        )
    if outcome.repeated_steps:
        print(f"lost with the node and done again, with the same samples: {outcome.repeated_steps} steps")
    for set_, (drawn, shuffle) in enumerate(zip(outcome.epochs, plan.shuffles, strict=True)):
        told = ", ".join(f"epoch {epoch}: {count:,} of {shuffle.size:,}" for epoch, count in enumerate(drawn))
        print(f"set {set_}: {told}; {quality(shuffle, (plan.seed, set_, 0))}")
    for problem in outcome.problems:
        print(problem)
    print("no sample came twice or was left out" if not outcome.problems else "the epochs are NOT exact")


def _span(span: tuple[int, int]) -> str:
    return f"{span[0]:,}" if span[0] == span[1] else f"{span[0]:,} to {span[1]:,}"


def _is_number(path: Any) -> bool:
    return str(path).isdigit() and not Path(path).exists()


def set_and_ratio(text: str) -> tuple[str | Path, float]:
    """`DIR` or `DIR:RATIO`, or a URL in place of DIR, to place and ratio (1 if none is given). Raises UsageError."""
    from shards.remote import as_url

    path, colon, ratio = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    if re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", text):
        # In http://host:8000/set and pipe:cat the last colon is not that of a ratio.
        is_ratio = re.fullmatch(r"[0-9.eE+-]+", ratio) and re.match(r"pipe:.|\w[\w+.-]*://[^/]*/", path)
        place = as_url(path if is_ratio else text)
        return place or Path(text), float(ratio) if is_ratio else 1.0
    try:
        return Path(path), float(ratio)
    except ValueError:
        raise UsageError(f"{text!r}: expected DIR or DIR:RATIO with a number") from None
