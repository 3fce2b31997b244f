"""What one rank of test_plan.py does: steps of a small CogVLM in many ways; all tensors that live are counted."""

import gc
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from small_model import VISION

from cogvlm_hpe.config import AdapterConfig, ModelConfig, RunConfig, SetConfig, ShardsConfig, TrainConfig
from cogvlm_hpe.merge.factors import read_adapter
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.load import DTYPES, load_base
from cogvlm_hpe.model.weights import open_weights
from cogvlm_hpe.train import checkpoint
from cogvlm_hpe.train.adapter import add_lora, stack_on
from cogvlm_hpe.train.engine import Engine, deepspeed_config, prepare_deepspeed
from cogvlm_hpe.train.partition import is_split, load_partitioned
from cogvlm_hpe.train.plan import _batch
from launcher.comm import Comm, from_torch
from launcher.world import discover

BUCKET, PERSISTENT = 30_000, 4_000  # elements
QUESTIONS, TOKENS = 1, 8


def model_config() -> CogVLMConfig:
    """Wide enough that activations weigh more than bookkeeping; 1.5 million weights."""
    vision = VISION | {"hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "image_size": 112}
    return CogVLMConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        vision_config=vision | {"num_positions": 65},
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One way to train: `stack` stands on an adapter; `whole` has none."""

    stage: int
    dtype: str = "bf16"
    whole: bool = False
    stack: bool = False
    optimizer: str = "adamw"
    zero: dict[str, Any] = field(default_factory=dict)
    scope: str = "all"
    recompute: bool = False

    def config(self, folder: Path) -> RunConfig:
        """Of a small run; q, k and v are one projection, so their factors are, too."""
        zero = {"reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": PERSISTENT, **self.zero}
        adapter = AdapterConfig(
            rank=32, targets=["language.attention", "language.mlp"], scope=self.scope,
            stack=str(folder / "before") if self.stack else None,
        )  # fmt: skip
        train = TrainConfig(
            micro_batch=1,
            lr=1e-3,
            zero_stage=self.stage,
            gradient_checkpointing=self.recompute,
            optimizer=self.optimizer,
            deepspeed={"zero_optimization": zero},
        )
        return RunConfig(
            run_dir="unused",
            model=ModelConfig(str(folder / "base"), dtype=self.dtype),
            shards=ShardsConfig([SetConfig("unused")], batch=2),
            adapter=None if self.whole else adapter,
            train=train,
        )


_NO_REUSE = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
_SOME_REUSE = {"stage3_max_reuse_distance": 800_000, "stage3_prefetch_bucket_size": 0}
CASES = {
    "stage 0": Case(0, "fp32"),
    "stage 0, whole, muon": Case(0, "fp32", whole=True, optimizer="muon"),
    "stage 1": Case(1),
    "stage 2": Case(2),
    "stage 2, stacked": Case(2, "fp32", stack=True),
    "stage 2, offloaded": Case(2, "fp32", zero={"offload_optimizer": {"device": "cpu"}}),
    "stage 3": Case(3),
    "stage 3, some reuse": Case(3, "fp32", scope="text", zero=_SOME_REUSE),
    "stage 3, no reuse": Case(3, "fp32", zero=_NO_REUSE),
    "stage 3, recomputed": Case(3, "fp32", recompute=True, zero=_NO_REUSE),
    "stage 3, offloaded": Case(
        3, "fp32", zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    ),
}
"""In rising stages where they are run: ZeRO-3 replaces torch's linear function for good."""
ALONE = "stage 0", "stage 2", "stage 3"  # on one rank, too


def held(tensors: Iterable[Any]) -> dict[int, torch.UntypedStorage]:
    """Every storage once; while it is held its number is given to no other."""
    found = (t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor) and t.device.type == "cpu")
    return {storage._cdata: storage for storage in found}


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of every storage, once."""
    return {key: storage.nbytes() for key, storage in held(tensors).items()}


def alive() -> list[torch.Tensor]:
    """All tensors of this process."""
    gc.collect()
    return [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]


def at_rest() -> dict[int, int]:
    """Bytes of every storage. Gloo's threads let go of what they have sent a moment after they say that it is sent."""
    looks = []
    for _ in range(5):
        looks.append(storages(alive()))
        time.sleep(0.1)
    return min(looks, key=lambda look: sum(look.values()))


def start(case: Case, folder: Path, comm: Comm) -> tuple[Engine, checkpoint.Describe]:
    config, dtype = case.config(folder), DTYPES[case.dtype]
    if case.stage == 3:
        model = load_partitioned(open_weights(folder / "base"), dtype, deepspeed_config(config, 1))
    else:
        model = load_base(folder / "base", dtype, own=case.whole)
    model.train()
    if case.recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    describe = checkpoint.Describe({"scope": "all"}, None, model.config, None)
    if config.adapter:
        describe.lora = add_lora(model, config.adapter, str(folder / "base"))
        if case.stack:
            given = read_adapter(folder / "before")
            stack_on(model, given, folder / "base")
            describe.before = given.factors
    return Engine(model, config, comm, 1), describe


