"""The batch scripts, submitted to a real Slurm of two virtual nodes; one rank on each."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from private_slurm import Slurm

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
SHARDS = [sys.executable, "-m", "shards"]
# A launcher that has saved and stopped at once: what train.sh makes of exit code 85 is its own affair.
STOPPED = "#!/bin/bash\necho start $((${SLURM_RESTART_COUNT:-0} + 1)) with $*\nexit 85\n"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_shards_over_two_nodes_are_those_of_one_rank(slurm: Slurm, tmp_path: Path) -> None:
    subprocess.run([*SHARDS, "fixture", "biwi", tmp_path / "official"], cwd=ROOT, check=True, timeout=120)
    build = ["build", "biwi", str(tmp_path / "official"), "--samples-per-shard", "2", "--out"]
    words = ["--nodes=2", "--ntasks=2", "slurm/shards.sh", *build, str(tmp_path / "two")]
    job = slurm.submit(f"--output={tmp_path}/%j.log", "--export=ALL,HPE_SRUN=--verbose", *words, cwd=ROOT)
    subprocess.run([*SHARDS, *build, tmp_path / "alone"], cwd=ROOT, check=True, timeout=120)
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


def test_restarts_are_bounded(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "common.sh").write_text((ROOT / "slurm" / "common.sh").read_text())
    (tmp_path / "hpe-launch").write_text(STOPPED)
    (tmp_path / "hpe-launch").chmod(0o755)
    (tmp_path / "slurm" / "site.conf").write_text(f"PATH={tmp_path}:$PATH\nHPE_MAX_RESTARTS=1\n")
    words = ["--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=1", str(ROOT / "slurm" / "train.sh"), "x.yaml"]
    job = slurm.submit(f"--output={tmp_path}/%j.log", *words, cwd=tmp_path)
    state, code, log = slurm.finish(job)
    assert (state, code) == ("FAILED", 85), log
    assert "start 1 with train x.yaml\n" in log and "start 2 with train x.yaml --resume\n" in log
    assert log.count("back into the queue") == 1 and "restarted 1 times already" in log


def test_sbatch_from_elsewhere_is_told_where_to_go(slurm: Slurm, tmp_path: Path) -> None:
    words = [f"--output={tmp_path}/%j.log", "--ntasks=1", str(ROOT / "slurm/shards.sh"), "info", "x"]
    state, code, log = slurm.finish(slurm.submit(*words, cwd=tmp_path))
    assert (state, code) == ("FAILED", 2)
    assert "run sbatch from the project's root, or set HPE_HOME" in log
