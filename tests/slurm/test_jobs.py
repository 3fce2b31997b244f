"""The batch scripts, submitted to a real Slurm of two virtual nodes; one rank on each."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from private_slurm import Slurm
from tiny_source import TinySource

from launcher.comm import single
from shards.write import build

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
SHARDS = [sys.executable, "-m", "shards"]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_shards_over_two_nodes_are_those_of_one_rank(slurm: Slurm, tmp_path: Path) -> None:
    subprocess.run([*SHARDS, "fixture", "biwi", tmp_path / "official"], cwd=ROOT, check=True, timeout=120)
    biwi = ["build", "biwi", str(tmp_path / "official"), "--samples-per-shard", "2", "--out"]
    words = ["--nodes=2", "--ntasks=2", "slurm/shards.sh", *biwi, str(tmp_path / "two")]
    job = slurm.submit(f"--output={tmp_path}/%j.log", "--export=ALL,HPE_SRUN=--verbose", *words, cwd=ROOT)
    subprocess.run([*SHARDS, *biwi, tmp_path / "alone"], cwd=ROOT, check=True, timeout=120)
    state, code, log = slurm.finish(job)
    assert (state, code) == ("COMPLETED", 0), log
    assert "srun: " in log, "HPE_SRUN reaches it"
    assert digests(tmp_path / "two") == digests(tmp_path / "alone")


def test_a_config_that_cannot_be_meant_is_the_jobs_exit_code(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("run_dir: runs/x\nmodel: {base: tiny}\nshards: {train: [], bach: 2}\n")
    words = ["--nodes=2", "--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=2"]
    job = slurm.submit(f"--output={tmp_path}/%j.log", *words, "slurm/train.sh", str(tmp_path / "wrong.yaml"), cwd=ROOT)
    state, code, log = slurm.finish(job)
    assert (state, code) == ("FAILED", 2), log
    assert "bach" in log and "Traceback" not in log


@pytest.mark.timeout(1200)
def test_restarts_are_bounded(slurm: Slurm, tmp_path: Path) -> None:
    """A run that saves and stops after every step goes back into the queue once, as it may, and keeps both steps."""
    build(TinySource(samples=4), tmp_path / "set", single(), 4)
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {"base": "tiny", "dtype": "fp32"},
        "adapter": {"rank": 4, "alpha": 8, "targets": ["language.attention"], "scope": "text"},
        "shards": {"train": [{"path": str(tmp_path / "set"), "ask": ["pose"]}], "batch": 2, "questions": 1},
        "train": {"max_steps": 5, "stop_after": 1, "warmup_steps": 1, "micro_batch": 1, "log_every": 1},
    }
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(config))
    flags = [f"--output={tmp_path}/%j.log", "--export=ALL,HPE_MAX_RESTARTS=1"]
    words = ["--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=1", "slurm/train.sh", str(tmp_path / "lora.yaml")]
    state, code, log = slurm.finish(slurm.submit(*flags, *words, cwd=ROOT), timeout_s=900)
    assert (state, code) == ("FAILED", 85), log
    assert log.count("back into the queue") == 1 and "restarted 1 times already" in log
    assert ", start 1\n" in log and ", start 2\n" in log and ", start 3\n" not in log
    assert json.loads((tmp_path / "run" / "last" / "trainer.json").read_text())["step"] == 2


def test_sbatch_from_elsewhere_is_told_where_to_go(slurm: Slurm, tmp_path: Path) -> None:
    words = [f"--output={tmp_path}/%j.log", "--ntasks=1", str(ROOT / "slurm/shards.sh"), "info", "x"]
    state, code, log = slurm.finish(slurm.submit(*words, cwd=tmp_path))
    assert (state, code) == ("FAILED", 2)
    assert "run sbatch from the project's root, or set HPE_HOME" in log
