"""A chain of this project's own commands, each with a result that says whether it is finished.

What is finished is not run again, so a chain can be interrupted at any moment and started again. How long each stage
took is kept beside the results, summed over the starts that it needed.
"""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_STOPPED, UserError
from launcher.files import atomic_folder, write_json_atomic

PACKAGED = Path(__file__).parent / "configs" / "tiny"
"""The tiny base, and the configs of its training and of LoRA on it."""
SECONDS = "seconds.json"
_LORA = PACKAGED / "lora.yaml"


@dataclass(frozen=True)
class Stage:
    """One step, finished when `finished(result)`. `work` is a command line, or what is done in this process."""

    name: str
    result: Path
    work: list[str] | Callable[[], None]
    finished: Callable[[Path], bool] = Path.exists


def run_all(stages: Sequence[Stage], folder: Path) -> int:
    """Run what is not finished; 0, or EXIT_STOPPED after a request to stop. Raises UserError where a stage fails."""
    start_s = time.monotonic()
    for number, stage in enumerate(stages, 1):
        head = f"[{number}/{len(stages)}] {stage.name}"
        if stage.finished(stage.result):
            print(f"{head}: finished before, kept", flush=True)
            continue
        print(f"{head}\n$ {shlex.join(stage.work)}" if isinstance(stage.work, list) else head, flush=True)
        stage_start_s = time.monotonic()
        code = _run(stage.work)
        took_s = time.monotonic() - stage_start_s
        _add_seconds(folder, stage.name, took_s)
        if code == EXIT_STOPPED:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return EXIT_STOPPED
        if code or not stage.finished(stage.result):
            raise UserError(f"stage {stage.name!r} failed with exit code {code}; its own message stands above")
        print(f"    {took_s:.0f} s", flush=True)
    print(f"done in {(time.monotonic() - start_s) / 60:.1f} minutes: open {folder / 'report.html'}")
    print(f"curves: hpe-launch tensorboard {folder}")
    return 0


def seconds(folder: Path) -> dict[str, float]:
    """Wall time of each stage by its name, all its starts together."""
    path = folder / SECONDS
    return json.loads(path.read_text()) if path.is_file() else {}


def _add_seconds(folder: Path, name: str, took_s: float) -> None:
    known = seconds(folder)
    write_json_atomic(folder / SECONDS, known | {name: round(known.get(name, 0.0) + took_s, 1)})


def _run(work: list[str] | Callable[[], None]) -> int:
    """The stage's exit code; a request to stop is passed on and answered by EXIT_STOPPED once the stage has ended."""
    if not isinstance(work, list):
        work()
        return 0
    stopped = False
    process = subprocess.Popen(work, start_new_session=True)

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


def keep_settings(path: Path, now: Mapping[str, Any]) -> None:
    """Write settings that the folder's results are valid for. Raises UserError where it holds results of others."""
    if path.is_file() and json.loads(path.read_text()) != now:
        raise UserError(
            f"{path.parent}: holds results of other sizes or ranks; remove it, or name another folder by --dir"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_json_atomic(path, now)


def program(module: str, *words: object) -> list[str]:
    """The command line of `cogvlm_hpe` or `launcher`, by this very interpreter."""
    return [sys.executable, "-m", module, *map(str, words)]


def shards(out: Path, domain: str, split: str, scenes: int, seed: int, nproc: int) -> Stage:
    """A synthetic shard set."""
    words = ["build", "synthetic", "--domain", domain, "--split", split, "--scenes", scenes]
    command = program("launcher", "shards", "--nproc", nproc, *words, "--seed", seed, "--out", out)
    return Stage(f"shards {out.name}", out / "index.json", command)


def base(out: Path) -> Stage:
    """The packaged base, with its training curves as TensorBoard shows them."""
    return Stage("base, from the package", out, lambda: _copy_base(out))


def _copy_base(out: Path) -> None:
    from cogvlm_hpe.train.monitor import replay

    with atomic_folder(out) as folder:
        for path in PACKAGED.iterdir():
            if path.is_file():
                shutil.copy2(path, folder / path.name)
        for curves in folder.glob("metrics-*.jsonl"):
            replay(curves, folder / "tensorboard" / curves.stem.removeprefix("metrics-"))


def lora(
    name: str, base: Path, out: Path, mix: list[dict[str, Any]], max_steps: int, nproc: int, *more: object
) -> Stage:
    """Training by the packaged lora.yaml, on `mix` (shards.train's entries); `more` are words of `train`."""
    command = program("launcher", "train", _LORA, "--nproc", nproc, "--run-dir", out, "--model.base", base)
    command += ["--shards.train", json.dumps(mix), "--train.max_steps", str(max_steps), *map(str, more), "--resume"]
    return Stage(name, out / "last", command, lambda last: _step_of(last) == max_steps)


def lora_mix() -> list[dict[str, Any]]:
    """What lora.yaml trains on."""
    import yaml

    return yaml.safe_load(_LORA.read_text())["shards"]["train"]


def _step_of(last: Path) -> int:
    path = last / "trainer.json"
    return json.loads(path.read_text())["step"] if path.is_file() else -1


def evaluate(base: Path, systems: Mapping[str, Path | None], on: Path, out: Path, nproc: int, *more: object) -> Stage:
    """All systems, adapters by their names (None: the base itself), in one pass: scope `text` shares the image."""
    adapters = {name: adapter for name, adapter in systems.items() if adapter is not None}
    alone = [name for name in systems if name not in adapters]
    command = program("launcher", "evaluate", "--nproc", nproc, "--model", base, *["--with-base"] * len(alone))
    command += [word for adapter in adapters.values() for word in ("--adapter", str(adapter))]
    command += [word for name in [*alone, *adapters] for word in ("--name", name)]
    command += ["--shards", str(on), "--out", str(out), *map(str, more), "--resume"]
    folders = [out / name for name in systems] if len(systems) > 1 else [out]

    def judged(_: Path) -> bool:
        return all((folder / "metrics.json").is_file() for folder in folders)

    return Stage(f"evaluate {out.name}", out, command, judged)
