"""Kill -9 of random ranks at random moments over one run: whether what comes out is what an undisturbed run gives.

    python benchmarks/chaos.py [--kills 50] [--signals 5] [--nproc 2] [--config FILE --dir DIR]

Two runs of one config: `calm`, and `storm`, which is started again with --resume after every disturbance. A kill hits
one rank with SIGKILL, while it starts or some steps later; a signal asks one rank alone to stop, and all must leave
with exit code 85. Exit code 0 where the last adapters are the same bytes. Without --config it makes itself a small
set, and trains LoRA on the tiny base.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

ADAPTER = "adapter_model.safetensors"
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


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


def start(config: Path, run_dir: Path, nproc: int) -> subprocess.Popen[bytes]:
    """The run through the launcher that users take, which here must not start it again by itself."""
    words = ["train", str(config), "--nproc", str(nproc), "--run-dir", str(run_dir), "--resume", "--max-restarts", "0"]
    with (run_dir.parent / f"{run_dir.name}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "launcher", *words], stdout=log, stderr=log)


def ranks_of(launched: subprocess.Popen[bytes], nproc: int) -> list[psutil.Process]:
    """The run's ranks, once there are all of them."""
    found: dict[int, psutil.Process] = {}
    while len(found) < nproc and launched.poll() is None:
        for process in psutil.Process(launched.pid).children(recursive=True):
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            number = next((word[13:] for word in words if word.startswith("--local_rank=")), None)
            if number is not None and "cogvlm_hpe" in words:
                found[int(number)] = process
        time.sleep(0.1)
    return [found[number] for number in sorted(found)]


def lines_of(run_dir: Path) -> int:
    """Lines its metrics have: how far it is."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_for_steps(launched: subprocess.Popen[bytes], run_dir: Path, steps: int) -> None:
    """Until this start has made so many steps; a start first says so in run.json and cuts off what it writes again."""
    path, begun_s = run_dir / "run.json", time.time()
    while launched.poll() is None and not (path.is_file() and path.stat().st_mtime > begun_s):
        time.sleep(0.05)
    time.sleep(0.5)
    before = lines_of(run_dir)
    while launched.poll() is None and lines_of(run_dir) < before + steps:
        time.sleep(0.02)


def disturb(config: Path, run_dir: Path, nproc: int, chance: random.Random, kind: str) -> int:
    """One start of the run and one disturbance; the exit code."""
    launched = start(config, run_dir, nproc)
    ranks = ranks_of(launched, nproc)
    if kind == "kill at start":
        time.sleep(chance.uniform(0, 8))
    else:
        wait_for_steps(launched, run_dir, chance.randint(1, 3))
        time.sleep(chance.uniform(0, 0.3))
    victim = chance.randrange(nproc)
    number = chance.choice(_STOPS) if kind == "signal" else signal.SIGKILL
    if launched.poll() is None:
        ranks[victim].send_signal(number)
    code = launched.wait()
    print(f"{kind}: {number.name} to rank {victim}, exit code {code}, {lines_of(run_dir)} lines", flush=True)
    if kind == "signal" and code not in (85, 0):
        raise SystemExit(f"a signal to one rank must end all with exit code 85, not {code}")
    return code


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
        config = args.config or make_config(folder, args.kills)
        calm, storm, chance = folder / "calm", folder / "storm", random.Random(args.seed)
        if start(config, calm, args.nproc).wait():
            raise SystemExit(f"the undisturbed run failed; see {calm}.log")
        kinds = ["kill", *chance.choices(["kill", "kill at start"], k=args.kills - 1)] + ["signal"] * args.signals
        done = 0
        for kind in kinds:
            done += 1
            if disturb(config, storm, args.nproc, chance, kind) == 0:
                break
        if start(config, storm, args.nproc).wait():
            raise SystemExit(f"the last start failed; see {storm}.log")
        same = (calm / "last" / ADAPTER).read_bytes() == (storm / "last" / ADAPTER).read_bytes()
    print(f"{done} of {len(kinds)} disturbances before the run was through; the adapters are the same bytes: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
