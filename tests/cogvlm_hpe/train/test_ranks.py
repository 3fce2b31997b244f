"""Real runs on real ranks: how many there are does not matter, nor does an interruption."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import yaml
from ports import next_port
from safetensors.torch import load_file
from tiny_model import write_tiny_model
from tiny_source import TinySource

from cogvlm_hpe.merge.factors import read_adapter
from launcher.comm import single
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


def words_of(place: Path, run: str, *more: str) -> list[str]:
    return ["--config", str(place / "lora.yaml"), "--run_dir", str(place / run), *more]


def train(place: Path, run: str, *more: str, ranks: int = 1) -> tuple[int, str]:
    """Exit code and output."""
    started = forked.train(words_of(place, run, *more), ranks, place / f"{run}.txt")
    return started.wait(), started.said


def must_train(place: Path, run: str, *more: str, ranks: int = 1, code: int = 0) -> None:
    found, said = train(place, run, *more, ranks=ranks)
    assert found == code, said


def adapter_of(place: Path, run: str) -> Path:
    return place / run / "last" / "adapter_model.safetensors"


def losses(place: Path, run: str) -> list[float]:
    lines = map(json.loads, (place / run / "metrics.jsonl").read_text().splitlines())
    return [values["train/loss"] for values in lines if "train/loss" in values]


@pytest.fixture(scope="module")
def whole_run(place: Path) -> str:
    """One rank, from start to end."""
    must_train(place, "whole")
    return "whole"


@pytest.fixture(scope="module")
def two_ranks(place: Path) -> str:
    """Two ranks, from start to end, through DeepSpeed's own launcher."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    argv = [deepspeed, "--num_gpus", "2", "--master_port", str(next_port()), "--module", "cogvlm_hpe", "train"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*argv, *words_of(place, "two")], capture_output=True, text=True, env=env, timeout=540)
    assert done.returncode == 0, done.stderr
    return "two"


@pytest.fixture(scope="module")
def half_run(place: Path) -> str:
    """One rank, stopped half way."""
    must_train(place, "half", "--train.stop_after", "2", code=85)
    return "half"


def test_two_ranks_train_like_one(place: Path, whole_run: str, two_ranks: str) -> None:
    assert len(losses(place, two_ranks)) == STEPS
    assert losses(place, two_ranks) == pytest.approx(losses(place, whole_run), rel=1e-5)
    one, two = (load_file(adapter_of(place, run)) for run in (whole_run, two_ranks))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    assert max(float(two[name].abs().max()) for name in two if "lora_B" in name) > 1e-3


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2)])
def test_resume_is_bitwise_equal(
    place: Path, ranks: int, workers: int, half_run: str, request: pytest.FixtureRequest
) -> None:
    run, how = f"halves-{ranks}-{workers}", ("--shards.workers", str(workers))
    if (ranks, workers) == (1, 0):
        shutil.copytree(place / half_run, place / run, symlinks=True)
    else:
        must_train(place, run, *how, "--train.stop_after", "2", ranks=ranks, code=85)
    must_train(place, run, *how, "--resume", ranks=ranks)
    undisturbed = request.getfixturevalue({1: "whole_run", 2: "two_ranks"}[ranks])
    assert losses(place, run) == losses(place, undisturbed)
    assert adapter_of(place, run).read_bytes() == adapter_of(place, undisturbed).read_bytes()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_of_a_bf16_run_are_gone_on_with_to_the_last_bit(place: Path, stage: int) -> None:
    """Masters hold more digits than the weights that work: resumed from those alone, other bytes come out."""
    how = ("--model.dtype", "bf16", "--train.zero_stage", str(stage), "--train.lr", "0.001")
    must_train(place, f"bf16-whole-{stage}", *how)
    must_train(place, f"bf16-halves-{stage}", *how, "--train.stop_after", "2", code=85)
    must_train(place, f"bf16-halves-{stage}", *how, "--resume")
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, other = (place / f"bf16-{run}-{stage}" / "last" / name for run in ("whole", "halves"))
        assert one.read_bytes() == other.read_bytes()
    saved = load_file(adapter_of(place, f"bf16-whole-{stage}"))
    assert any(not tensor.equal(tensor.bfloat16().float()) for tensor in saved.values())


def test_resume_on_other_world_size_keeps_global_batches(place: Path, whole_run: str, half_run: str) -> None:
    """And on another ZeRO stage and micro-batch."""
    shutil.copytree(place / half_run, place / "other", symlinks=True)
    must_train(place, "other", "--resume", "--train.zero_stage", "3", "--train.micro_batch", "4", ranks=2)
    assert losses(place, "other") == pytest.approx(losses(place, whole_run), rel=1e-5)


def test_a_whole_model_goes_on_split_over_ranks(place: Path) -> None:
    whole = ("--adapter", "null", "--train.lr", "0.001")
    must_train(place, "model", *whole, "--train.zero_stage", "1")
    must_train(place, "split", *whole, "--train.stop_after", "2", code=85)
    must_train(place, "split", *whole, "--resume", "--train.zero_stage", "3", ranks=2)
    assert losses(place, "split") == pytest.approx(losses(place, "model"), rel=1e-5)


