"""What one rank of test_partition.py does: trains a small CogVLM under ZeRO 1-3 and writes down what it saw."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogvlm_hpe.config import AdapterConfig, ModelConfig, RunConfig, SetConfig, ShardsConfig, TrainConfig
from cogvlm_hpe.model.load import load_base
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.weights import Weights, open_weights
from cogvlm_hpe.train.adapter import TARGETS, add_lora
from cogvlm_hpe.train.engine import Engine, deepspeed_config, prepare_deepspeed
from cogvlm_hpe.train.partition import is_split, load_partitioned
from launcher.comm import Comm, from_torch
from launcher.world import discover

STEPS = 3
LR = 0.01
EVERY = tuple(TARGETS)


class Counted:
    """A base whose reads are counted, in elements."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self.n_read = weights, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)

    def read(self, name: str) -> torch.Tensor:
        return self._count(self._weights.read(name))

    def flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._count(self._weights.flat(name, start, stop))

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        self.n_read += tensor.numel()
        return tensor


@dataclass(frozen=True)
class Case:
    """One run: `way` is how ZeRO-3 gets its base, split as it is read (`hpz`: with ZeRO++'s pieces of a machine
    besides), or whole and split by the engine."""

    stage: int
    targets: tuple[str, ...]
    scope: str = "all"
    recompute: bool = False
    dtype: str = "fp32"
    way: str = "split"

    @property
    def name(self) -> str:
        """Stage, what trains, and what is unusual."""
        targets = "every group" if self.targets == EVERY else "+".join(self.targets) or "whole model"
        usual = Case(self.stage, self.targets, recompute=self.targets not in (EVERY, ()))
        unusual = [str(getattr(self, f)) for f in ("scope", "dtype", "way") if getattr(self, f) != getattr(usual, f)]
        return " ".join([f"zero{self.stage}", targets, *unusual])

    def config(self, base: Path) -> RunConfig:
        adapter = AdapterConfig(rank=2, alpha=4, targets=list(self.targets), scope=self.scope) if self.targets else None
        return RunConfig(
            run_dir="unused",
            model=ModelConfig(str(base), dtype=self.dtype),
            shards=ShardsConfig([SetConfig("unused")]),
            adapter=adapter,
            train=TrainConfig(
                lr=LR,
                micro_batch=1,
                zero_stage=self.stage,
                clip=0.0,
                deepspeed={"zero_optimization": {"zero_hpz_partition_size": 2}} if self.way == "hpz" else {},
            ),
        )


TEXT = ("language.attention", "language.mlp")


def cases() -> list[Case]:
    """Stages in rising order: ZeRO-3 replaces torch's linear function for good."""
    out = []
    for stage in (1, 2, 3):
        out += [Case(stage, (group,), recompute=True) for group in EVERY]
        out += [Case(stage, EVERY), Case(stage, TEXT, "text", recompute=True), Case(stage, ())]
    out += [Case(stage, EVERY, dtype="bf16") for stage in (2, 3)]
    return [*out, Case(3, EVERY, way="whole"), Case(3, EVERY, way="hpz")]


def share(config: Any, rank: int) -> dict[str, torch.Tensor]:
    """One image with two questions; another one on each rank."""
    generator = torch.Generator().manual_seed(7 + rank)
    side = config.vision_config["image_size"]
    ids = torch.randint(4, config.vocab_size, (2, 6), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    pixels = torch.randn(1, 3, side, side, generator=generator)
    index = torch.zeros(2, dtype=torch.long)
    return {"pixel_values": pixels, "image_index": index, "branch_input_ids": ids, "branch_labels": labels}


def make_model(case: Case, base: Path, counted: Counted) -> CogVLMForCausalLM:
    config, dtype = case.config(base), {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
    if case.stage == 3 and case.way != "whole":
        model = load_partitioned(counted, dtype, deepspeed_config(config, 1))
    else:
        model = load_base(base, dtype, own=not case.targets)
    model.train()
    if case.recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(5)
    if config.adapter:
        add_lora(model, config.adapter, str(base))
    return model


def run(case: Case, base: Path, comm: Comm) -> dict[str, Any]:
    """Losses of a few steps, and how the trained weights look after them."""
    counted = Counted(open_weights(base))
    model = make_model(case, base, counted)
    split = [p for p in model.parameters() if is_split(p)]
    sizes = {"base": sum(p.ds_numel for p in split), "held": sum(p.ds_tensor.numel() for p in split)}
    engine = Engine(model, case.config(base), comm, 1)
    batch, losses = share(model.config, comm.rank), []
    for _ in range(STEPS):
        loss = engine.engine(**batch).loss
        losses.append(comm.sum(float(loss.detach())) / comm.size)
        engine.backward(loss)
        engine.step()
    weights = engine.weights()
    return {
        "losses": losses,
        "trained": {name: float(tensor.norm()) for name, tensor in weights.items()},
        "elements": sizes | {"read": counted.n_read},
        "mapped_kb": mapped_kb(base / "model.safetensors"),
    }


def mapped_kb(path: Path) -> dict[str, int]:
    """How much of a mapped file this process has looked at, and how much it has made its own by writing."""
    found = {"Rss": 0, "Private_Dirty": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        key, _, value = line.partition(":")
        if inside and key in found:
            found[key] += int(value.split()[0])
    return found


def main(base: Path, out: Path) -> None:
    """One rank's work; what it saw goes to `out` with the rank as suffix."""
    torch.set_num_threads(1)
    prepare_deepspeed()
    comm = from_torch(discover())
    seen = {case.name: run(case, base, comm) for case in cases()}
    out.with_suffix(f".{comm.rank}").write_text(json.dumps(seen))
