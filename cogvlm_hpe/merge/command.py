"""`cogvlm-hpe merge`: adapters and their base in, one adapter folder out."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError

if TYPE_CHECKING:
    from cogvlm_hpe.merge.writer import Merged

HELP = "merge adapters with their base: layer by layer, or by task arithmetic"
METHODS = ("layerwise", "task-arithmetic")
_LOG_WIDTH = 130
GRANULARITIES = ("projection", "module", "block")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the merge job."""
    parser.add_argument(
        "--base", type=Path, required=True, metavar="DIR", help="the model the adapters were trained on"
    )
    parser.add_argument(
        "--adapter", type=Path, required=True, action="append", metavar="DIR",
        help="adapter to merge; task-arithmetic takes several",
    )  # fmt: skip
    parser.add_argument("--method", choices=METHODS, default="layerwise", help="default: %(default)s")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument(
        "--threshold", type=float, metavar="COS",
        help="layerwise: a layer stays tuned from this cosine similarity to the original on, e.g. 0.98",
    )  # fmt: skip
    limit.add_argument(
        "--quantile", type=float, metavar="Q",
        help="layerwise: the threshold is this quantile of the similarities (default: 0.5; ours, not the paper's)",
    )  # fmt: skip
    parser.add_argument(
        "--granularity", choices=GRANULARITIES, default="projection",
        help="layerwise: what wins or loses as a whole (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--weight", type=float, action="append", metavar="W", help="task-arithmetic: one per --adapter (default: 1)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make; must not exist")


def run(args: argparse.Namespace) -> int:
    """Merge, write the folder, show the layers. Raises UserError or UsageError for the user's mistakes."""
    _check(args)
    from cogvlm_hpe.merge import writer
    from cogvlm_hpe.merge.base import Base
    from cogvlm_hpe.model.load import resolve_base

    base, adapters = Base(resolve_base(args.base)), writer.read_adapters(args.adapter)
    if args.method == "layerwise":
        merged = writer.merge_layerwise(base, adapters[0], args.threshold, args.quantile, args.granularity)
    else:
        merged = writer.merge_arithmetic(base, adapters, args.weight or [1.0] * len(adapters))
    writer.write(args.out, merged, base, adapters[0])
    _show(merged, args.out)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise UsageError(f"--out {args.out}: exists already; choose another folder or remove it")
    if args.method == "layerwise":
        if len(args.adapter) > 1:
            raise UsageError(f"--method layerwise takes one --adapter, got {len(args.adapter)}; sum them first")
        if args.weight:
            raise UsageError("--weight belongs to --method task-arithmetic; layerwise keeps or drops whole layers")
    elif args.threshold is not None or args.quantile is not None:
        raise UsageError("--threshold and --quantile belong to --method layerwise")


def _show(merged: "Merged", out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from cogvlm_hpe.merge.report import winner

    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
    if merged.choices:
        table = Table(title=f"Similarity threshold {merged.record['threshold']:.6g}")
        table.add_column("layer", overflow="fold")
        table.add_column("similarity", justify="right")
        table.add_column("winner")
        for choice in merged.choices:
            style = None if choice.tuned else "dim"
            table.add_row(choice.layer, f"{choice.similarity:.6f}", winner(choice), style=style)
        console.print(table)
        console.print(f"{merged.record['tuned']} of {merged.record['layers_total']} layers stay tuned", highlight=False)
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)
