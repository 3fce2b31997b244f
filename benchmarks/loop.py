"""What the training loop costs beside the bare engine: our whole step over forward, backward and step in a for loop.

    python benchmarks/loop.py [--steps 30] [--config FILE]
    deepspeed --num_gpus 2 benchmarks/loop.py

Both work on the same engine and the same micro-batches, in turns, so that a change of the machine's speed hits both,
and each is first every other time, since the first one brings the batch into the caches (2 % of a step):
ours first reads, decodes and collates them (data wait is all three), agrees over ranks, checks that all is finite, and
writes scalars every step; the bare one is handed them ready. The look at each gradient, microseconds, is in both.
Without --config: LoRA on the tiny base, drawn scenes. Aim: at most 1.05.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml

from cogvlm_hpe.train.batch import Batch
from cogvlm_hpe.train.command import parse
from cogvlm_hpe.train.loop import Run, Tally, next_batches, rate, report, train_step
from cogvlm_hpe.train.setup import setup
from launcher.comm import Comm, from_torch
from launcher.world import discover

AIM = 1.05


def make_config(folder: Path, workers: int) -> Path:
    """A set of 48 drawn scenes and LoRA on the tiny base; nothing is saved or judged."""
    out = folder / "set"
    words = ["build", "synthetic", "--domain", "A", "--split", "train", "--scenes", "48", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "shards", *words], check=True)
    config = {
        "run_dir": str(folder / "run"),
        "model": {"base": "tiny", "dtype": "fp32"},
        "adapter": {"rank": 16, "alpha": 16},
        "shards": {"train": [{"path": str(out)}], "batch": 16, "workers": workers},
        "train": {"max_steps": 10**6, "micro_batch": 4, "warmup_steps": 1},
    }
    path = folder / "loop.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def bare_step(run: Run, micro_batches: list[Batch], scale: float) -> None:
    """What a for loop around the engine does."""
    for micro in micro_batches:
        total, _, extra = run.engine.engine(micro)
        run.engine.engine.backward((total if extra is None else total + extra) * scale, scale_wrt_gas=False)
        run.engine.engine.step()


def our_step(run: Run, step: int, micro_batches: list[Batch], n_global: int, tally: Tally) -> None:
    """What our loop does with a batch, scalars included."""
    train_step(run, step, micro_batches, n_global, tally)
    run.watchdog.beat()
    report(run, step, tally)


def seconds(work: Callable[[], None]) -> float:
    """How long it takes until all of it is done, on the device too."""
    start_s = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def measure(run: Run, steps: int) -> tuple[list[float], list[float], float]:
    """Seconds of ours and of the bare steps, and the share of ours that is waiting for data."""
    batches, ours_s, bare_s, waited_s = iter(run.stream), [], [], 0.0
    for step in range(steps + 2):  # the first two warm up
        tally, start_s = Tally(), time.perf_counter()
        micro_batches = next_batches(run, batches, tally)
        n_global, _ = run.comm.sum(np.array([sum(batch.n_answers for batch in micro_batches), 0]))
        run.engine.set_lr(rate(run.config, step))
        read_s = time.perf_counter() - start_s
        ours = partial(our_step, run, step, micro_batches, int(n_global), tally)
        bare = partial(bare_step, run, micro_batches, run.comm.size / max(1, int(n_global)))
        if step % 2:  # who comes second finds the batch in the caches
            step_s, engine_s = seconds(ours), seconds(bare)
        else:
            engine_s, step_s = seconds(bare), seconds(ours)
        if step >= 2:
            ours_s.append(read_s + step_s)
            bare_s.append(engine_s)
            waited_s += tally.wait_s
    return ours_s, bare_s, waited_s / sum(ours_s)


def config_for_all(comm: Comm, folder: Path, asked: Path | None, workers: int) -> Path:
    """All ranks. The config that was asked for, or rank 0's own."""
    made = make_config(folder, workers) if asked is None and comm.rank == 0 else asked
    return comm.broadcast(made)  # type: ignore[return-value]


def main() -> int:
    """Measure and print; 0 whatever comes out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=1, help="reader processes a rank")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    world = discover()
    comm = from_torch(world)
    with tempfile.TemporaryDirectory() as temporary:
        path = config_for_all(comm, Path(temporary), args.config, args.workers)
        run = setup(parse(["--config", str(path)])[0], world, comm, resume=False, allow_change=False)
        ours_s, bare_s, waited = measure(run, args.steps)
        run.monitor.close()
    if comm.rank == 0:
        ours, bare = statistics.median(ours_s), statistics.median(bare_s)
        print(f"{comm.size} ranks, {args.steps} steps each, medians; data wait {waited:.1%} of our steps")
        print(f"ours {ours * 1e3:8.1f} ms   bare engine {bare * 1e3:8.1f} ms   ratio {ours / bare:.3f} (aim {AIM})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
