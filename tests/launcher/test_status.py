"""What a run's folder says of the run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import status
from launcher.errors import UsageError

NOW_S = 1_800_000_000.0


def make_run(run: Path, steps: int, age_s: float = 1.0) -> Path:
    """A run of 100 steps that has written a line every 5 steps, which take 2 s each, and saved every 20."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("train: {max_steps: 100, timeout_s: 900}\n")
    starts = [
        {"host": "n1", "start_time": f"2026-01-0{day}T00:00:00Z", "ranks": 8, "started_by": "slurm", "first_step": at}
        for day, at in ((1, 0), (2, 20))
    ]
    (run / "run.json").write_text(json.dumps({"starts": starts}))
    log, metrics = ["2026-01-01 00:00:00,1 train: 8 ranks × 4 threads (slurm), from the start"], []
    for step in range(5, steps + 1, 5):
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(NOW_S + 2 * step))
        log.append(f"{stamp},123 train: step {step}  loss 1.0000  lr 1.0e-04  4.0 images/s")
        metrics.append({"global_step": step, "train/loss": 2.0 - step / 100})
        if step % 20 == 0:
            save(run, step, age_s + 60)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (run / "log.txt").write_text("".join(line + "\n" for line in log))
    for name in ("metrics.jsonl", "log.txt"):
        os.utime(run / name, (NOW_S - age_s, NOW_S - age_s))
    return run


def save(run: Path, step: int, age_s: float) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    os.utime(folder / "manifest.json", (NOW_S - age_s, NOW_S - age_s))


def test_a_running_run(tmp_path: Path) -> None:
    seen = status.read_status(make_run(tmp_path / "r", 50), NOW_S)
    assert (seen.state, seen.step, seen.max_steps, seen.silent_s) == ("running", 50, 100, 1.0)
    assert seen.eta_s == pytest.approx(100.0)
    assert seen.losses == [(30, 1.7), (35, 1.65), (40, 1.6), (45, 1.55), (50, 1.5)]
    assert (seen.checkpoint, seen.checkpoint_step, seen.checkpoint_age_s) == ("step-00000040", 40, 61.0)
    assert len(seen.starts) == 2 and "8 ranks (slurm), after step 20" in seen.starts[1]
    text = status.describe(seen)
    assert "running, step 50 of 100 (50%), 1:40 left" in text
    assert "step-00000040, 1:01 old, 10 steps back" in text and "restarts    1" in text


def test_finished_stopped_and_silent_runs_have_no_time_left(tmp_path: Path) -> None:
    silent = status.read_status(make_run(tmp_path / "silent", 50, age_s=901), NOW_S)
    stopped_run = make_run(tmp_path / "stopped", 50, age_s=901)
    with (stopped_run / "log.txt").open("a") as log:
        log.write("2027-01-15 08:00:00,1 train: stopped after step 50 of 100, resumable\n")
    stopped = status.read_status(stopped_run, NOW_S)
    finished = status.read_status(make_run(tmp_path / "finished", 100), NOW_S)
    assert [seen.state for seen in (silent, stopped, finished)] == ["silent", "stopped", "finished"]
    assert [seen.eta_s for seen in (silent, stopped, finished)] == [None] * 3


def test_the_pause_before_a_resumed_start_does_not_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", 20)
    with (run / "log.txt").open("a") as log:
        log.write("2026-01-02 00:00:00,1 train: 8 ranks × 4 threads (slurm), resumed from step-00000020\n")
        log.write("2026-01-02 00:01:00,1 train: step 25  loss 1.0\n2026-01-02 00:01:30,1 train: step 30  loss 1.0\n")
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"global_step": 30, "train/loss": 1.0, "evaluate/mae_deg": 9.0}\n{"global_step": 3')
    seen = status.read_status(run)
    assert seen.eta_s == pytest.approx(6.0 * 70)
    assert seen.scores == {"mae_deg": 9.0}
    assert status.progress(run) == (2, 20, 30)


def test_a_torn_checkpoint_does_not_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", 20)
    (run / "checkpoints" / "step-00000025").mkdir()
    assert status.read_status(run, NOW_S).checkpoint_step == 20


def test_a_copy_beside_the_checkpoints_is_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", 20)
    (run / "checkpoints" / "step-00000020").rename(run / "checkpoints" / "step-00000020.keep")
    save(run, 10, age_s=1)
    assert status.read_status(run, NOW_S).checkpoint == "step-00000010"
    assert status.progress(run).saved == 10


def test_a_run_just_begun_and_a_folder_without_one(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {max_steps: 100}\n")
    seen = status.read_status(tmp_path)
    assert (seen.state, seen.step, seen.checkpoint, seen.eta_s) == ("not begun", 0, None, None)
    assert "none yet" in status.describe(seen)
    with pytest.raises(UsageError, match="no run folder"):
        status.read_status(tmp_path / "nowhere")
    assert status.progress(tmp_path / "nowhere") == (0, 0, 0)


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "status", str(make_run(tmp_path / "r", 50))]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and json.loads(done.stdout)["step"] == 50
    wrong = subprocess.run([*command, "--jsn"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "--jsn" in wrong.stderr
