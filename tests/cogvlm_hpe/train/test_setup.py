"""What a config says reaches the stream of a run, and what a resumed run goes on from is what it was."""

import json
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from tiny_model import small_config

from cogvlm_hpe.config import AdapterConfig, RunConfig, TrainConfig
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.train import checkpoint
from cogvlm_hpe.train.adapter import add_lora, trainable
from cogvlm_hpe.train.command import parse
from cogvlm_hpe.train.engine import deepspeed_config
from cogvlm_hpe.train.module import TrainedModule
from cogvlm_hpe.train.setup import make_plan, make_stream, refuse_other_sets, sets_text, take_weights
from launcher.comm import single
from launcher.errors import UsageError, UserError
from shards.augment import Augment
from shards.index import open_set
from shards.plan import Plan

TEXT = """
run_dir: runs/x
model: {{base: tiny, dtype: fp32}}
adapter: null
shards:
  train: [{{path: {path}, ask: [pose]}}]
  batch: 4
  seed: 9
  flip: false
  augment: {{rotate_deg: {rotate_deg}, crop: 0.7, colour: 0.2}}
  block_shards: 1
  bucket_batches: 3
train: {{max_steps: 10, micro_batch: 2}}
"""


def config_of(folder: Path, path: Path, rotate_deg: float = 20.0) -> RunConfig:
    file = folder / "config.yaml"
    file.write_text(TEXT.format(path=path, rotate_deg=rotate_deg))
    return parse(["--config", str(file)])[0]


def test_a_run_reads_what_its_config_says(tiny_set: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_set(samples=20)
    config, sets = config_of(tmp_path, path), [open_set(path)]
    plan = make_plan(config.shards, sets)
    expected = Plan.of(sets, [1.0], 9, 4, block_shards=1, bucket_batches=3)
    assert [plan.batch_at(n) for n in range(9)] == [expected.batch_at(n) for n in range(9)]
    n, items = next(iter(make_stream(config.shards, sets, plan, single(), 28, attrgetter("key"), 5)))
    augment = Augment(flip=False, rotate_deg=20.0, crop=0.7, colour=0.2)
    assert n == 5
    for item in items:
        stored = sets[0].record(item.slot.sample)
        assert item.record == augment.at(9, item.slot.position, stored).record(stored)
        assert item.note == item.key


def test_an_augmentation_out_of_range_names_its_key(tiny_set: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_set(samples=20)
    config, sets = config_of(tmp_path, path, rotate_deg=200.0), [open_set(path)]
    with pytest.raises(UsageError, match=r"augment\.rotate_deg 200"):
        make_stream(config.shards, sets, make_plan(config.shards, sets), single(), 28, attrgetter("key"), 0)


def test_the_log_says_what_is_streamed(tiny_set: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_set(samples=20)
    config, sets = config_of(tmp_path, path), [open_set(path)]
    told, mixed = sets_text(sets, make_plan(config.shards, sets), config.train.max_steps).splitlines()
    assert told == f"{path}: 20 images, 30 heads, 100.0% of the stream, 2 epochs"
    assert "of a full shuffle" in mixed


def test_other_sets_in_the_same_place_are_no_resumption(tiny_set: Callable[..., Path], tmp_path: Path) -> None:
    plans = []
    for samples in (20, 16):
        path = tiny_set(samples=samples)
        config = config_of(tmp_path, path)
        plans.append(make_plan(config.shards, [open_set(path)]))
    saved = checkpoint.Saved(3, {}, {}, json.loads(json.dumps(plans[0].state(3))))
    refuse_other_sets(saved, plans[0], tmp_path)
    with pytest.raises(UserError, match=r"sizes: \[20\] -> \[16\]; digests: .*\); bring the old ones back"):
        refuse_other_sets(saved, plans[1], tmp_path)


def test_sets_may_move_but_not_be_built_anew_from_other_samples(tiny_set: Callable[..., Path], tmp_path: Path) -> None:
    def plan_of(path: Path) -> Plan:
        return make_plan(config_of(tmp_path, path).shards, [open_set(path)])

    path = tiny_set(samples=20)
    told = json.loads(json.dumps(plan_of(path).state(3)))
    moved = path.rename(tmp_path / "moved")
    refuse_other_sets(checkpoint.Saved(3, {}, {}, told), plan_of(moved), tmp_path)
    other = plan_of(tiny_set(samples=20, seed=1))
    with pytest.raises(UserError, match=r"shard sets have changed \(digests: \['[0-9a-f]{16}'\] -> "):
        refuse_other_sets(checkpoint.Saved(3, {}, {}, told), other, tmp_path)
    del told["digests"]
    refuse_other_sets(checkpoint.Saved(3, {}, {}, told), other, tmp_path)


def test_offload_settings_reach_deepspeed(tmp_path: Path) -> None:
    """As it reads them itself; there is no NVMe here to run them on."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    given = {"zero_optimization": {"offload_param": disk, "offload_optimizer": disk}, "aio": {"block_size": 2**20}}
    config = config_of(tmp_path, tmp_path)
    config.train = TrainConfig(zero_stage=3, deepspeed=given)
    told = deepspeed_config(config, 2)
    zero = DeepSpeedZeroConfig(**told["zero_optimization"])
    assert (zero.stage, zero.offload_param.device, str(zero.offload_optimizer.nvme_path)) == (3, "nvme", str(tmp_path))
    assert told["aio"] == {"block_size": 2**20} and told["gradient_accumulation_steps"] == 2


def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CogVLMForCausalLM(small_config())
    lora = add_lora(model, AdapterConfig(rank=2, scope="all"), "unused")
    module = TrainedModule(model, None)
    describe = checkpoint.Describe({"base_fingerprint": "abc"}, lora, None, None)
    weights = {name: p.detach() + 1 for name, p in trainable(module).items()}
    checkpoint.Writer(tmp_path, describe).save(1, weights, {}, {})
    folder = checkpoint.newest(tmp_path)
    assert take_weights(module, folder, describe).step == 1
    assert all(p.equal(weights[name]) for name, p in trainable(module).items())
    other = checkpoint.Describe({"base_fingerprint": "abd"}, lora, None, None)
    with pytest.raises(UserError, match="made on another base than model.base"):
        take_weights(module, folder, other)
