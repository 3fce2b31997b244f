"""The whole chain by one command on a real Slurm: to the report, or cancelled where its first stage fails."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from private_slurm import Slurm
from tiny_source import TinySource

from launcher.comm import single
from shards.write import build

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
BASE = ROOT / "cogvlm_hpe" / "configs" / "tiny"
STAGES = ["weak", "supervised", "merge", "continued", "evaluate", "report", "failed"]
SMALL = {
    "TRAIN_SBATCH": "--nodes=2 --ntasks-per-node=1 --gres=gpu:1 --cpus-per-task=1 --time=10",
    "MERGE_SBATCH": "--cpus-per-task=1 --mem=1000 --time=10",
    "EVALUATE_SBATCH": "--ntasks-per-node=1 --gres=gpu:1 --cpus-per-task=1 --time=10",
    "REPORT_SBATCH": "--cpus-per-task=1 --time=10",
    "EVALUATE_WORDS": "--limit 2 --tasks pose",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small set and a config of the packaged base."""
    folder = tmp_path_factory.mktemp("pipeline")
    build(TinySource(samples=8), folder / "set", single(), 8)
    config = {
        "run_dir": "unset",
        "model": {"base": "unset", "dtype": "fp32"},
        "adapter": {"rank": 4, "alpha": 8, "targets": ["language.attention"], "scope": "text"},
        "shards": {"train": [{"path": str(folder / "set"), "ask": ["pose"]}], "batch": 2, "questions": 1},
        "train": {"max_steps": 2, "warmup_steps": 1, "micro_batch": 1},
    }
    for stage in ("weak", "supervised", "continued"):
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(config))
    return folder


def submit(slurm: Slurm, place: Path, out: Path, *more: str, **env: str) -> "subprocess.CompletedProcess[str]":
    stages = [word for stage in ("weak", "continued") for word in (f"--{stage}", str(place / f"{stage}.yaml"))]
    words = [*stages, str(place / "supervised.yaml"), str(BASE), str(place / "set"), str(out), *more]
    command = ["slurm/pipeline.sh", *words]
    return subprocess.run(command, cwd=ROOT, env=slurm.env | SMALL | env, capture_output=True, text=True, timeout=60)


def jobs_of(said: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"^(\S+) +job (\d+)", said, re.MULTILINE)}


@pytest.mark.timeout(1800)
def test_all_stages_run_to_the_report(slurm: Slurm, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = submit(slurm, place, out)
    assert done.returncode == 0, done.stderr
    jobs = jobs_of(done.stdout)
    assert list(jobs) == STAGES and f"hpe-launch status {out}/supervised" in done.stdout
    failed = jobs.pop("failed")
    for name, job in jobs.items():
        state, code, log = slurm.finish(job)
        assert (state, code) == ("COMPLETED", 0), f"{name}: {log}"
    for stage, before in (("supervised", "weak/last"), ("continued", "merged")):
        config = yaml.safe_load((out / stage / "config.yaml").read_text())
        assert config["adapter"]["init"] == f"{out}/{before}"
    report = (out / "report.md").read_text()
    assert all(system in report for system in ("base", "weak", "supervised", "merged", "continued"))
    assert (out / "report.html").exists()
    assert slurm.finish(failed)[0] == "CANCELLED" and not (out / "FAILED.txt").exists()


def test_a_failed_stage_cancels_those_after_it_and_says_so(slurm: Slurm, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "site.conf").write_text('[ "${SLURM_JOB_NAME:-}" != hpe-weak ] || exit 3\n')
    jobs = jobs_of(submit(slurm, place, out, HPE_SITE=str(tmp_path / "site.conf")).stdout)
    assert slurm.finish(jobs.pop("weak"))[:2] == ("FAILED", 3)
    assert slurm.finish(jobs.pop("failed"))[0] == "COMPLETED"
    assert [slurm.finish(job)[0] for job in jobs.values()] == ["CANCELLED"] * 5
    told = (out / "FAILED.txt").read_text()
    assert re.search(
        rf"^hpe-weak \(job \d+\): FAILED, exit code 3; its log: {out}/hpe-weak-\d+\.log$", told, re.MULTILINE
    )


def test_what_cannot_go_well_is_refused_before_anything_is_submitted(slurm: Slurm, place: Path, tmp_path: Path) -> None:
    dense = submit(slurm, place, tmp_path / "out", MERGE_WORDS="--method ties --density 0.2 --output hf")
    assert dense.returncode == 2 and "leave --output out" in dense.stderr
    wrong = submit(slurm, place, tmp_path / "out", "--train.max_steps", "0")
    assert wrong.returncode == 2 and "train.max_steps 0" in wrong.stderr and "nothing was submitted" in wrong.stderr
    (tmp_path / "out").mkdir()
    there = submit(slurm, place, tmp_path / "out")
    assert there.returncode == 2 and "is there already" in there.stderr and there.stdout == ""
    assert slurm.call("squeue", "-h") == ""
