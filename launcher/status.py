"""`hpe-launch status`: what a run's folder says of it, from anywhere that sees the folder; no process is asked."""

import json
import re
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from launcher.errors import UsageError
from launcher.progress import clock

_LOSSES = 5
_LINES = 50  # of the log, from which the speed is taken
_STEP_LINE = re.compile(r"([\d-]{10} [\d:]{8}),\d+ train: step (\d+)  ")
_CHECKPOINT = re.compile(r"step-\d+")  # step-00004000.keep is somebody's copy
_START = " ranks × "  # in the first line that a start writes


@dataclass(frozen=True)
class Status:
    """A run as its folder shows it. Times in seconds; `losses` are (step, loss), oldest first."""

    run: str
    state: str
    """finished, stopped (resumable), running, silent (for longer than train.timeout_s), or not begun."""
    step: int
    max_steps: int
    silent_s: float
    """Since anything was written."""
    eta_s: float | None
    """Until max_steps at the last lines' speed, judging and saving included; None before there are two lines."""
    losses: list[tuple[int, float]]
    starts: list[str]
    """One text a start: when, where, on how many ranks, after which step."""
    checkpoint: str | None
    checkpoint_step: int
    checkpoint_age_s: float | None
    best: str | None
    scores: dict[str, float]
    """Of the last judgement while training."""


def read_status(run: Path, now_s: float | None = None) -> Status:
    """The status of the run in folder `run` at Unix time `now_s`. Raises UsageError where there is none."""
    import yaml

    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        train = config["train"]
        max_steps, timeout_s = int(train["max_steps"]), float(train.get("timeout_s", 900.0))
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        raise UsageError(f"{run}: no run folder (no config.yaml of a run in it); name the run_dir of a run") from None
    now_s = time.time() if now_s is None else now_s
    metrics, log = _json_lines(run / "metrics.jsonl"), _text_lines(run / "log.txt")
    written = [path.stat().st_mtime for name in ("metrics.jsonl", "log.txt") if (path := run / name).exists()]
    silent_s = max(0.0, now_s - max(written, default=now_s))
    losses = [(int(line["global_step"]), float(line["train/loss"])) for line in metrics if "train/loss" in line]
    saved = _newest(run)
    saved_step = _step_of(saved)
    step = max(losses[-1][0] if losses else 0, saved_step)
    state = _state(log, step, saved_step, max_steps, silent_s > timeout_s)
    judged = [line for line in metrics if any(key.startswith("evaluate/") for key in line)][-1:]
    seconds = _seconds_a_step(log) if state == "running" else None
    return Status(
        run=str(run),
        state=state,
        step=step,
        max_steps=max_steps,
        silent_s=silent_s,
        eta_s=None if seconds is None else seconds * (max_steps - step),
        losses=losses[-_LOSSES:],
        starts=_starts(run / "run.json"),
        checkpoint=saved.name if saved else None,
        checkpoint_step=saved_step,
        checkpoint_age_s=max(0.0, now_s - (saved / "manifest.json").stat().st_mtime) if saved else None,
        best=(run / "best").resolve().name if (run / "best").exists() else None,
        scores={key.removeprefix("evaluate/"): line[key] for line in judged for key in line if "evaluate/" in key},
    )


class Progress(NamedTuple):
    """How far a run is: how often it has begun, and the last global step it has saved and has written down, or 0."""

    starts: int
    saved: int
    made: int


def progress(run: Path) -> Progress:
    """What `run` has written of its progress; all 0 where there is none."""
    steps = [int(line["global_step"]) for line in _json_lines(run / "metrics.jsonl")]
    saved = _step_of(_newest(run))
    return Progress(len(_starts(run / "run.json")), saved, max([*steps, saved]))


def describe(status: Status) -> str:
    """The status for people, one line a thing."""
    share = status.step / max(1, status.max_steps)
    left = f", {clock(status.eta_s)} left" if status.eta_s is not None else ""
    heard = f"last heard of {clock(status.silent_s)} ago"
    lines = [f"{status.run}: {status.state}, step {status.step} of {status.max_steps} ({share:.0%}){left}; {heard}"]
    if status.losses:
        lines.append("loss        " + "  ".join(f"{loss:.4f} (step {step})" for step, loss in status.losses))
    if status.scores:
        plain = {name: value for name, value in status.scores.items() if "/" not in name}
        lines.append("judged      " + "  ".join(f"{name} {value:.4g}" for name, value in plain.items()))
    if status.checkpoint_age_s is not None:
        behind = status.step - status.checkpoint_step
        best = f"; best is {status.best}" if status.best else ""
        lines.append(
            f"checkpoint  {status.checkpoint}, {clock(status.checkpoint_age_s)} old, {behind} steps back{best}"
        )
    else:
        lines.append("checkpoint  none yet")
    lines.append(f"restarts    {max(0, len(status.starts) - 1)}")
    lines += [f"  start {number}   {text}" for number, text in enumerate(status.starts, 1)]
    return "\n".join(lines)


def as_json(status: Status) -> str:
    """The status for programs."""
    return json.dumps(asdict(status), indent=1)


def _state(log: list[str], step: int, saved_step: int, max_steps: int, silent: bool) -> str:
    if log and "train: stopped after step" in log[-1]:
        return "stopped"  # be it after the last step, before it was judged
    if saved_step >= max_steps:
        return "finished"
    if silent:
        return "silent"
    return "running" if log or step else "not begun"


def _seconds_a_step(log: list[str]) -> float | None:
    """Over the last lines of this start: a pause between two starts does not count."""
    begun = max((number for number, line in enumerate(log) if _START in line), default=0)
    seen = [match for line in log[begun:] if (match := _STEP_LINE.match(line))][-_LINES:]
    if len(seen) < 2 or int(seen[-1][2]) <= int(seen[0][2]):
        return None
    first_s, last_s = (datetime.fromisoformat(match[1]).timestamp() for match in (seen[0], seen[-1]))
    return (last_s - first_s) / (int(seen[-1][2]) - int(seen[0][2]))


def _starts(path: Path) -> list[str]:
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        return [
            f"{one['start_time']} on {one['host']}, {one['ranks']} ranks ({one['started_by']}), "
            f"after step {one['first_step']}"
            for one in starts
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _newest(run: Path) -> Path | None:
    whole = [path.parent for path in sorted(run.glob("checkpoints/step-*/manifest.json"))]
    return next((folder for folder in reversed(whole) if _CHECKPOINT.fullmatch(folder.name)), None)


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def _text_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """A line that is just being written is left out."""
    found = []
    for line in _text_lines(path):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "global_step" in value:
            found.append(value)
    return found
