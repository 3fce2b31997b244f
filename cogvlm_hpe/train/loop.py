"""The training loop."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from cogvlm_hpe.config import RunConfig, flatten
from cogvlm_hpe.dialogue import TASKS
from cogvlm_hpe.train import checkpoint
from cogvlm_hpe.train.batch import Batch, Collator
from cogvlm_hpe.train.engine import Engine
from cogvlm_hpe.train.evaluation import Judge, Verdict
from cogvlm_hpe.train.monitor import Monitor
from cogvlm_hpe.train.schedule import learning_rate
from cogvlm_hpe.train.watch import Work, delta_norms, device_name, memory_gb, peak_flops, profiled, whole_norm
from launcher.comm import Comm
from launcher.errors import EXIT_STOPPED, UserError
from launcher.progress import Progress
from launcher.supervise import StopFlag
from launcher.watchdog import Watchdog
from shards.plan import Plan
from shards.stream import Batch as Share
from shards.stream import Stream


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
    writer: checkpoint.Writer
    judge: Judge | None
    work: Work | None  # FLOPs, where the device's peak makes them worth knowing
    prefix_tokens: int  # what an image is to the language model
    watchdog: Watchdog
    first_step: int


@dataclass
class Tally:
    """This rank's sums since the last line in the log."""

    loss: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    auxiliary: float = 0.0
    images: int = 0
    text_tokens: int = 0
    skipped: int = 0
    wait_s: float = 0.0
    start_s: float = field(default_factory=time.monotonic)


def run_loop(run: Run, flag: StopFlag) -> int:
    """All ranks. Train to `max_steps`, or until asked to stop; the exit code."""
    train, batches = run.config.train, iter(run.stream)
    last = train.max_steps if train.stop_after is None else min(train.max_steps, run.first_step + train.stop_after)
    step = run.first_step
    with run.watchdog, profiled(run.config) as profiler, Progress(run.comm).bar("train", last - run.first_step) as bar:
        stopping, tally = not judge_start(run, flag), Tally()
        while step < last and not stopping:
            micro_batches = next_batches(run, batches, tally)
            n_global, stops = run.comm.sum(np.array([sum(b.n_answers for b in micro_batches), int(flag.raised)]))
            stopping = bool(stops)
            run.engine.set_lr(rate(run.config, step))
            train_step(run, step, micro_batches, int(n_global), tally)
            step += 1
            run.watchdog.beat()
            bar.advance()
            profiler.step()
            if step % train.log_every == 0 or step == last:
                bar.update(report(run, step, tally))
                tally = Tally()
            stopping = evaluate_and_save(run, step, flag, tally, stopping, step == last)
        run.writer.wait()
        run.comm.barrier()
    flag.leave()
    if step < train.max_steps or unjudged(run, step):
        run.monitor.say(f"stopped after step {step} of {train.max_steps}, resumable")
        return EXIT_STOPPED
    return 0


def next_batches(run: Run, shares: Iterator[Share], tally: Tally) -> list[Batch]:
    """This rank's micro-batches of the next global step."""
    start_s, micro = time.monotonic(), run.config.train.micro_batch
    share = next(shares)
    (_, items), images = share, share.images
    assert images is not None, "a run's images are of one size"
    out = [run.collator(items[i : i + micro], images[i : i + micro]) for i in range(0, len(items), micro)]
    tally.wait_s += time.monotonic() - start_s
    tally.images += len(items)
    tally.text_tokens += sum(batch.n_text_tokens for batch in out)
    tally.skipped += sum(item.record is None for item in items)
    return out


