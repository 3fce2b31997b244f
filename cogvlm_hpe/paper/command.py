"""`cogvlm-hpe paper`: every system of the paper as a row, at laptop size, over several seeds."""

import argparse
from dataclasses import asdict
from pathlib import Path

from cogvlm_hpe import stages
from cogvlm_hpe.paper import plan as rows
from cogvlm_hpe.paper import sweeps
from launcher.errors import EXIT_STOPPED

HELP = "the paper's comparison at laptop size: every system a row, several seeds, sweeps"
EPILOG = """Takes hours: about 50 minutes a seed on two cores, and an hour for the sweeps. It can be stopped at any
moment; the same command goes on. More seeds may be asked for later. Each stage is a command of this project, and is
shown as it starts.

    DIR/report.html         all systems on all test sets
    DIR/sweeps/report.html  one thing of LoRA's training changed at a time
    DIR/results.md          the paper's claims one by one, with what the numbers say of each"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the comparison."""
    add = parser.add_argument
    add("--dir", type=Path, default=Path("runs/paper"), help="where it goes (default: %(default)s)")
    add("--nproc", type=int, default=2, metavar="N", help="ranks (default: %(default)s)")
    add("--seeds", type=_seeds, default=[1, 2, 3], metavar="N,N,…", help="of training (default: 1,2,3)")
    add("--no-sweeps", action="store_true", help="leave out the sweeps")
    add(
        "--results",
        type=Path,
        metavar="FILE",
        help="where results.md goes, pictures beside it (default: DIR/results.md)",
    )
    add("--quick", action="store_true", help="tiny sizes: whether it runs, not whether it learns")


def _seeds(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"{text!r}: write different whole numbers from 1 up with commas between them")
    return sorted(map(int, words))


def run(args: argparse.Namespace) -> int:
    """Run the stages that are not finished, then write what they say. Raises UserError where one fails."""
    sizes = rows.QUICK if args.quick else rows.Sizes()
    stages.keep_settings(args.dir / "paper.json", {"sizes": asdict(sizes), "nproc": args.nproc})
    chain = rows.plan(args.dir, sizes, args.seeds, args.nproc)
    if not args.no_sweeps:
        chain += sweeps.plan(args.dir, sizes, args.nproc)
    code = stages.run_all(chain, args.dir)
    if code == EXIT_STOPPED:
        return code
    from cogvlm_hpe.paper.results import write

    out = args.results or args.dir / "results.md"
    write(out, args.dir, sizes, args.seeds)
    print(f"wrote {out}")
    return 0
