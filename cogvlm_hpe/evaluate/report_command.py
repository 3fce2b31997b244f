"""`cogvlm-hpe report`: result folders in; a table on screen, report.md and report.html out."""

import argparse
import sys
from pathlib import Path

from launcher.errors import UserError

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
        help="where report.md, report.html and report/ go (default: the current folder, not RUN)",
    )  # fmt: skip
    parser.add_argument(
        "--systems", type=Path, metavar="FILE",
        help="YAML, `NAME: a sentence that says what it is` for each system: shown in its row; rows come in this order",
    )  # fmt: skip
    parser.add_argument(
        "--card", type=Path, action="append", default=[], metavar="DIR",
        help="also put the scores of the judged model or adapter in DIR into its model card, DIR/README.md",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the report and the cards and show its table. Raises UserError where a folder holds no result."""
    from rich.console import Console
    from rich.table import Table

    from cogvlm_hpe.evaluate import rendering, report
    from cogvlm_hpe.evaluate.card import write_card
    from cogvlm_hpe.evaluate.results import load_results, score_table

    about = read_about(args.systems) if args.systems else {}
    results = load_results(args.runs)
    for folder in args.card:
        write_card(folder, results)
    rendering.write(report.sections(results, about), args.out)
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


def read_about(path: Path) -> dict[str, str]:
    """Sentences on systems by their names, from a YAML file. Raises UserError where it is none."""
    import yaml

    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"--systems {path}: cannot be read ({said}); give a YAML file of `NAME: sentence`") from None
    if not isinstance(about, dict) or not all(isinstance(word, str) for pair in about.items() for word in pair):
        raise UserError(f"--systems {path}: every line must be `NAME: sentence`, both text; put quotes around numbers")
    return about
