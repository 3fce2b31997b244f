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
STAGES = ["train", "merge", "evaluate-base", "evaluate-lora", "evaluate-merged", "report"]
SMALL = {
    "TRAIN_SBATCH": "--nodes=2 --ntasks-per-node=1 --gres=gpu:1 --cpus-per-task=2 --time=10",
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
    (folder / "lora.yaml").write_text(yaml.safe_dump(config))
    return folder


def submit(slurm: Slurm, place: Path, out: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    words = ["slurm/pipeline.sh", str(place / "lora.yaml"), str(BASE), str(place / "set"), str(out), *more]
    return subprocess.run(words, cwd=ROOT, env=slurm.env | SMALL, capture_output=True, text=True, timeout=60)


def jobs_of(said: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"^(\S+) +job (\d+)", said, re.MULTILINE)}


def test_all_stages_run_to_the_report(slurm: Slurm, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = submit(slurm, place, out)
    assert done.returncode == 0, done.stderr
    jobs = jobs_of(done.stdout)
    assert list(jobs) == STAGES and f"hpe-launch status {out}/lora" in done.stdout
    for name, job in jobs.items():
        state, code, log = slurm.finish(job, timeout_s=400)
        assert (state, code) == ("COMPLETED", 0), f"{name}: {log}"
    assert "merged" in (out / "report.md").read_text()
    assert (out / "report.html").exists()


def test_a_failed_stage_cancels_those_after_it(slurm: Slurm, place: Path, tmp_path: Path) -> None:
    jobs = jobs_of(submit(slurm, place, tmp_path / "out", "--train.max_steps", "0").stdout)
    state, code, log = slurm.finish(jobs.pop("train"))
    assert (state, code) == ("FAILED", 2) and "train.max_steps 0" in log
    assert [slurm.finish(job)[0] for job in jobs.values()] == ["CANCELLED"] * 5


def test_what_cannot_go_well_is_refused_before_anything_is_submitted(slurm: Slurm, place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    there = submit(slurm, place, tmp_path / "out")
    assert there.returncode == 2 and "is there already" in there.stderr and there.stdout == ""
    assert slurm.call("squeue", "-h") == ""
