"""hpe-shards: make and judge shard sets."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError, run_main
from shards import plans

if TYPE_CHECKING:
    from launcher.comm import Comm
    from shards.index import ShardSet

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

PROGRAM = "hpe-shards"
_MOST_FINDINGS = 50
_BARS = " ▁▂▃▄▅▆▇█"
_EXAMPLES = """examples:
  hpe-shards build synthetic --domain A --scenes 2000 --split train --out data/a-train
  mpirun -np 8 hpe-shards build synthetic --domain B --scenes 200 --split test --out data/b-test
  hpe-shards verify data/a-train data/b-test     also finds subjects that both share
  hpe-shards preview data/a-train --count 12 --out a-train.png
  hpe-shards order data/a-train:0.9 data/b-train:0.1 --seed 1 --batch 64 --from 100 --count 2
  hpe-shards simulate 100000000 --batch 4096 --world 512 --workers 8 --lose-at 9000 --world-after 256

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
    plans.add_order(commands)
    plans.add_simulate(commands)
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
    command.add_argument("--report", type=Path, metavar="FILE", help="write findings, counts and histograms as JSON")
    command.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from launcher.comm import mpi
    from launcher.files import write_json_atomic
    from shards.verify import lint

    comm = mpi()
    if comm.rank == 0 and options.report is not None:
        _make_place("--report", options.report)
    found = lint(options.sets, comm, options.fast)
    if comm.rank == 0:
        checked = "index" if options.fast else "every byte"
        if options.report is not None:
            write_json_atomic(options.report, found.to_json() | {"checked": checked})
        for described in found.sets:
            counts = described["counts"]
            print(f"{described['path']}: {counts['samples']:,} samples, {counts['heads']:,} heads")
            _print_poses(described["poses"])
        _say_findings(options.sets, found.findings, checked)
    return 1 if found.findings else 0


def _make_place(flag: str, path: Path) -> None:
    """The folder of a file that is written in the end. Raises UsageError, before all the work, where it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        why = "it is a folder" if path.is_dir() else ""
    except OSError as error:
        why = f"{error.strerror}: {error.filename}"
    if why:
        raise UsageError(f"{flag} {path}: cannot be written ({why}); name a file in a folder that you may write to")


def _print_poses(poses: "dict[str, dict[str, Any]]") -> None:
    """One line an angle: how many heads in each bin, as high as its bar."""
    for angle, told in poses.items():
        heads, low = told["heads"], told["lowest_deg"]
        most = max(1, *heads)
        # Any head at all is seen: only an empty bin is blank.
        bars = "".join(_BARS[-(-(len(_BARS) - 1) * count // most)] for count in heads)
        print(f"  {angle:5} {low:4} |{bars}| {low + told['bin_deg'] * len(heads)}, most in a bin {max(heads):,}")


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
    rows["heads with a pose"] = f"{sum(info['poses']['yaw']['heads']):,}"
    console = Console(highlight=False)
    facts = Table(title=shard_set.place, show_header=False)
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
        _make_place("--out", out)
        shown = preview(open_set(options.set), options.count, out)
        print(f"{out}: {shown} samples")
    return 0


def _add_fixture(commands: "Commands") -> None:
    from shards.sources.fixtures import FIXTURES

    text = (
        "Write a data set of a few small drawn images with the files, names and formats of the official download: to "
        "see what a source reads, and to try a build before the real data is there."
    )
    command = commands.add_parser("fixture", help="a tiny data set in a source's own format", description=text)
    names = sorted(FIXTURES)
    command.add_argument("source", choices=names, metavar="SOURCE", help=f"one of {', '.join(names)}")
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
