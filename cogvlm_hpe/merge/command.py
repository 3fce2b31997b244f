"""`cogvlm-hpe merge`: adapters and their base in; an adapter, several candidates or whole weights out."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cogvlm_hpe.merge import settings as known
from cogvlm_hpe.merge.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from cogvlm_hpe.merge.methods import Merged

HELP = "merge adapters with their base: layer by layer, by task arithmetic, TIES, DARE, …"
DETAILS = """
methods, exact on the factors (any --output):
  layerwise        per layer the tuned weight or the original one, whole (HPE-CogVLM); of two adapters one or the other
  linear           weighted average       task-arithmetic  weighted sum
  cat              sum of adapters        slerp            spherical interpolation between two adapters, at --t
methods on single elements, with --density (--output hf or sat, or --rank N for the nearest adapter):
  ties, dare-linear, dare-ties, magnitude-prune, breadcrumbs

Under mpirun the layers that are compared or brought to a low rank and the files of --output hf and sat are shared out
over the ranks. Interrupted, hf and sat go on where they were when the same command is given again. A YAML file given as
--config holds the same keys with _ for -; flags win. One to copy and edit: cogvlm_hpe/configs/merge.yaml.
"""
_LOG_WIDTH = 130
_WORST_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the merge job; all of them may come from the YAML file instead, so none has a default here."""
    parser.epilog = DETAILS
    default = known.DEFAULTS

    def add(flag: str, help_text: str, **more: object) -> None:
        parser.add_argument(flag, help=help_text, **more)  # type: ignore[arg-type]

    add("--config", "YAML file with any of the keys below", type=Path, metavar="FILE")
    add("--base", "the model the adapters were trained on", metavar="DIR")
    add("--adapter", "adapter to merge; repeat for several", type=Path, action="append", metavar="DIR")
    add("--out", "folder to make; must not exist", type=Path, metavar="DIR")
    add("--method", f"see below (default: {default.method})", choices=known.METHODS)
    add("--weight", "one per --adapter (default: 1)", type=float, action="append", metavar="W")
    add(
        "--layer-weight",
        "multiplies the weights in layers whose name fits, e.g. '*.layers.3.*=0.5'; W1,W2 for each adapter; "
        "the last that fits counts",
        action="append", metavar="PATTERN=W",
    )  # fmt: skip
    _add_layerwise(parser)
    add("--t", f"slerp: 0 is the first adapter, 1 the second (default: {default.t})", type=float)
    add(
        "--density", "share of each layer's elements that stays; needed by methods on single elements",
        type=float, metavar="D",
    )  # fmt: skip
    add("--gamma", f"breadcrumbs: share of largest elements that goes (default: {default.gamma})", type=float)
    add("--seed", f"dare: which elements are dropped (default: {default.seed})", type=int, metavar="N")
    add("--rank", "nearest adapter of this rank, what it loses is reported", type=int, metavar="N")
    add("--output", f"adapter, or whole weights (default: {default.output})", choices=known.OUTPUTS)
    add("--mp", "sat: split over N model-parallel files (default: 1)", type=int, metavar="N")
    add("--max-shard-gb", f"hf: size of a file (default: {default.max_shard_gb:g})", type=float, metavar="GB")
    add(
        "--every-token", "write weights of an adapter that works on text tokens only; what it changes is measured",
        action="store_true", default=None,
    )  # fmt: skip


def _add_layerwise(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("layerwise")
    add = group.add_argument
    add(
        "--threshold", type=float, metavar="COS", help="cosine similarity that decides; it belongs to the kept side"
    )  # fmt: skip
    add(
        "--quantile", type=float, metavar="Q",
        help="the threshold is this quantile of the similarities (default: 0.5; ours, not the paper's)",
    )  # fmt: skip
    add(
        "--keep", choices=known.KEEPS,
        help="side of the threshold where layers stay tuned (default: above, the paper's 'high threshold')",
    )  # fmt: skip
    add("--granularity", choices=known.GRANULARITIES, help="what wins or loses as a whole (default: projection)")
    add("--sweep", type=_numbers, metavar="Q,Q,…", help="a candidate for each quantile, as OUT/quantile-Q")
    add("--sweep-thresholds", type=_numbers, metavar="C,C,…", help="a candidate for each threshold")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers with commas between them, e.g. 0.3,0.5") from None


def run(args: argparse.Namespace) -> int:
    """Merge, write the folder, show the layers. Raises UserError or UsageError for the user's mistakes."""
    settings = read_settings(args)
    known.check(settings)
    from cogvlm_hpe.merge import writer
    from launcher import comm

    world = comm.mpi()
    job = writer.prepare(settings, world)
    written = writer.write(job, world)
    if world.rank == 0:
        _show(settings, written)
    return 0


def read_settings(args: argparse.Namespace) -> Settings:
    """The YAML file's keys, and over them the flags that were given. Raises UserError or UsageError."""
    file = known.read_yaml(args.config) if args.config else {}
    given = {key: value for key, value in vars(args).items() if value is not None and key != "config"}
    return known.from_mapping(file | given, str(args.config) if args.config else "merge")


def _show(settings: Settings, written: "list[tuple[str, Merged, dict[str, float]]]") -> None:
    from rich.console import Console

    from cogvlm_hpe.merge.layerwise import DIGITS

    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
    for name, merged, losses in written:
        if settings.sweeps:
            record = merged.record
            stay = f"{record['tuned']} of {record['layers_total']} layers tuned"
            console.print(f"{name}: threshold {record['threshold']:{DIGITS}}, {stay}", highlight=False)
        elif merged.choices:
            _show_choices(console, merged)
        if losses:
            _show_losses(console, losses, "rounding" if settings.output != "adapter" else "the low rank")
    console.print(f"wrote {settings.out}", highlight=False, soft_wrap=True)


def _show_choices(console: "Console", merged: "Merged") -> None:
    from rich.table import Table

    from cogvlm_hpe.merge.layerwise import DIGITS
    from cogvlm_hpe.merge.report import winner

    table = Table(title=f"Similarity threshold {merged.record['threshold']:{DIGITS}}, keep {merged.record['keep']}")
    table.add_column("layer", overflow="fold")
    table.add_column("similarity", justify="right")
    table.add_column("winner")
    for choice in merged.choices:
        style = None if choice.tuned else "dim"
        table.add_row(choice.layer, f"{choice.similarity:{DIGITS}}", winner(choice), style=style)
    console.print(table)
    console.print(f"{merged.record['tuned']} of {merged.record['layers_total']} layers stay tuned", highlight=False)


def _show_losses(console: "Console", losses: dict[str, float], what: str) -> None:
    worst = sorted(losses, key=lambda layer: -losses[layer])[:_WORST_SHOWN]
    console.print(f"share of the change lost by {what}, the worst of {len(losses)} layers:", highlight=False)
    for layer in worst:
        console.print(f"  {losses[layer]:7.2%}  {layer}", highlight=False, soft_wrap=True)
