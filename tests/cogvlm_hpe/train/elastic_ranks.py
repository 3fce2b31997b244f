"""What each rank of test_elastic.py does: trains a small CogVLM, or goes on from checkpoints, at many stages."""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from tiny_model import small_config

from cogvlm_hpe.config import AdapterConfig, ModelConfig, RunConfig, SetConfig, ShardsConfig, TrainConfig
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.train import checkpoint
from cogvlm_hpe.train.adapter import add_lora
from cogvlm_hpe.train.batch import Batch
from cogvlm_hpe.train.engine import Engine, prepare_deepspeed
from cogvlm_hpe.train.module import TrainedModule
from cogvlm_hpe.train.setup import take_weights
from launcher.comm import Comm, from_torch
from launcher.world import discover

IMAGES, BEFORE, AFTER, LR = 6, 2, 2, 0.01


def image(step: int, number: int) -> Batch:
    """One image with two questions; a function of the step and its place in the global batch."""
    generator = torch.Generator().manual_seed(100 * step + number)
    config = small_config()
    side = config.vision_config["image_size"]
    ids = torch.randint(4, config.vocab_size, (2, 6), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    return Batch(
        pixel_values=torch.randn(1, 3, side, side, generator=generator),
        image_index=torch.zeros(2, dtype=torch.long),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=labels,
        boxes=torch.zeros(2, 4),
        tasks=["pose", "pose"],
        records=[None],
        keys=[str(number)],
    )


def make(stage: int, comm: Comm, folder: Path | None) -> tuple[Engine, LoraConfig]:
    """A fresh run, or one that goes on from a checkpoint, in the order of `setup`."""
    adapter = AdapterConfig(rank=2, alpha=4, targets=["language.attention", "vision.mlp"], scope="all")
    config = RunConfig(
        run_dir="unused",
        model=ModelConfig("unused", dtype="fp32"),
        shards=ShardsConfig([SetConfig("unused")]),
        adapter=adapter,
        train=TrainConfig(lr=LR, micro_batch=1, zero_stage=stage),
    )
    torch.manual_seed(0)
    model = CogVLMForCausalLM(small_config()).train()
    lora = add_lora(model, adapter, "unused")
    module = TrainedModule(model, None)
    saved = take_weights(module, folder)
    engine = Engine(module, config, comm, IMAGES // comm.size)
    if saved is not None:
        engine.set_lr(0.0)
        step(engine, comm, 0)
        engine.load(saved.weights, saved.optimizer)
    engine.set_lr(LR)
    return engine, lora


def step(engine: Engine, comm: Comm, number: int) -> float:
    """One global step on the ranks' shares of IMAGES images; its loss."""
    total, each = 0.0, IMAGES // comm.size
    for place in range(comm.rank * each, (comm.rank + 1) * each):
        loss, _, _ = engine.engine(image(number, place))
        total += float(loss.detach()) / (2 * IMAGES)
        engine.backward(loss * (comm.size / (2 * IMAGES)))
        engine.step()
    return comm.sum(total)


def write(stage: int, comm: Comm, folder: Path) -> list[float]:
    """Train, save in the middle, and train on; all losses."""
    engine, lora = make(stage, comm, None)
    losses = [step(engine, comm, number) for number in range(BEFORE)]
    weights, optimizer = engine.weights(), engine.optimizer_state()
    if comm.rank == 0:
        describe = checkpoint.Describe({"scope": "all"}, lora, None, None)
        checkpoint.Writer(folder / f"{stage}-{comm.size}", describe).save(BEFORE, weights, optimizer, {})
    return losses + [step(engine, comm, number) for number in range(BEFORE, BEFORE + AFTER)]


def go_on(stage: int, comm: Comm, folder: Path) -> list[float]:
    """The losses after a checkpoint."""
    engine, _ = make(stage, comm, checkpoint.newest(folder))
    return [step(engine, comm, number) for number in range(BEFORE, BEFORE + AFTER)]


def main() -> None:
    """`write FOLDER STAGE…`, or `read FOLDER STAGE:FROM…` (FROM is the writer's stage-ranks); rising stages."""
    way, folder, *jobs = sys.argv[1:]
    torch.set_num_threads(1)
    prepare_deepspeed()
    comm = from_torch(discover())
    seen = {}
    for job in jobs:
        stage, _, source = job.partition(":")
        seen[job] = write(int(stage), comm, Path(folder)) if way == "write" else go_on(
            int(stage), comm, Path(folder, source)
        )  # fmt: skip
    if comm.rank == 0:
        Path(folder, f"{way}-{comm.size}.json").write_text(json.dumps(seen))


main()
