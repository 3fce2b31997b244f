"""The demo: every stage for real, at sizes that teach nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogvlm_hpe.demo import QUICK, Sizes, plan


def demo(folder: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "cogvlm_hpe", "demo", "--dir", str(folder), *more],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=1200,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_flow_runs_and_finished_stages_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    done = demo(folder, "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("shards/a-train", "shards/a-val", "shards/a-test", "shards/b-test"):
        assert (folder / name / "index.json").is_file()
    for name in ("report.md", "report.html", "base/tensorboard", "lora/tensorboard", "lora/metrics.jsonl", "merged"):
        assert (folder / name).exists(), name
    step = json.loads((folder / "lora" / "last" / "trainer.json").read_text())["step"]
    assert step == QUICK.max_steps
    for on in ("a-test", "b-test"):
        for system in ("base", "lora", "merged"):
            scores = json.loads((folder / "evaluation" / on / system / "metrics.json").read_text())
            assert scores["set"]["images"] == QUICK.test_scenes
    assert "- **merged**: the paper's merge" in (folder / "report.md").read_text()
    card = (folder / "merged" / "README.md").read_text()
    assert "merged by `layerwise`" in card and "## Evaluation" in card and "model-index:" in card
    again = demo(folder, "--quick")
    stages = plan(folder, QUICK, nproc=2)
    assert again.returncode == 0
    assert again.stdout.count("finished before, kept") == len(stages)


def test_results_of_other_sizes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "demo.json").write_text(json.dumps({"sizes": {"train_scenes": 1}, "nproc": 2}))
    done = demo(folder)
    assert done.returncode == 1
    assert "remove it" in done.stderr and "Traceback" not in done.stderr


def test_every_stage_is_a_command_of_this_project(tmp_path: Path) -> None:
    for stage in plan(tmp_path, Sizes(), nproc=2):
        if isinstance(stage.work, list):
            assert stage.work[1:3] in (["-m", "launcher"], ["-m", "cogvlm_hpe"])
