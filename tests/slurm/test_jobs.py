"""The batch scripts, submitted to a real Slurm of two virtual nodes; one rank on each."""

import hashlib
import json
import time
from pathlib import Path

import pytest
from private_slurm import Slurm

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=2", "--time=10"]
SCENES = ["build", "synthetic", "--domain", "A", "--split", "train", "--scenes", "12"]


def submit(slurm: Slurm, folder: Path, *words: str) -> int:
    return slurm.submit(f"--output={folder}/%x-%j.log", *words, cwd=ROOT)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def shards(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set, built by two ranks on two nodes."""
    folder = tmp_path_factory.mktemp("shards")
    words = ["--nodes=2", "--ntasks=2", "slurm/shards.sh", *SCENES, "--out", str(folder / "a-train")]
    state, code, log = slurm.finish(submit(slurm, folder, *words))
    assert (state, code) == ("COMPLETED", 0), log
    return folder / "a-train"


def write_config(folder: Path, shards: Path, max_steps: int) -> Path:
    """The tiny model from random weights, every parameter trained; a checkpoint only at the end or on request."""
    path = folder / "tiny.yaml"
    path.write_text(
        f"""
run_dir: {folder}/run
model: {{base: tiny, random_init: true, dtype: fp32}}
adapter: null
shards: {{train: [{{path: {shards}}}], batch: 2}}
train: {{max_steps: {max_steps}, warmup_steps: 1, micro_batch: 1, save_every: 100000, log_every: 1}}
"""
    )
    return path


def steps(folder: Path) -> list[int]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line)["global_step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(slurm: Slurm, job: int, folder: Path) -> None:
    deadline_s = time.monotonic() + 300
    while not steps(folder):
        now = slurm.job(job)
        assert time.monotonic() < deadline_s and now["JobState"] in ("PENDING", "RUNNING"), slurm.log(now)
        time.sleep(0.5)


def test_shards_over_two_nodes_are_those_of_one_rank(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    words = ["--nodes=1", "--ntasks=1", "slurm/shards.sh", *SCENES, "--out", str(tmp_path / "alone")]
    state, code, log = slurm.finish(submit(slurm, tmp_path, *words))
    assert (state, code) == ("COMPLETED", 0), log
    assert digests(tmp_path / "alone") == digests(shards)


def test_train_over_two_nodes(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, shards, max_steps=4)
    state, code, log = slurm.finish(submit(slurm, tmp_path, *TWO_NODES, "slurm/train.sh", str(config)))
    assert (state, code) == ("COMPLETED", 0), log
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert (tmp_path / "run" / "last" / "manifest.json").exists()


def test_a_mistake_in_the_config_is_the_jobs_exit_code(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, shards, max_steps=4)
    words = [*TWO_NODES, "slurm/train.sh", str(config), "--train.learning_rate", "1"]
    state, code, log = slurm.finish(submit(slurm, tmp_path, *words))
    assert (state, code) == ("FAILED", 2), log
    assert "learning_rate" in log and "Traceback" not in log


def test_before_the_time_limit_it_saves_requeues_and_goes_on(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, shards, max_steps=40)
    job = submit(slurm, tmp_path, *TWO_NODES, "slurm/train.sh", str(config))
    wait_for_step(slurm, job, tmp_path)
    slurm.call("scancel", "--signal=USR1", "--batch", str(job))  # as --signal=B:USR1@120 does it
    state, code, log = slurm.finish(job)
    assert (state, code) == ("COMPLETED", 0), log
    assert slurm.job(job)["Restarts"] == "1" and "back into the queue" in log
    assert steps(tmp_path) == list(range(1, 41)), "no step is lost or done twice"


def test_a_preempted_run_goes_on_from_its_checkpoint(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, shards, max_steps=40)
    job = submit(slurm, tmp_path, *TWO_NODES, "slurm/train.sh", str(config), "--train.save_every", "1")
    wait_for_step(slurm, job, tmp_path)
    urgent = submit(slurm, tmp_path, "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    assert slurm.finish(urgent)[0] == "COMPLETED"
    state, code, log = slurm.finish(job)
    assert (state, code) == ("COMPLETED", 0), log
    assert slurm.job(job)["Restarts"] == "1"
    assert steps(tmp_path)[-1] == 40 and log.count("start 2") == 1


def test_a_cancelled_run_stays_cancelled(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, shards, max_steps=100_000)
    job = submit(slurm, tmp_path, *TWO_NODES, "slurm/train.sh", str(config))
    wait_for_step(slurm, job, tmp_path)
    slurm.call("scancel", str(job))
    state, _, log = slurm.finish(job)
    assert state == "CANCELLED" and slurm.job(job)["Restarts"] == "0", log
    assert "back into the queue" not in log


def test_restarts_are_bounded(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, shards, max_steps=4)
    words = ["--export=ALL,HPE_MAX_RESTARTS=0", *TWO_NODES, "slurm/train.sh", str(config), "--train.stop_after", "1"]
    state, code, log = slurm.finish(submit(slurm, tmp_path, *words))
    assert (state, code) == ("FAILED", 85), log
    assert "restarted 0 times already" in log


def test_sbatch_from_elsewhere_is_told_where_to_go(slurm: Slurm, tmp_path: Path) -> None:
    words = [f"--output={tmp_path}/%j.log", "--ntasks=1", str(ROOT / "slurm/shards.sh"), "info", "x"]
    state, code, log = slurm.finish(slurm.submit(*words, cwd=tmp_path))
    assert (state, code) == ("FAILED", 2)
    assert "run sbatch from the project's root, or set HPE_HOME" in log
