"""Real runs under the real launchers: the ranks do not matter, nor does an interruption."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_model import write_tiny_model
from tiny_source import TinySource

from launcher.comm import single
from launcher.world import free_port
from shards.write import build

STEPS = 4
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shard set, a tiny base and a LoRA config."""
    folder = tmp_path_factory.mktemp("train")
    build(TinySource(samples=24), folder / "set", single(), 8)
    write_tiny_model(folder / "base", folder / "set", steps=1)
    config = {
        "run_dir": str(folder / "unset"),
        "model": {"base": str(folder / "base"), "dtype": "fp32"},
        "adapter": {"rank": 4, "alpha": 8, "targets": ["language.attention", "language.mlp"], "scope": "text"},
        "shards": {"train": [{"path": str(folder / "set"), "ask": ["pose", "where"]}], "batch": 8},
        "train": {"max_steps": STEPS, "lr": 0.01, "warmup_steps": 1, "micro_batch": 2, "save_every": 2, "log_every": 1},
    }
    (folder / "lora.yaml").write_text(yaml.safe_dump(config))
    return folder


def train(place: Path, run: str, *more: str, ranks: int = 1) -> subprocess.CompletedProcess:
    words = ["train", "--config", str(place / "lora.yaml"), "--run_dir", str(place / run), *more]
    if ranks == 1:
        argv = [sys.executable, "-m", "cogvlm_hpe", *words]
    else:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        argv = [deepspeed, "--num_gpus", str(ranks), "--master_port", str(free_port())]
        argv += ["--module", "cogvlm_hpe", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=540)


def losses(place: Path, run: str) -> list[float]:
    lines = map(json.loads, (place / run / "metrics.jsonl").read_text().splitlines())
    return [values["train/loss"] for values in lines if "train/loss" in values]


@pytest.fixture(scope="module")
def whole_run(place: Path) -> str:
    """One rank, from start to end."""
    done = train(place, "whole")
    assert done.returncode == 0, done.stderr
    return "whole"


def test_two_ranks_train_like_one(place: Path, whole_run: str) -> None:
    done = train(place, "two", ranks=2)
    assert done.returncode == 0, done.stderr
    assert len(losses(place, "two")) == STEPS
    assert losses(place, "two") == pytest.approx(losses(place, whole_run), rel=1e-5)
    one, two = (load_file(place / run / "last" / "adapter_model.safetensors") for run in (whole_run, "two"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    assert max(float(two[name].abs().max()) for name in two if "lora_B" in name) > 1e-3


def test_resume_is_bitwise_equal_on_another_micro_batch_and_stage(place: Path, whole_run: str) -> None:
    assert train(place, "halves", "--train.stop_after", "2").returncode == 85
    done = train(place, "halves", "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(place, "halves") == losses(place, whole_run)
    a, b = (place / run / "last" / "adapter_model.safetensors" for run in ("halves", whole_run))
    assert a.read_bytes() == b.read_bytes()


def test_another_world_size_and_zero_stage_go_on_with_the_same_losses(place: Path, whole_run: str) -> None:
    assert train(place, "other", "--train.stop_after", "2").returncode == 85
    done = train(place, "other", "--resume", "--train.zero_stage", "3", ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(place, "other") == pytest.approx(losses(place, whole_run), rel=1e-5)


def test_a_whole_model_goes_on_split_over_ranks(place: Path) -> None:
    whole = ("--adapter", "null", "--train.lr", "0.001")
    done = train(place, "model", *whole, "--train.zero_stage", "1")
    assert done.returncode == 0, done.stderr
    assert train(place, "split", *whole, "--train.stop_after", "2").returncode == 85
    done = train(place, "split", *whole, "--resume", "--train.zero_stage", "3", ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(place, "split") == pytest.approx(losses(place, "model"), rel=1e-5)


def test_a_run_folder_tells_its_story(place: Path, whole_run: str) -> None:
    run = place / whole_run
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "run.json", "log.txt", "metrics.jsonl", "tensorboard", "checkpoints", "last"} <= names
    assert (run / "last").resolve() == (run / "checkpoints" / f"step-{STEPS:08d}").resolve()
    start = json.loads((run / "run.json").read_text())["starts"][0]
    assert (start["ranks"], start["threads_per_rank"]) == (1, 1)
    assert any((run / "tensorboard").iterdir())
    log = (run / "log.txt").read_text()
    assert re.search(r"language\.attention +2 +8 +1,536  float32", log) and "parameters train (" in log


def test_the_adapter_is_plain_peft(place: Path, whole_run: str) -> None:
    from peft import PeftModel

    from cogvlm_hpe.model.load import load_base

    model = PeftModel.from_pretrained(load_base(place / "base"), str(place / whole_run / "last"))
    saved = load_file(place / whole_run / "last" / "adapter_model.safetensors")
    held = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert held.keys() == saved.keys()
    assert all(held[name].equal(saved[name]) for name in saved)


def test_mistakes_are_one_line(place: Path, whole_run: str) -> None:
    for words, names, code in (
        (("--shards.train", '[{"path": "/no/such/set"}]'), "/no/such/set", 1),
        (("--model.base", "/no/such/base"), "/no/such/base", 1),
        (("--shards.batch", "9"), "micro_batch", 2),
    ):
        done = train(place, "wrong", *words)
        lines = [line for line in done.stderr.splitlines() if line.startswith("cogvlm-hpe: error:")]
        assert done.returncode == code, done.stderr
        assert len(lines) == 1 and names in lines[0]
        assert "Traceback" not in done.stderr
    again = train(place, whole_run)
    assert again.returncode == 1 and "--resume" in again.stderr
    changed = train(place, whole_run, "--resume", "--train.lr", "0.5")
    assert changed.returncode == 1 and "train.lr: 0.01 -> 0.5" in changed.stderr


def test_a_base_under_muon_resumes_bitwise_and_trains_alike_on_two_ranks(place: Path) -> None:
    words = ["--adapter", "null", "--train.optimizer", "muon", "--train.zero_stage", "0"]
    words += ["--train.auxiliary", '{"dense": 0.3, "guidance": 0.3, "guided_layer": 1, "guided_heads": 1}']
    assert train(place, "base-whole", *words).returncode == 0
    assert train(place, "base-halves", *words, "--train.stop_after", "2").returncode == 85
    done = train(place, "base-halves", *words, "--resume")
    assert done.returncode == 0, done.stderr
    files = [place / run / "last" / "model.safetensors" for run in ("base-whole", "base-halves")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert train(place, "base-two", *words, ranks=2).returncode == 0
    assert losses(place, "base-two") == pytest.approx(losses(place, "base-whole"), rel=1e-4)
