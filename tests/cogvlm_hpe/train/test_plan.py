"""The plan of a run against what real tensors take."""

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_ranks import ALONE, CASES, QUESTIONS, TOKENS, Case
from counted_ranks import main as count_in_ranks
from counted_ranks import model_config as small_config
from forked import Ranks
from small_model import images
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvlm_hpe import cli
from cogvlm_hpe.config import AdapterConfig, ModelConfig, RunConfig, SetConfig, ShardsConfig, TrainConfig
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.train import checkpoint
from cogvlm_hpe.train import plan as planning
from cogvlm_hpe.train.adapter import add_lora, trainable
from cogvlm_hpe.train.plan import Trace, _batch, plan, trace
from cogvlm_hpe.train.plan_command import find_config
from launcher.errors import UsageError


class Allocations(TorchDispatchMode):
    """Every storage that an operator returns, while it is alive; views of parameters are none of them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata in self.parameters:
                    continue
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive_bytes(self) -> int:
        """Bytes still held by somebody."""
        gc.collect()
        return sum(size for held, size in self.storages.values() if not held.expired())


def run_config(recompute: bool = False, **adapter: Any) -> RunConfig:
    return RunConfig(
        run_dir="",
        model=ModelConfig(base="tiny", dtype="fp32"),
        shards=ShardsConfig(train=[SetConfig("x")], batch=64),
        adapter=AdapterConfig(rank=4, **adapter),
        train=TrainConfig(micro_batch=2, zero_stage=2, gradient_checkpointing=recompute),
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "adapter", [{"scope": "text"}, {"scope": "all"}, {"scope": "all", "targets": ["vit.mlp", "language.mlp"]}]
)
def test_activations_are_within_15_percent_of_the_bytes_a_real_step_holds(adapter: dict, recompute: bool) -> None:
    config, model_config = run_config(recompute, **adapter), small_config()
    traced = trace(config, model_config, questions=3, tokens=40)
    torch.manual_seed(0)
    model = CogVLMForCausalLM(model_config).train()
    add_lora(model, config.adapter, "")
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = _batch(2, 3, 40, model_config, torch.float32)
    batch["pixel_values"] = images(2).repeat(1, 1, 3, 3)[..., :112, :112].contiguous()
    with Allocations(model) as allocations:
        loss = model(**batch).loss
    held = allocations.alive_bytes()
    loss.backward()
    planned = traced.saved_elsewhere + (traced.layer_inputs if recompute else traced.saved_in_layers)
    assert planned == pytest.approx(held, rel=0.15)


def test_flops_are_those_of_the_matrices() -> None:
    config, model_config = run_config(scope="text"), small_config()
    traced = trace(config, model_config, questions=3, tokens=40)
    width, inner, layers, images_, text = 128, 256, 3, 2, 2 * 3 * 40
    prefix = images_ * 67
    a_layer = 2 * (4 * width * width + 3 * width * inner)
    decoder = (layers - 1) * prefix * a_layer + prefix * 2 * 3 * width * width + layers * text * a_layer
    attention = 4 * width * images_ * ((layers - 1) * 67 * 67 + layers * 120 * (67 + 120))
    tower_width, tower = 64, images_ * 65 * 2 * 2 * (4 * 64 * 64 + 2 * 64 * 128)
    tower += images_ * 2 * 4 * 65 * 65 * tower_width + images_ * 64 * 2 * (588 * 64 + 64 * width + 3 * width * inner)
    head = 2 * (2 * 3 * 10) * width * 300
    assert traced.forward_flops == pytest.approx(decoder + attention + tower + head, rel=0.03)
    assert traced.backward_flops < traced.forward_flops


def test_what_each_zero_stage_divides() -> None:
    traced = trace(run_config(), small_config(), questions=3, tokens=40)
    plans = {}
    for stage in (0, 1, 2, 3):
        config = run_config()
        config.train.zero_stage = stage
        config.train.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 1000}}
        plans[stage] = plan(config, traced, gpus=8).memory
    trained = traced.trained
    assert [plans[s]["optimizer"] for s in range(4)] == [8 * trained, 1.5 * trained, 1.5 * trained, 1.5 * trained]
    assert [plans[s]["gradients"] for s in range(4)] == [4 * trained, 4 * trained, trained / 2, trained / 2]
    assert [plans[s]["weights"] for s in range(3)] == [traced.weights] * 3
    assert plans[3]["weights"] == pytest.approx(traced.weights / 8, rel=0.01)
    for part in ("kept whole", "gathered layers"):
        assert plans[3][part] > 0 == plans[2][part]


def test_zero_3_keeps_what_deepspeeds_own_linear_layer_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    config = run_config(scope="text")
    plain = trace(config, small_config(), questions=3, tokens=40)
    config.train.zero_stage = 3
    ours = trace(config, small_config(), questions=3, tokens=40)
    monkeypatch.setattr(planning._Zero3Linear, "apply", zero3_linear_wrap)
    assert trace(config, small_config(), questions=3, tokens=40) == ours
    assert ours.saved_in_layers > 1.1 * plain.saved_in_layers and ours.forward_flops == plain.forward_flops


def test_judging_takes_an_images_keys_and_values_twice() -> None:
    config, model_config = run_config(recompute=True, scope="text"), small_config()
    traced = trace(config, model_config, questions=1, tokens=8)
    without = plan(config, traced, gpus=1)
    config.train.evaluate_every, config.evaluate.batch, config.evaluate.questions = 10, 16, 1
    judging = plan(config, traced, gpus=1).total - without.total + without.memory["activations"]
    prefix = 16 * 3 * 2 * 67 * 128 * 4  # images, layers, keys and values, tokens, width, bytes
    assert 2 * prefix < judging < 2.2 * prefix


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter to stand on, and what ranks have counted in real engines: RANKS-RANK.json."""
    place = tmp_path_factory.mktemp("counted")
    torch.manual_seed(0)
    model = CogVLMForCausalLM(small_config())
    model.save_pretrained(place / "base")
    lora = add_lora(model, AdapterConfig(targets=["language.attention", "glue"], scope="all"), str(place / "base"))
    ones = {f"cogvlm.{name}": torch.ones(p.shape) for name, p in trainable(model).items()}
    checkpoint.Writer(place / "first", checkpoint.Describe({"scope": "all"}, lora, None, None)).save(1, ones, {}, {})
    checkpoint.folder_of(place / "first", 1).rename(place / "before")
    for size in (1, 2):
        ranks = Ranks(size, count_in_ranks, place, said=place / f"{size}.txt")
        assert ranks.wait() == 0, ranks.said
    return place


