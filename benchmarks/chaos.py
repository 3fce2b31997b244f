"""Kill -9 of random ranks at random moments over one run: whether what comes out is what an undisturbed run gives.

    python benchmarks/chaos.py [--kills 50] [--signals 5] [--nproc 2] [--config FILE --dir DIR]

Two runs of one config: `calm`, and `storm`, which is started again with --resume after every disturbance. A kill hits
one rank with SIGKILL, while it starts or some steps later; a signal asks one rank alone to stop, and all must leave
with exit code 85. Exit code 0 where the last adapters are the same bytes. Without --config it makes itself a small
set, and trains LoRA on the tiny base.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import psutil
import yaml

ADAPTER = "adapter_model.safetensors"
START_S = 8.0  # within which a start is killed
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Started(Protocol):
    """A run under way."""

    @property
    def pids(self) -> list[int]:
        """Of its ranks, in their order, once there are all of them."""
        ...

    def poll(self) -> int | None:
        """The exit code, or None."""
        ...

    def wait(self) -> int:
        """The exit code."""
        ...


class Launched:
    """A run started through the launcher that users take, which here must not start it again by itself."""

    def __init__(self, config: Path, run_dir: Path, nproc: int) -> None:
        words = ["train", str(config), "--nproc", str(nproc), "--run-dir", str(run_dir), "--resume"]
        words += ["--max-restarts", "0", "--skip-preflight"]  # we start it again ourselves
        words += ["--max-restarts", "0"]
        with (run_dir.parent / f"{run_dir.name}.log").open("ab") as log:
            self._launcher = subprocess.Popen([sys.executable, "-m", "launcher", *words], stdout=log, stderr=log)
        self._nproc = nproc

    @property
    def pids(self) -> list[int]:
        """Of its ranks; none where it ends before there are any."""
        found: dict[int, int] = {}
        while len(found) < self._nproc and self.poll() is None:
            for process in psutil.Process(self._launcher.pid).children(recursive=True):
                try:
                    words = process.cmdline()
                except psutil.Error:
                    continue
                number = next((word[13:] for word in words if word.startswith("--local_rank=")), None)
                if number is not None and "cogvlm_hpe" in words:
                    found[int(number)] = process.pid
            time.sleep(0.1)
        return [found[number] for number in sorted(found)]

    def poll(self) -> int | None:
        """The launcher's exit code, or None."""
        return self._launcher.poll()

    def wait(self) -> int:
        """The launcher's exit code."""
        return self._launcher.wait()


def make_config(folder: Path, kills: int) -> Path:
    """A set of 48 drawn scenes and a config long enough for so many kills."""
    out = folder / "set"
    words = ["build", "synthetic", "--domain", "A", "--split", "train", "--scenes", "48", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "shards", *words], check=True)
    config = {
        "run_dir": "unset",
        "model": {"base": "tiny", "dtype": "fp32"},
        "adapter": {"rank": 4, "alpha": 8},
        "shards": {"train": [{"path": str(out)}], "batch": 8},
        "train": {"max_steps": 8 + 3 * kills, "micro_batch": 2, "save_every": 2, "log_every": 1, "warmup_steps": 1},
    }
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def step_of(run_dir: Path) -> int:
    """The last step that its metrics tell of."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return max((json.loads(line)["global_step"] for line in lines if line.endswith("}\n")), default=0)


def wait_for_steps(started: Started, run_dir: Path, begun_s: float, steps: int) -> None:
    """Until this start has made so many steps; it first says in run.json from where it goes on."""
    path = run_dir / "run.json"
    while started.poll() is None and not (path.is_file() and path.stat().st_mtime > begun_s):
        time.sleep(0.02)
    first = json.loads(path.read_text())["starts"][-1]["first_step"] if path.is_file() else 0
    while started.poll() is None and step_of(run_dir) < first + steps:
        time.sleep(0.02)


def send(pid: int, number: signal.Signals, run_dir: Path) -> int:
    """Signal one rank, which stands still meanwhile, and with it the whole run; the step at which that was."""
    try:
        victim = psutil.Process(pid)
        victim.suspend()
        while victim.status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        step = step_of(run_dir)
        victim.send_signal(number)
        victim.resume()
    except psutil.NoSuchProcess:  # killed, or gone by itself
        return step_of(run_dir)
    return step


def disturb(start: Callable[[], Started], run_dir: Path, max_steps: int, chance: random.Random, kind: str) -> int:
    """One start of the run and one disturbance; the exit code. Raises SystemExit where a signal was not heard."""
    begun_s, started = time.time(), start()
    pids = started.pids
    if kind == "kill at start":
        time.sleep(chance.uniform(0, START_S))
    else:
        wait_for_steps(started, run_dir, begun_s, chance.randint(1, 3))
        time.sleep(chance.uniform(0, 0.3) if kind == "kill" else 0.0)
    number = chance.choice(_STOPS) if kind == "signal" else signal.SIGKILL
    rank = chance.randrange(len(pids)) if pids else 0
    step = send(pids[rank], number, run_dir) if pids else 0
    code = started.wait()
    print(f"{kind}: {number.name} to rank {rank} after step {step}, exit code {code}", flush=True)
    # A rank that has agreed on the step after this one hears of it in the one after that, which must not be the last.
    if kind == "signal" and code != 85 and (code != 0 or step < max_steps - 2):
        raise SystemExit(f"a signal to one rank must end all with exit code 85, not {code}")
    return code


def storm(
    start: Callable[[], Started], run_dir: Path, max_steps: int, chance: random.Random, kinds: Sequence[str]
) -> list[int]:
    """Disturb the run in these ways, and let it come to its end; the exit codes of all starts."""
    codes: list[int] = []
    for kind in kinds:
        if 0 not in codes:
            codes.append(disturb(start, run_dir, max_steps, chance, kind))
    return codes if 0 in codes else [*codes, start().wait()]


def main() -> int:
    """Both runs; 0 where they agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signals", type=int, default=5)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, help="train this instead of a tiny set")
    parser.add_argument("--dir", type=Path, help="where the runs go (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dir or Path(temporary)
        config = args.config or make_config(folder, args.kills + args.signals)
        calm, stormy, chance = folder / "calm", folder / "storm", random.Random(args.seed)
        if Launched(config, calm, args.nproc).wait():
            raise SystemExit(f"the undisturbed run failed; see {calm}.log")
        kinds = ["kill", *chance.choices(["kill", "kill at start"], k=args.kills - 1)] + ["signal"] * args.signals
        max_steps = yaml.safe_load(config.read_text())["train"]["max_steps"]
        codes = storm(lambda: Launched(config, stormy, args.nproc), stormy, max_steps, chance, kinds)
        if codes[-1]:
            raise SystemExit(f"the last start failed; see {stormy}.log")
        same = (calm / "last" / ADAPTER).read_bytes() == (stormy / "last" / ADAPTER).read_bytes()
    print(f"{len(codes) - 1} disturbances of {len(kinds)}, {codes.count(85)} of them signals that were heard")
    print(f"the adapters are the same bytes: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