def of_optimizer(engine: Engine) -> dict[int, int]:
    outer = engine.engine.optimizer
    inner = getattr(outer, "optimizer", outer)
    masters = [p for group in inner.param_groups for p in group["params"]]
    flat = list(getattr(outer, "fp32_partitioned_groups_flat", []))
    return storages([*masters, *flat, *(t for state in inner.state.values() for t in state.values())])


class Watch:
    """What is there for a moment only: buckets of gradients, and weights that ZeRO-3 has gathered."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.buckets, self.gradients, self.gathered = engine, 0, 0, 0
        for parameter in engine.parameters.values():
            parameter.register_hook(self._backward)
        self.parameters = list(engine.engine.module.parameters())
        split = [m for m in engine.engine.module.modules() if any(is_split(p) for p in m.parameters(recurse=False))]
        for module in split:
            module.register_forward_pre_hook(self._gathered)
            module.register_full_backward_pre_hook(self._gathered)

    def _backward(self, *_: Any) -> None:
        buckets = getattr(self.engine.engine.optimizer, "ipg_buckets", {})
        buffers = [b.buffer if isinstance(b.buffer, list) else [b.buffer] for b in buckets.values()]
        waiting = storages(t for buffer in buffers for t in buffer)
        gradients = storages(p.grad for p in self.engine.parameters.values())
        self.buckets = max(self.buckets, sum(waiting.values()))
        # Those on their way to other ranks lie in a bucket already.
        self.gradients = max(self.gradients, sum(size for key, size in gradients.items() if key not in waiting))

    def _gathered(self, *_: Any) -> None:
        whole = (p for p in self.parameters if p.ds_status.name == "AVAILABLE" and not p.ds_persist)
        self.gathered = max(self.gathered, sum(p.ds_numel * p.element_size() for p in whole))


def count(case: Case, folder: Path, comm: Comm) -> dict[str, int]:
    """Bytes by the planner's parts, of a rank that has made a step and stands before the end of the second."""
    before = held(alive())
    engine, describe = start(case, folder, comm)
    batch = _batch(1, QUESTIONS, TOKENS, model_config(), DTYPES[case.dtype])
    batch["pixel_values"] = torch.zeros(1, 3, 112, 112, dtype=DTYPES[case.dtype])
    before |= held([*batch.values(), *(t for factor in describe.before.values() for t in (factor.a, factor.b))])
    watch, now = Watch(engine), {}
    for last in (False, True):
        engine.backward(engine.engine(**batch).loss)
        if last:
            now = at_rest()
        engine.step()
    parameters = list(engine.engine.module.parameters())
    weights = storages(tensor for p in parameters for tensor in (p.data, getattr(p, "ds_tensor", None)))
    optimizer = {key: size for key, size in of_optimizer(engine).items() if key not in weights}
    lasting = watch.buckets if case.stage == 3 else 0
    rest = sum(size for key, size in now.items() if key not in {*before, *weights, *optimizer}) - lasting
    found = {
        "weights": sum(weights.values()),
        "optimizer": sum(optimizer.values()),
        "gradients": max(rest, watch.gradients),
        "gradient buckets": watch.buckets,
        "gathered layers": watch.gathered,
    }
    return found | saved_sizes(engine, describe, folder / f"{comm.size}")


def saved_sizes(engine: Engine, describe: checkpoint.Describe, run_dir: Path) -> dict[str, int]:
    """All ranks. Bytes of a real checkpoint: of its adapter, or whole model, and of all its tensors."""
    weights, optimizer = engine.weights(), engine.optimizer_state()
    if engine.comm.rank:
        return {}
    if describe.lora is None:
        whole = 4 * sum(tensor.numel() for tensor in weights.values())
        return {"adapter": whole, "checkpoint": whole + 4 * sum(tensor.numel() for tensor in optimizer.values())}
    prefixed = {f"cogvlm.{name}": tensor for name, tensor in weights.items()}
    checkpoint.Writer(run_dir, describe).save(1, prefixed, optimizer, {})
    folder = checkpoint.newest(run_dir)
    assert folder is not None
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return {"adapter": sizes["adapter_model.safetensors"], "checkpoint": sum(sizes.values())}


def main(folder: Path) -> None:
    """One rank's work; what it counted goes to SIZE-RANK.json."""
    torch.set_num_threads(1)
    prepare_deepspeed()
    comm, seen = from_torch(discover()), {}
    for name, case in sorted(CASES.items(), key=lambda item: item[1].stage):
        if comm.size == 1 and name not in ALONE:
            continue
        seen[name] = count(case, folder, comm)
    (folder / f"{comm.size}-{comm.rank}.json").write_text(json.dumps(seen))
