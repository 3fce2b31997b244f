"""hpe-shards: make and judge shard sets."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError, run_main

if TYPE_CHECKING:
    from launcher.comm import Comm
    from shards.index import ShardSet

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

PROGRAM = "hpe-shards"
_MOST_FINDINGS = 50
_EXAMPLES = """examples:
  hpe-shards build synthetic --domain A --scenes 2000 --split train --out data/a-train
  mpirun -np 8 hpe-shards build synthetic --domain B --scenes 200 --split test --out data/b-test
  hpe-shards verify data/a-train data/b-test     also finds subjects that both share
  hpe-shards preview data/a-train --count 12 --out a-train.png
  hpe-shards order data/a-train:0.9 data/b-train:0.1 --seed 1 --batch 64 --from 100 --count 2

Under mpirun or srun, build and verify share the work over the ranks; the result does not depend on their number.
Exit codes: 0 done, 1 failure or findings, 2 a command line that cannot be meant."""


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code; argparse itself exits with 0 (help, version) or 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        options = _parser().parse_args(arguments)
        code: int = options.run(options)
        return code

    return run_main(PROGRAM, run)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    text = "Make and judge shard sets: folders of WebDataset tars with an index."
    parser = argparse.ArgumentParser(PROGRAM, description=text, epilog=_EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_build(commands)
    _add_verify(commands)
    _add_info(commands)
    _add_preview(commands)
    _add_order(commands)
    _add_fixture(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("cogvlm-hpe")
        except PackageNotFoundError:
            number = "(not installed)"
        print(f"{PROGRAM} {number}")
        parser.exit()


def _add_build(commands: "Commands") -> None:
    from shards.sources import SOURCES

    text = "Write a data set as shards. The folder is complete or not there; a build that was stopped goes on."
    command = commands.add_parser("build", help="write a data set as shards", description=text)
    sources = command.add_subparsers(metavar="SOURCE", required=True)
    for name, (add_arguments, make) in SOURCES.items():
        source = sources.add_parser(name, help=(make.__doc__ or "").split("\n")[0], description=make.__doc__)
        add_arguments(source)
        common = source.add_argument_group("the shard set")
        common.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the set")
        common.add_argument("--name", help="start of the tars' names (default: the source's name)")
        at_most = "at most; the default is 1000, fewer for small sets"
        common.add_argument("--samples-per-shard", type=int, metavar="N", help=at_most)
        common.add_argument("--max-shard-mb", type=float, metavar="MB", help="million bytes of a tar, at most")
        spread = "spread subjects and sequences over all shards, in an order of this seed (default: the source's order)"
        common.add_argument("--shuffle", type=int, metavar="SEED", help=spread)
        common.add_argument("--reencode-jpeg", type=int, metavar="Q", help="store every image as JPEG of this quality")
        smaller = "make images with a longer side smaller, with boxes and camera (default: images are kept as they are)"
        common.add_argument("--max-side", type=int, metavar="PX", help=smaller)
        source.set_defaults(run=_build, make=make)


def _build(options: argparse.Namespace) -> int:
    from launcher import comm
    from shards.derive import Reencoded, Shuffled
    from shards.write import build

    source = options.make(options)
    if options.reencode_jpeg is not None or options.max_side is not None:
        source = Reencoded(source, options.reencode_jpeg, options.max_side)
    if options.shuffle is not None:
        source = Shuffled(source, options.shuffle)
    build(source, options.out, comm.mpi(), options.samples_per_shard, options.name, options.max_shard_mb)
    return 0


def _add_verify(commands: "Commands") -> None:
    text = (
        "Check hashes, members, keys, images, records, boxes and poses, and that sets of different splits share no "
        "subject. Prints one line a finding and exits with 1 if there is any."
    )
    command = commands.add_parser("verify", help="check every byte of shard sets", description=text)
    command.add_argument("sets", nargs="+", type=Path, metavar="DIR", help="shard sets; several: also against leaks")
    command.add_argument("--fast", action="store_true", help="the index and the sizes of the tars only")
    command.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from launcher.comm import mpi
    from shards.verify import verify

    comm = mpi()
    findings = verify(options.sets, comm, options.fast)
    if comm.rank == 0:
        _say_findings(options.sets, findings, "index" if options.fast else "every byte")
    return 1 if findings else 0


def _say_findings(paths: Sequence[Path], findings: Sequence[str], what: str) -> None:
    for finding in findings[:_MOST_FINDINGS]:
        print(finding)
    if len(findings) > _MOST_FINDINGS:
        print(f"… and {len(findings) - _MOST_FINDINGS} more")
    names = ", ".join(map(str, paths))
    print(f"{names}: {len(findings)} findings" if findings else f"{names}: good ({what} checked)")


def _add_info(commands: "Commands") -> None:
    text = "Print where a shard set comes from, how much is in it, and how its head poses spread."
    command = commands.add_parser("info", help="what is in a shard set", description=text)
    command.add_argument("set", type=Path, metavar="DIR")
    command.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> int:
    from shards.index import open_set

    comm = _first_rank()
    if comm is not None:
        _print_info(open_set(options.set))
    return 0


def _first_rank() -> "Comm | None":
    """For commands that one rank does: None on the others."""
    from launcher.comm import mpi

    comm = mpi()
    return comm if comm.rank == 0 else None


def _print_info(shard_set: "ShardSet") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    info = shard_set.info
    rows = {key: str(info[key]) for key in ("name", "source", "licence", "split", "convention")}
    rows["scope"] = ", ".join(f"{key} {value}" for key, value in info["scope"].items())
    rows |= {key: f"{number:,}" for key, number in info["counts"].items()}
    console = Console(highlight=False)
    facts = Table(title=str(shard_set.path), show_header=False)
    for key, value in rows.items():
        facts.add_row(key, escape(value))
    console.print(facts)
    yaw = info["poses"]["yaw"]
    table = Table("yaw, deg", "heads", "", title="heads by yaw")
    most = max(1, *yaw["heads"])
    for k, heads in enumerate(yaw["heads"]):
        low = yaw["lowest_deg"] + k * yaw["bin_deg"]
        table.add_row(f"{low:4d} … {low + yaw['bin_deg']:4d}", str(heads), "█" * round(30 * heads / most))
    console.print(table)


def _add_preview(commands: "Commands") -> None:
    text = "Write a contact sheet: boxes, pose axes, yaw pitch roll, expressions. Small images are enlarged."
    command = commands.add_parser("preview", help="a picture of some samples", description=text)
    command.add_argument("set", type=Path, metavar="DIR")
    command.add_argument("--count", type=int, default=24, metavar="N", help="samples, spread evenly (default: 24)")
    command.add_argument("--out", type=Path, metavar="FILE", help="PNG to write (default: DIR's name + -preview.png)")
    command.set_defaults(run=_preview)


def _preview(options: argparse.Namespace) -> int:
    from shards.draw import preview
    from shards.index import open_set

    if options.count < 1:
        raise UsageError(f"--count {options.count}: at least one sample is needed")
    if _first_rank() is not None:
        out = options.out or Path(f"{options.set.resolve().name}-preview.png")
        shown = preview(open_set(options.set), options.count, out)
        print(f"{out}: {shown} samples")
    return 0


def _add_order(commands: "Commands") -> None:
    text = (
        "Print the keys of global batches, one line a batch, read by W ranks with K worker processes each as in "
        "training (images are not decoded). The lines do not depend on W and K."
    )
    command = commands.add_parser("order", help="which samples come when", description=text)
    command.add_argument("sets", nargs="+", metavar="DIR[:RATIO]", help="shard sets and their shares of the mix (1)")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the shuffle (default: 0)")
    command.add_argument("--batch", type=int, default=16, metavar="B", help="images in a global batch (default: 16)")
    command.add_argument("--from", type=int, default=0, dest="start", metavar="N", help="first batch (default: 0)")
    command.add_argument("--count", type=int, default=10, metavar="C", help="how many batches (default: 10)")
    command.add_argument("--world", type=int, default=1, metavar="W", help="ranks (default: 1)")
    command.add_argument("--workers", type=int, default=0, metavar="K", help="reader processes a rank (default: 0)")
    command.set_defaults(run=_order)


def _order(options: argparse.Namespace) -> int:
    from shards.index import open_set
    from shards.plan import Plan
    from shards.stream import Stream

    for name, least in (("start", 0), ("count", 0), ("world", 1), ("workers", 0)):
        if getattr(options, name) < least:
            flag = "from" if name == "start" else name
            raise UsageError(f"--{flag} {getattr(options, name)}: must be at least {least}")
    if _first_rank() is None:
        return 0
    paths, ratios = zip(*map(set_and_ratio, options.sets), strict=True)
    sets = [open_set(path) for path in paths]
    plan = Plan([len(shard_set) for shard_set in sets], ratios, options.seed, options.batch)
    ranks = range(options.world)
    streams = [Stream(sets, plan, r, options.world, None, options.start, options.workers) for r in ranks]
    for _, *shares in zip(range(options.count), *streams, strict=False):
        print(" ".join(item.key for _, items in shares for item in items))
    return 0


def set_and_ratio(text: str) -> tuple[Path, float]:
    """`DIR` or `DIR:RATIO` to a folder and its ratio (1 if none is given). Raises UsageError."""
    path, colon, ratio = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(ratio)
    except ValueError:
        raise UsageError(f"{text!r}: expected DIR or DIR:RATIO with a number") from None


def _add_fixture(commands: "Commands") -> None:
    from shards.sources.fixtures import FIXTURES

    text = (
        "Write a data set of a few small drawn images with the files, names and formats of the official download: to "
        "see what a source reads, and to try a build before the real data is there."
    )
    command = commands.add_parser("fixture", help="a tiny data set in a source's own format", description=text)
    command.add_argument("source", choices=FIXTURES, metavar="SOURCE", help=f"one of {', '.join(FIXTURES)}")
    command.add_argument("folder", type=Path, metavar="DIR", help="new or empty folder")
    command.set_defaults(run=_fixture)


def _fixture(options: argparse.Namespace) -> int:
    import shlex

    from shards.sources import fixtures

    if _first_rank() is not None:
        fixtures.write(options.source, options.folder)
        words = fixtures.build_words(options.source, options.folder)
        print(f"{options.folder}: written; try: {PROGRAM} {shlex.join(words)} --out {options.source}-fixture")
    return 0
