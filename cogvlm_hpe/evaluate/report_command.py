"""`cogvlm-hpe report`: result folders in; a table on screen, report.md and report.html out."""

import argparse
import sys
from pathlib import Path

HELP = "compare results: tables, curves and pictures, as Markdown and HTML"
_LOG_WIDTH = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the report."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN",
        help="result folder of `cogvlm-hpe evaluate`, or a folder with several below it; the order given is kept",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR",
        help="where report.md, report.html and report/ go (default: here)",
    )  # fmt: skip
    parser.add_argument(
        "--card", type=Path, action="append", default=[], metavar="DIR",
        help="also put the scores of the judged model or adapter in DIR into its model card, DIR/README.md",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the report and the cards and show its table. Raises UserError where a folder holds no result."""
    from rich.console import Console
    from rich.table import Table

    from cogvlm_hpe.evaluate import report
    from cogvlm_hpe.evaluate.card import write_card
    from cogvlm_hpe.evaluate.results import load_results, score_table

    results = load_results(args.runs)
    for folder in args.card:
        write_card(folder, results)
    report.write(report.sections(results), args.out)
    # A pipe or a log file has no width of its own, and the numbers should not be broken there.
    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
    headings, rows = score_table(results)
    for name in dict.fromkeys(row[0] for row in rows):
        table = Table(title=f"{name}: errors in degrees, 95 % intervals in brackets")
        for heading in headings[1:]:
            table.add_column(heading, justify="left" if heading == "system" else "right", overflow="fold")
        for row in rows:
            if row[0] == name:
                table.add_row(*(cell.replace(" [", "\n[").replace(" (", "\n(") for cell in row[1:]))
        console.print(table)
    console.print(f"wrote {args.out / 'report.md'} and {args.out / 'report.html'}", highlight=False, soft_wrap=True)
    return 0
