"""What a config says of augmentation, blocks and buckets reaches the stream of a run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cogvlm_hpe.config import RunConfig
from cogvlm_hpe.train.command import parse
from cogvlm_hpe.train.setup import make_plan, make_stream
from launcher.comm import single
from launcher.errors import UsageError
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
    n, items = next(iter(make_stream(config.shards, sets, plan, single(), 28, 5)))
    augment = Augment(flip=False, rotate_deg=20.0, crop=0.7, colour=0.2)
    assert n == 5
    for item in items:
        stored = sets[0].record(item.slot.sample)
        assert item.record == augment.at(9, item.slot.position, stored).record(stored)


def test_an_augmentation_out_of_range_names_its_key(tiny_set: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_set(samples=20)
    config, sets = config_of(tmp_path, path, rotate_deg=200.0), [open_set(path)]
    with pytest.raises(UsageError, match=r"augment\.rotate_deg 200"):
        make_stream(config.shards, sets, make_plan(config.shards, sets), single(), 28, 0)