def train_step(run: Run, step: int, micro_batches: list[Batch], n_global: int, tally: Tally) -> None:
    """All ranks. One optimizer step. Raises UserError, before any weight has changed, where it is not finite.

    Loss = Σ over the global batch's answers of the mean cross-entropy of an answer ÷ answers in the global batch.
    The engine averages over ranks, hence the factor `size`.
    """
    size, batch = run.comm.size, run.config.shards.batch
    # Random numbers (dropout) are a function of the step, so a resumed run draws the same ones.
    torch.manual_seed(hash((run.config.train.seed, step, run.comm.rank)) % 2**63)
    done = []
    for number, micro in enumerate(micro_batches, 1):
        total, branches, extra = run.engine.engine(micro)
        loss = total * (size / max(1, n_global))
        if extra is not None:
            loss = loss + extra * (size / batch)
            tally.auxiliary += float(extra.detach())
        run.engine.backward(loss)
        done.append((micro, branches, torch.isfinite(loss.detach()) & run.engine.finite()))
        if number == len(micro_batches):
            refuse_nonfinite(run.comm, step, [key for micro, _, finite in done if not finite for key in micro.keys])
        run.engine.step()
    for micro, branches, _ in done:
        for task, value in zip(micro.tasks, branches.tolist(), strict=False):
            tally.loss[task] += value
            tally.answers[task] += 1


def refuse_nonfinite(comm: Comm, step: int, suspects: list[str]) -> None:
    """All ranks. Raise UserError where one has samples whose loss or gradient was not finite."""
    if comm.agree(bool(suspects)):
        keys = [key for of_rank in comm.broadcast(comm.gather(suspects)) or [] for key in of_rank]
        raise UserError(
            f"step {step + 1}: loss or gradient is not finite among the samples {', '.join(keys)}; no weight was "
            "changed; look at them, or lower train.lr, and resume from the last checkpoint"
        )


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
    """All ranks. Reduce the tally, write it down, and give a short text for the bar."""
    local = [tally.loss[t] for t in TASKS] + [tally.answers[t] for t in TASKS]
    counts = [tally.auxiliary, tally.images, tally.text_tokens, tally.skipped]
    sums = run.comm.sum(np.array([*local, *counts], dtype=float))
    wait_s, held_gb = run.comm.max(np.array([tally.wait_s, memory_gb()]))
    losses, answers = sums[: len(TASKS)], sums[len(TASKS) : 2 * len(TASKS)]
    auxiliary, images, text_tokens, skipped = sums[2 * len(TASKS) :]
    elapsed_s = time.monotonic() - tally.start_s
    values = {
        "train/loss": losses.sum() / max(1.0, answers.sum()),
        **{f"train/loss_{t}": losses[i] / answers[i] for i, t in enumerate(TASKS) if answers[i]},
        "train/lr": rate(run.config, step - 1),
        "train/grad_norm": run.engine.grad_norm(),
        "train/images_per_s": images / elapsed_s,
        "train/answers_per_s": answers.sum() / elapsed_s,
        "train/tokens_per_s": (images * run.prefix_tokens + text_tokens) / elapsed_s,
        "train/memory_gb": held_gb,
        "shards/wait_share": wait_s / elapsed_s,
        "shards/skipped": skipped,
    }
    if run.config.train.auxiliary:
        values["train/loss_auxiliary"] = auxiliary / max(1.0, images)
    if run.work is not None:
        flops_per_s = run.work.flops(images, text_tokens) / elapsed_s / run.comm.size
        values["train/tflops_per_gpu"] = flops_per_s / 1e12
        values["train/mfu"] = flops_per_s / (peak_flops(device_name()) or math.nan)
    run.monitor.scalars(step, values)
    text = f"loss {values['train/loss']:.4f}  lr {values['train/lr']:.1e}  {values['train/images_per_s']:.1f} images/s"
    run.monitor.say(f"step {step}  {text}")
    return text


def judge_start(run: Run, flag: StopFlag) -> bool:
    """All ranks. Judge what this start goes on from, where that is due and not done; False where a request breaks in.

    The last start may have been stopped before it came to that; then the scores go into the checkpoint that it left.
    """
    if not unjudged(run, run.first_step):
        return True
    verdict = evaluate(run, run.first_step, flag)
    if verdict is not None and run.first_step:
        save(run, run.first_step, verdict)
    return verdict is not None


