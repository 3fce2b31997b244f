"""`cogvlm-hpe demo`: the whole flow at laptop size, as a list of the commands a user would type.

Each stage is one command of this project. A stage whose result is there is not run again, so the demo can be
interrupted at any moment and started again.
"""

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import EXIT_STOPPED, UserError
from launcher.files import atomic_folder, write_json_atomic

HELP = "the whole flow at laptop size: shards, training, merge, evaluation, report"
_SETTINGS = "demo.json"
_PACKAGED = Path(__file__).parent / "configs" / "tiny"
_SETS = {
    "a-train": ("A", "train"),
    "a-val": ("A", "val"),
    "a-test": ("A", "test"),
    "b-test": ("B", "test"),
}
_JUDGED_ON = ("a-test", "b-test")
SYSTEMS = ("base", "lora", "merged")
MERGE_QUANTILE = "0.05"
"""Of the layers' similarities: ours, for a model with few layers, where one that goes back to the base is felt."""


@dataclass(frozen=True)
class Sizes:
    """Scenes of each set and steps of training; kept beside the results, which are only valid for them."""

    train_scenes: int = 2400
    val_scenes: int = 100
    test_scenes: int = 150
    max_steps: int = 900
    seed: int = 1

    def scenes(self, name: str) -> int:
        """Scenes of the set called `name`."""
        return {"train": self.train_scenes, "val": self.val_scenes, "test": self.test_scenes}[_SETS[name][1]]


QUICK = Sizes(train_scenes=48, val_scenes=8, test_scenes=12, max_steps=6)
"""Seconds of work: shows that everything runs, teaches nothing."""


@dataclass(frozen=True)
class Stage:
    """One step of the demo, finished when `finished(result)`; without a command it is the copy of the base."""

    name: str
    result: Path
    command: list[str] | None
    finished: Callable[[Path], bool] = Path.exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the demo."""
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="where it goes (default: %(default)s)")
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="ranks (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not whether it learns")


def run(args: argparse.Namespace) -> int:
    """Run the stages that are not finished. Raises UserError where one fails."""
    sizes = QUICK if args.quick else Sizes()
    _keep_settings(args.dir, sizes, args.nproc)
    stages = plan(args.dir, sizes, args.nproc)
    start_s = time.monotonic()
    for number, stage in enumerate(stages, 1):
        head = f"[{number}/{len(stages)}] {stage.name}"
        if stage.finished(stage.result):
            print(f"{head}: finished before, kept", flush=True)
            continue
        print(head if stage.command is None else f"{head}\n$ {shlex.join(stage.command)}", flush=True)
        stage_start_s = time.monotonic()
        code = _run_command(stage)
        if code == EXIT_STOPPED:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return EXIT_STOPPED
        if code or not stage.finished(stage.result):
            raise UserError(f"stage {stage.name!r} failed with exit code {code}; its own message stands above")
        print(f"    {time.monotonic() - stage_start_s:.0f} s", flush=True)
    print(f"done in {(time.monotonic() - start_s) / 60:.1f} minutes: open {args.dir / 'report.html'}")
    print(f"curves: hpe-launch tensorboard {args.dir}")
    return 0


def plan(folder: Path, sizes: Sizes, nproc: int) -> list[Stage]:
    """All stages in order."""
    merged = folder / "merged"
    return [
        *(_shards(folder, name, sizes, nproc) for name in _SETS),
        Stage("base, from the package", folder / "base", None),
        _train(folder, sizes, nproc),
        Stage(
            "merge",
            merged,
            _program("cogvlm_hpe", "merge", "--base", folder / "base", "--adapter", folder / "lora" / "last")
            + ["--method", "layerwise", "--quantile", MERGE_QUANTILE, "--out", str(merged)],
        ),
        *(_evaluate(folder, on, nproc) for on in _JUDGED_ON),
        Stage(
            "report",
            folder / "report.html",
            _program("cogvlm_hpe", "report", *(folder / "evaluation" / on for on in _JUDGED_ON), "--out", folder)
            + ["--card", str(merged)],
        ),
    ]


def _shards(folder: Path, name: str, sizes: Sizes, nproc: int) -> Stage:
    domain, split = _SETS[name]
    out = folder / "shards" / name
    words = ["build", "synthetic", "--domain", domain, "--split", split, "--scenes", sizes.scenes(name)]
    command = _program("launcher", "shards", "--nproc", nproc, *words, "--seed", sizes.seed, "--out", out)
    return Stage(f"shards {name}", out / "index.json", command)


def _train(folder: Path, sizes: Sizes, nproc: int) -> Stage:
    import yaml

    mix = yaml.safe_load((_PACKAGED / "lora.yaml").read_text())["shards"]["train"]
    mix = [entry | {"path": str(folder / "shards" / Path(entry["path"]).name)} for entry in mix]
    command = _program("launcher", "train", _PACKAGED / "lora.yaml", "--nproc", nproc, "--run-dir", folder / "lora")
    command += ["--model.base", str(folder / "base"), "--shards.train", json.dumps(mix)]
    command += ["--train.max_steps", str(sizes.max_steps), "--resume"]
    return Stage("train", folder / "lora" / "last", command, lambda last: _step_of(last) == sizes.max_steps)


def _evaluate(folder: Path, on: str, nproc: int) -> Stage:
    """All systems in one pass: their adapters leave the image alone (scope `text`), so they share the work on it."""
    out = folder / "evaluation" / on
    command = _program("launcher", "evaluate", "--nproc", nproc, "--model", folder / "base", "--with-base")
    command += ["--adapter", str(folder / "lora" / "last"), "--adapter", str(folder / "merged")]
    command += [word for system in SYSTEMS for word in ("--name", system)]
    command += ["--shards", str(folder / "shards" / on), "--out", str(out), "--resume"]
    return Stage(f"evaluate on {on}", out, command, _all_judged)


def _all_judged(out: Path) -> bool:
    return all((out / system / "metrics.json").is_file() for system in SYSTEMS)


def _program(module: str, *words: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, words)]


def _step_of(last: Path) -> int:
    path = last / "trainer.json"
    return json.loads(path.read_text())["step"] if path.is_file() else -1


def _keep_settings(folder: Path, sizes: Sizes, nproc: int) -> None:
    path, now = folder / _SETTINGS, {"sizes": asdict(sizes), "nproc": nproc}
    if path.is_file() and json.loads(path.read_text()) != now:
        raise UserError(f"{folder}: holds a demo of other sizes or ranks; remove it, or name another folder by --dir")
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_json_atomic(path, now)


def _run_command(stage: Stage) -> int:
    """The stage's exit code; a request to stop is passed on and answered by EXIT_STOPPED once the stage has ended."""
    if stage.command is None:
        copy_base(stage.result)
        return 0
    stopped = False
    process = subprocess.Popen(stage.command, start_new_session=True)

    def stop(number: int, _frame: object) -> None:
        nonlocal stopped
        stopped = True
        process.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return EXIT_STOPPED if stopped else code


def copy_base(out: Path) -> None:
    """The packaged base into `out`, with its training curves as TensorBoard shows them. Raises UserError."""
    from cogvlm_hpe.train.monitor import replay

    with atomic_folder(out) as folder:
        for path in _PACKAGED.iterdir():
            if path.is_file():
                shutil.copy2(path, folder / path.name)
        replay(folder / "metrics.jsonl", folder / "tensorboard")