def test_a_stage_takes_over_an_adapter_or_stands_on_it(place: Path, whole_run: str) -> None:
    """`init` and `stack` begin with the same model; what is stacked holds both, and goes on split over ranks."""
    before = str(place / whole_run / "last")
    init = place / "init"
    shutil.copytree(before, init)
    must_train(place, "taken", "--adapter.init", str(init), "--train.stop_after", "1", code=85)
    shutil.rmtree(init)
    must_train(place, "taken", "--adapter.init", str(init), "--resume")  # which has no more use for it
    stack = ("--adapter.stack", before, "--adapter.rank", "2", "--adapter.targets", "[language.attention]")
    must_train(place, "stacked", *stack)
    must_train(place, "stacked-half", *stack, "--train.stop_after", "2", code=85)
    must_train(place, "stacked-half", *stack, "--resume", "--train.zero_stage", "3", ranks=2)
    assert losses(place, "taken")[0] == pytest.approx(losses(place, "stacked")[0], rel=1e-6)
    assert losses(place, "stacked")[0] < losses(place, whole_run)[0] - 0.01
    assert losses(place, "stacked-half") == pytest.approx(losses(place, "stacked"), rel=1e-5)
    ranks = {name: factor.rank for name, factor in read_adapter(place / "stacked" / "last").factors.items()}
    assert {rank for name, rank in ranks.items() if "self_attn" in name} == {4 + 2}
    assert {rank for name, rank in ranks.items() if "mlp" in name} == {4}


def test_float32_sums_of_bf16_gradients_can_be_offloaded(place: Path) -> None:
    bf16 = ("--model.dtype", "bf16", "--train.zero_stage", "2")
    must_train(place, "bf16", *bf16)
    offload = '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}'
    must_train(place, "bf16-offload", *bf16, "--train.deepspeed", offload)
    assert losses(place, "bf16-offload") == pytest.approx(losses(place, "bf16"), rel=1e-6)


def test_deepspeeds_own_settings_and_a_profile(place: Path, whole_run: str) -> None:
    """Offloading the optimizer's state to the CPU changes no number; the trace holds the steps after the second."""
    offload = '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}'
    must_train(place, "offload", "--train.deepspeed", offload, "--train.profile", "true")
    assert losses(place, "offload") == pytest.approx(losses(place, whole_run), rel=1e-6)
    [trace] = (place / "offload" / "profile").iterdir()
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"ProfilerStep#2", "ProfilerStep#3", "aten::scaled_dot_product_attention"} <= names
    assert not {"ProfilerStep#0", "ProfilerStep#1"} & names


def test_a_run_folder_tells_its_story(place: Path, whole_run: str) -> None:
    run = place / whole_run
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "run.json", "log.txt", "metrics.jsonl", "tensorboard", "checkpoints", "last"} <= names
    assert (run / "last").resolve() == (run / "checkpoints" / f"step-{STEPS:08d}").resolve()
    start = json.loads((run / "run.json").read_text())["starts"][0]
    assert (start["ranks"], start["threads_per_rank"], start["hosts"]) == (1, 1, [platform.node()])
    assert any((run / "tensorboard").iterdir())
    log = (run / "log.txt").read_text()
    assert re.search(r"language\.attention +2 +8 +1,536  float32", log) and "parameters train (" in log
    assert re.search(r"set: 24 images, 36 heads, 100\.0% of the stream, 1\.33 epochs", log)


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
        (("--train.deepspeed", '{"zero_optimization": {"overlap_com": true}}'), "overlap_com", 2),
        (("--adapter.init", str(place / whole_run / "last"), "--adapter.rank", "2"), "adapter.stack", 2),
    ):
        found, said = train(place, "wrong", *words)
        lines = [line for line in said.splitlines() if line.startswith("cogvlm-hpe: error:")]
        assert found == code, said
        assert len(lines) == 1 and names in lines[0]
        assert "Traceback" not in said
    code, said = train(place, whole_run)
    assert code == 1 and "--resume" in said
    code, said = train(place, whole_run, "--resume", "--train.lr", "0.5")
    assert code == 1 and "train.lr: 0.01 -> 0.5" in said


def test_a_base_under_muon_resumes_bitwise_and_trains_alike_on_two_ranks(place: Path) -> None:
    words = ["--adapter", "null", "--train.optimizer", "muon", "--train.zero_stage", "0"]
    words += ["--train.auxiliary", '{"dense": 0.3, "guidance": 0.3, "guided_layer": 1, "guided_heads": 1}']
    must_train(place, "base-whole", *words)
    must_train(place, "base-halves", *words, "--train.stop_after", "2", code=85)
    must_train(place, "base-halves", *words, "--resume")
    files = [place / run / "last" / "model.safetensors" for run in ("base-whole", "base-halves")]
    assert files[0].read_bytes() == files[1].read_bytes()
    must_train(place, "base-two", *words, ranks=2)
    assert losses(place, "base-two") == pytest.approx(losses(place, "base-whole"), rel=1e-4)