@pytest.fixture(scope="module")
def traces() -> dict[tuple, Trace]:
    """Traces by what they depend on."""
    return {}


def traced_once(case: Case, folder: Path, traces: dict[tuple, Trace]) -> Trace:
    key = (case.dtype, case.whole, case.stack, case.optimizer, case.scope, case.stage == 3)
    if key not in traces:
        traces[key] = trace(case.config(folder), small_config(), QUESTIONS, TOKENS)
    return traces[key]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [*((name, 1) for name in ALONE), *((name, 2) for name in CASES)])
def test_every_part_is_within_15_percent_of_what_a_real_engine_holds(
    folder: Path, traces: dict[tuple, Trace], name: str, size: int
) -> None:
    """Weights, masters and moments, gradients and their buckets, gathered weights, and what a checkpoint takes."""
    case = CASES[name]
    traced = traced_once(case, folder, traces)
    planned = plan(case.config(folder), traced, size)
    parts = planned.memory | planned.offloaded
    parts["weights"] += parts.pop("kept whole")
    parts |= {"adapter": traced.adapter_bytes, "checkpoint": traced.checkpoint_bytes}
    for rank in range(size):
        counted = json.loads((folder / f"{size}-{rank}.json").read_text())[name]
        gathered = counted.pop("gathered layers")
        if size == 2 and case.recompute:  # two layers are planned, and less is enough
            assert gathered <= parts["gathered layers"] == 2 * traced.largest_layer
        elif size == 2:
            assert parts["gathered layers"] == pytest.approx(gathered, rel=0.15)
        assert {part: parts[part] for part in counted} == pytest.approx(counted, rel=0.15)


@pytest.mark.slow
def test_the_published_model_is_traced_in_its_true_shapes() -> None:
    config = run_config(recompute=True, scope="text")
    config.model.dtype = "bf16"
    config.train.micro_batch = 1
    traced = trace(config, CogVLMConfig.named("cogvlm-grounding-generalist"), questions=1, tokens=32)
    assert traced.weights == 2 * (17_639_685_376 + traced.trained)
    # By hand: tower 11.2, decoder 17.1, adapter 0.35 TFLOP.
    assert traced.forward_flops == pytest.approx(28.6e12, rel=0.05)


def plan_json(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    file = tmp_path / "run.yaml"
    file.write_text(
        "run_dir: x\nmodel: {base: tiny}\nadapter: {rank: 4}\nshards: {train: [{path: x}], batch: 8}\n"
        "train: {max_steps: 10}\n"
    )
    cli.main(["plan", "--config", str(file), "--json", *words])
    return json.loads(capsys.readouterr().out)


def test_the_command_prints_a_column_for_each_number_of_gpus(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, eight = plan_json(capsys, tmp_path, "--gpus", "1,8", "--train.zero_stage", "3", "--shards.batch", "80000")
    assert (one["gpus"], eight["gpus"]) == (1, 8)
    assert eight["memory_gb"]["weights"] < one["memory_gb"]["weights"]
    assert one["step_s"] > 0.01 and eight["step_s"] == pytest.approx(one["step_s"] / 8, abs=1e-3)
    assert one["fits"] and one["trained_parameters"] == eight["trained_parameters"] > 0


def test_a_base_that_is_not_there_is_planned_by_its_published_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert find_config("/models/cogvlm-grounding-generalist-hf").image_tokens == 1225
    assert find_config("/models/cogvlm-base-224").image_tokens == 256
    with pytest.raises(UsageError, match="not named like one of"):
        find_config("/models/somebody-elses")


@pytest.mark.slow
def test_too_little_memory_is_exit_code_1(tmp_path: Path) -> None:
    """In a process of its own, where the planner is the first to import a model."""
    file = tmp_path / "run.yaml"
    file.write_text("run_dir: x\nmodel: {base: tiny}\nadapter: {rank: 4}\nshards: {train: [{path: x}], batch: 8}\n")
    words = ["plan", "--config", str(file), "--gpu-memory"]
    done = subprocess.run([sys.executable, "-m", "cogvlm_hpe", *words, "1"], capture_output=True, text=True)
    assert (done.returncode, "TOO MUCH" in done.stdout) == (1, True), done.stderr
    assert cli.main([*words, "80"]) == 0