def evaluate_and_save(run: Run, step: int, flag: StopFlag, tally: Tally, stopping: bool, at_end: bool) -> bool:
    """All ranks. What is due after `step`, in time that the tally leaves out; whether to stop.

    Who must stop saves and no more: what was not judged will be at the next start.
    """
    start_s, verdict = time.monotonic(), None
    run.writer.look()
    if not stopping and due(run, step):
        verdict = evaluate(run, step, flag)
        stopping = verdict is None
    best = verdict is not None and run.comm.agree(is_best(run, verdict))
    if best or step % run.config.train.save_every == 0 or at_end or stopping:
        save(run, step, verdict)
    tally.start_s += time.monotonic() - start_s
    return stopping


def due(run: Run, step: int) -> bool:
    """Whether the model after `step` is to be judged: before the first step, every so many, after the last."""
    train = run.config.train
    return train.evaluate_every > 0 and (step % train.evaluate_every == 0 or step == train.max_steps)


def unjudged(run: Run, step: int) -> bool:
    """All ranks. Whether the model after `step` is due and has not been judged."""
    return due(run, step) and run.comm.agree(run.comm.rank == 0 and not run.monitor.judged(step))


def evaluate(run: Run, step: int, flag: StopFlag) -> Verdict | None:
    """All ranks. Judge the model after `step`; None where a request to stop breaks it off."""
    assert run.judge is not None, "there is one where steps are due"
    start_s = time.monotonic()

    def go_on() -> bool:
        run.watchdog.beat()
        return not run.comm.agree(flag.raised)

    verdict = run.judge(go_on)
    if verdict is None:
        run.monitor.say(f"asked to stop: the model of step {step} was not judged to the end")
        return None
    if run.comm.rank == 0:
        scores, name = verdict.scores, "grounding_accuracy"
        before = run.monitor.at_start(f"evaluate/{name}") if step else scores.get(name)
        if before is not None and name in scores:
            scores["grounding_lost"] = before - scores[name]
        run.monitor.scalars(step, {f"evaluate/{name}": value for name, value in scores.items()})
        for tag, pixels in verdict.figures(step).items():
            run.monitor.image(step, f"evaluate/{tag}", pixels)
        said = "  ".join(f"{name} {value:.4g}" for name, value in scores.items() if "/" not in name)
        run.monitor.say(f"judged after step {step} in {time.monotonic() - start_s:.1f} s  {said}")
    run.comm.barrier()
    return verdict


def is_best(run: Run, verdict: Verdict) -> bool:
    """Whether this rank knows that the model has never been better."""
    return run.comm.rank == 0 and run.writer.is_best(verdict.scores)


def save(run: Run, step: int, verdict: Verdict | None) -> None:
    """All ranks. Write a checkpoint, or have it written; what it holds was copied when this returns."""
    weights, optimizer = run.engine.weights(), run.engine.optimizer_state()
    if run.comm.rank == 0:
        scores = None if verdict is None else verdict.scores
        lora = run.writer.describe.lora
        if lora is not None:
            by_group = delta_norms(weights, lora)
            run.monitor.scalars(step, {f"adapter/norm_{group}": whole_norm(of) for group, of in by_group.items()})
            for group, norms in by_group.items():
                run.monitor.histogram(step, f"adapter/norms_{group}", norms)
        run.writer.save(step, weights, optimizer, run.plan.state(step), scores)
        run.monitor.say(f"saved {checkpoint.folder_of(run.writer.run_dir, step)}")
        if step == run.config.train.max_steps:
            reached = {f"reached/{name}": value for name, value in (scores or {}).items()}
            run.monitor.hparams(flatten(run.config), reached)
    if not run.config.train.async_save:
        run.comm.barrier()
    run.watchdog.beat()
