"""Long runs: judged on the way, disturbed, poisoned. Real ranks under the real launchers."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_model import write_tiny_model
from tiny_source import TinySource

from cogvlm_hpe.model.tokenizer import load_tokenizer
from launcher.comm import single
from launcher.world import free_port
from shards.record import Object
from shards.write import Sample, build

ROOT = Path(__file__).parents[3]
STEPS = 6
pytestmark = pytest.mark.slow


class OneOdd(TinySource):
    """One image of another object than all the others."""

    def sample(self, i: int) -> Sample:
        sample = super().sample(i)
        if i == 10:
            objects = [Object("QQQQ", thing.bbox) for thing in sample.record.objects]
            sample = dataclasses.replace(sample, record=dataclasses.replace(sample.record, objects=objects))
        return sample


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shard sets, a base that answers in format now and then, and a config."""
    folder = tmp_path_factory.mktemp("survival")
    build(OneOdd(samples=24), folder / "set", single(), 8)
    build(TinySource(samples=7, split="val"), folder / "val", single(), 8)
    write_tiny_model(folder / "base", folder / "set", steps=60)
    config = {
        "run_dir": str(folder / "unset"),
        "model": {"base": str(folder / "base"), "dtype": "fp32"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["language.attention"], "scope": "text"},
        "shards": {
            "train": [{"path": str(folder / "set"), "ask": ["pose", "where"]}],
            "val": [{"path": str(folder / "val"), "ask": ["pose", "where"]}],
            "batch": 8,
        },
        "train": {
            "max_steps": STEPS, "lr": 0.01, "warmup_steps": 1, "micro_batch": 2, "zero_stage": 3,
            "save_every": 1, "log_every": 1, "async_save": True,
        },
        "evaluate": {"batch": 2, "questions": 3, "limit": 5, "max_new_tokens": 18},
    }  # fmt: skip
    (folder / "lora.yaml").write_text(yaml.safe_dump(config))
    return folder


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def train(place: Path, run: str, *more: str, ranks: int = 1) -> subprocess.CompletedProcess:
    words = ["train", "--config", str(place / "lora.yaml"), "--run_dir", str(place / run), *more]
    argv = [sys.executable, "-m", "cogvlm_hpe", *words]
    if ranks > 1:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        argv = [deepspeed, "--num_gpus", str(ranks), "--master_port", str(free_port()), "--module", "cogvlm_hpe"]
    return subprocess.run([*argv, *(words if ranks > 1 else [])], capture_output=True, text=True, env=environment())


def scores(place: Path, run: str) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (place / run / "metrics.jsonl").read_text().splitlines())
    return {v.pop("global_step"): v for v in lines if any(name.startswith("evaluate/") for name in v)}


def test_a_run_is_judged_alike_on_any_ranks_and_stage(place: Path) -> None:
    """Two ranks under ZeRO-3, where ranks have unequal shares, and one rank without."""
    how = ("--train.evaluate_every", "2", "--train.max_steps", "3")
    for run, ranks, stage in (("one", 1, "1"), ("split", 2, "3")):
        done = train(place, run, *how, "--train.zero_stage", stage, ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, split = scores(place, "one"), scores(place, "split")
    assert list(one) == [0, 2, 3] and one[0] == split[0]
    assert one[0]["evaluate/grounding_lost"] == 0.0
    assert {"evaluate/geodesic_deg", "evaluate/pose_valid", "evaluate/grounding_accuracy"} <= one[3].keys()
    assert one[0] != one[3], "the model has moved"
    for run in ("one", "split"):
        judged = {step: values["evaluate/geodesic_deg"] for step, values in scores(place, run).items() if step}
        best = json.loads((place / run / "best" / "hpe.json").read_text())["scores"]["geodesic_deg"]
        assert best == pytest.approx(min(judged.values()), rel=1e-6)
    events = EventAccumulator(str(place / "split" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"evaluate/by_yaw", "evaluate/worst"} <= set(tags["images"])
    assert {"evaluate/geodesic_deg", "adapter/norm_language.attention", "train/tokens_per_s"} <= set(tags["scalars"])


def test_kills_and_a_signal_to_one_rank_change_nothing(place: Path) -> None:
    """The short version of benchmarks/chaos.py: one kill -9, one request to one rank alone, same bytes in the end."""
    words = ["--config", str(place / "lora.yaml"), "--dir", str(place), "--kills", "1", "--signals", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), *words],
        capture_output=True, text=True, env=environment(PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the adapters are the same bytes: True" in done.stdout
    assert "signal: " in done.stdout and "exit code 85" in done.stdout


@pytest.fixture(scope="module")
def poisoned(place: Path) -> Path:
    """The base with an infinite embedding for a letter that one sample alone has."""
    folder = place / "poisoned"
    folder.mkdir()
    for path in (place / "base").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    tokenizer = load_tokenizer(folder, len(weights["model.embed_tokens.weight"]))
    letter = tokenizer.encode("Q", add_special_tokens=False).ids[-1]
    weights["model.embed_tokens.weight"][letter] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nonfinite_step_changes_nothing(place: Path, poisoned: Path) -> None:
    """At stage 0, where DeepSpeed itself would let it through."""
    words = ["--config", str(place / "lora.yaml"), "--run_dir", str(place / "bad"), "--train.zero_stage", "0"]
    words += ["--model.base", str(poisoned), "--train.micro_batch", "1"]
    port = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    program = [sys.executable, str(Path(__file__).with_name("poisoned_ranks.py")), str(place / "seen"), *words]
    ranks = [
        subprocess.Popen(program, env=environment(**port, RANK=str(rank), LOCAL_RANK=str(rank), PYTHONPATH=str(ROOT)))
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=540) for process in ranks] == [0, 0]
    seen = [json.loads((place / f"seen.{rank}").read_text()) for rank in (0, 1)]
    odd = "tiny-train-000010"
    assert sum(odd in of_rank["keys"] for of_rank in seen) == 1, "one rank has it"
    assert all(of_rank["same"] for of_rank in seen)
    assert all(f"among the samples {odd};" in of_rank["said"] for of_rank in seen)
