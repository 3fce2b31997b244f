"""The training loop."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cogvlm_hpe.config import RunConfig
from cogvlm_hpe.dialogue import TASKS
from cogvlm_hpe.train import checkpoint
from cogvlm_hpe.train.batch import Batch, Collator
from cogvlm_hpe.train.engine import Engine
from cogvlm_hpe.train.monitor import Monitor
from cogvlm_hpe.train.schedule import learning_rate
from launcher.comm import Comm
from launcher.errors import EXIT_STOPPED, UserError
from launcher.progress import Progress
from launcher.supervise import StopFlag
from shards.plan import Plan
from shards.stream import Item, Stream


@dataclass
class Run:
    """Everything the loop needs, made by `setup`."""

    config: RunConfig
    comm: Comm
    engine: Engine
    collator: Collator
    plan: Plan
    stream: Stream
    monitor: Monitor
    describe: checkpoint.Describe
    first_step: int


@dataclass
class Tally:
    """This rank's sums since the last line in the log."""

    loss: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    auxiliary: float = 0.0
    images: int = 0
    skipped: int = 0
    wait_s: float = 0.0
    start_s: float = field(default_factory=time.monotonic)


def run_loop(run: Run, flag: StopFlag) -> int:
    """All ranks. Train to `max_steps`, or until asked to stop; the exit code."""
    config, train = run.config, run.config.train
    tally, batches = Tally(), iter(run.stream)
    last = train.max_steps if train.stop_after is None else min(train.max_steps, run.first_step + train.stop_after)
    step, stopping = run.first_step, False
    with Progress(run.comm).bar("train", last - run.first_step) as bar:
        while step < last and not stopping:
            micro_batches = next_batches(run, batches, tally)
            n_global, stops = run.comm.sum(np.array([sum(b.n_answers for b in micro_batches), int(flag.raised)]))
            stopping = bool(stops)
            run.engine.set_lr(rate(config, step))
            train_step(run, micro_batches, int(n_global), tally)
            step += 1
            bar.advance()
            if step % train.log_every == 0 or step == last:
                bar.update(report(run, step, tally))
                tally = Tally()
            if step % train.save_every == 0 or step == last or stopping:
                save(run, step)
    flag.leave()
    if step < train.max_steps:
        run.monitor.say(f"stopped after step {step} of {train.max_steps}, resumable")
        return EXIT_STOPPED
    return 0


def next_batches(run: Run, batches: Iterator[tuple[int, list[Item]]], tally: Tally) -> list[Batch]:
    """This rank's micro-batches of the next global step."""
    start_s, micro = time.monotonic(), run.config.train.micro_batch
    _, items = next(batches)
    out = [run.collator(items[i : i + micro]) for i in range(0, len(items), micro)]
    tally.wait_s += time.monotonic() - start_s
    tally.images += len(items)
    tally.skipped += sum(item.record is None for item in items)
    return out


def train_step(run: Run, micro_batches: list[Batch], n_global: int, tally: Tally) -> None:
    """All ranks. One optimizer step.

    Loss = Σ over the global batch's answers of the mean cross-entropy of an answer ÷ answers in the global batch.
    The engine averages over ranks, hence the factor `size`.
    """
    size, batch = run.comm.size, run.config.shards.batch
    for micro in micro_batches:
        total, branches, extra = run.engine.engine(micro)
        loss = total * (size / max(1, n_global))
        if extra is not None:
            loss = loss + extra * (size / batch)
            tally.auxiliary += float(extra.detach())
        run.engine.backward(loss)
        run.engine.step()
        for task, value in zip(micro.tasks, branches.tolist(), strict=False):
            tally.loss[task] += value
            tally.answers[task] += 1


def rate(config: RunConfig, step: int) -> float:
    """Learning rate of the 0-based `step`."""
    train = config.train
    return learning_rate(
        step,
        peak=train.lr,
        warmup_steps=train.warmup_steps,
        max_steps=train.max_steps,
        min_ratio=train.min_lr_ratio,
    )


def report(run: Run, step: int, tally: Tally) -> str:
    """All ranks. Reduce the tally, write it down, and give a short text for the bar. Raises UserError on nan."""
    local = [tally.loss[t] for t in TASKS] + [tally.answers[t] for t in TASKS]
    sums = run.comm.sum(np.array([*local, tally.auxiliary, tally.images, tally.skipped], dtype=float))
    wait_s = run.comm.max(tally.wait_s)
    losses, answers = sums[: len(TASKS)], sums[len(TASKS) : 2 * len(TASKS)]
    auxiliary, images, skipped = sums[2 * len(TASKS) :]
    elapsed_s = time.monotonic() - tally.start_s
    loss = losses.sum() / max(1.0, answers.sum())
    if not math.isfinite(loss):
        raise UserError(f"step {step}: the loss is {loss}; lower train.lr and resume from the last checkpoint")
    values = {
        "train/loss": loss,
        **{f"train/loss_{t}": losses[i] / answers[i] for i, t in enumerate(TASKS) if answers[i]},
        "train/lr": rate(run.config, step - 1),
        "train/grad_norm": run.engine.grad_norm(),
        "train/images_per_s": images / elapsed_s,
        "train/answers_per_s": answers.sum() / elapsed_s,
        "shards/wait_share": wait_s / elapsed_s,
        "shards/skipped": skipped,
    }
    if run.config.train.auxiliary:
        values["train/loss_auxiliary"] = auxiliary / max(1.0, images)
    run.monitor.scalars(step, values)
    text = f"loss {loss:.4f}  lr {values['train/lr']:.1e}  {values['train/images_per_s']:.1f} images/s"
    run.monitor.say(f"step {step}  {text}")
    return text


def save(run: Run, step: int) -> Path:
    """All ranks. Write a checkpoint; every rank waits until it is there."""
    weights, optimizer = run.engine.weights(), run.engine.optimizer_state()
    run_dir = Path(run.config.run_dir)
    if run.comm.rank == 0:
        keep = run.config.train.keep
        checkpoint.save(run_dir, step, weights, optimizer, run.plan.state(step), run.describe, keep)
        run.monitor.say(f"saved {checkpoint.folder_of(run_dir, step)}")
    run.comm.barrier()
    return checkpoint.folder_of(run_dir, step)
