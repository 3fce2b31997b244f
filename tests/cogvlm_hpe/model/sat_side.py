"""Run alone: SAT loads a folder into a model of its own layers, and writes back what it holds.

python sat_side.py FOLDER STATE.pt [--merge]

One rank of as many as WORLD_SIZE says. --merge: after SAT has merged the LoRA it loaded.
"""

import json
import sys
from argparse import Namespace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._dynamo  # before triton seems to be there
from torch import nn


def absent(name: str, **attributes: Any) -> ModuleType:
    """Stand in for a module that SAT imports and that loading a checkpoint never uses: GPU kernels, web, trainer."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


language = absent("triton.language", constexpr=int)
absent("triton", jit=lambda function: function, language=language)
absent("requests")
absent("sat.training.deepspeed_training", training_main=None)

from sat import mpu  # noqa: E402
from sat.model.base_model import BaseMixin, BaseModel  # noqa: E402
from sat.model.finetune.lora2 import LoraMixin  # noqa: E402
from sat.model.official.llama_model import LLaMAModel  # noqa: E402
from sat.model.official.vit_model import ImagePatchEmbeddingMixin, ViTProperty  # noqa: E402
from sat.training.model_io import load_checkpoint  # noqa: E402


class Tower(BaseModel):
    """SAT's transformer with SAT's patch embedding."""

    def __init__(self, args: Namespace) -> None:
        grid = ViTProperty(args.image_size, args.patch_size, args.pre_len, args.post_len)
        super().__init__(args)
        self.add_mixin("patch_embedding", ImagePatchEmbeddingMixin(args.in_channels, args.hidden_size, grid))


class Eva(BaseMixin):
    """The tower, the adapter behind it, boi and eoi."""

    def __init__(self, args: Namespace, tower: Namespace) -> None:
        super().__init__()
        self.vit_model = Tower(tower)
        self.boi, self.eoi = (nn.Parameter(torch.zeros(1, 1, args.hidden_size)) for _ in range(2))
        wide, narrow = args.inner_hidden_size, args.hidden_size
        self.linear_proj = nn.ModuleDict(
            {
                "linear_proj": nn.Linear(tower.hidden_size, narrow, bias=False),
                "norm1": nn.LayerNorm(narrow),
                "dense_h_to_4h": nn.Linear(narrow, wide, bias=False),
                "gate_proj": nn.Linear(narrow, wide, bias=False),
                "dense_4h_to_h": nn.Linear(wide, narrow, bias=False),
            }
        )


class CogVLM(LLaMAModel):
    """SAT's LLaMA with a second expert's layers beside its own, under the names of the released checkpoints."""

    def __init__(self, args: Namespace, tower: Namespace) -> None:
        super().__init__(args)
        self.add_mixin("eva", Eva(args, tower))
        narrow, wide, layers = args.hidden_size, args.inner_hidden_size, range(args.num_layers)
        rotary, mlp = self.get_mixin("rotary"), self.get_mixin("mlp")
        rotary.vision_query_key_value_list = nn.ModuleList([columns(narrow, 3 * narrow, stride=3) for _ in layers])
        rotary.vision_dense_list = nn.ModuleList([rows(narrow, narrow) for _ in layers])
        mlp.vision_dense_h_to_4h_list = nn.ModuleList([columns(narrow, wide) for _ in layers])
        mlp.vision_gate_proj = nn.ModuleList([columns(narrow, wide) for _ in layers])
        mlp.vision_dense_4h_to_h_list = nn.ModuleList([rows(wide, narrow) for _ in layers])


def columns(n_in: int, n_out: int, stride: int = 1) -> nn.Module:
    return mpu.ColumnParallelLinear(n_in, n_out, stride=stride, gather_output=False, bias=False)


def rows(n_in: int, n_out: int) -> nn.Module:
    return mpu.RowParallelLinear(n_in, n_out, input_is_parallel=True, bias=False)


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    value = json.loads((folder / "model_config.json").read_text())
    machine = {"skip_init": True, "use_gpu_initialization": False, "device": "cpu"}
    args, tower = Namespace(**value, **machine), Namespace(**value["eva_args"], **machine)
    model = CogVLM(args, tower)
    if value.get("use_lora"):
        model.add_mixin("lora", LoraMixin(args.num_layers, args.lora_rank), reinit=True)
        vit = model.get_mixin("eva").vit_model
        vit.add_mixin("lora", LoraMixin(tower.num_layers, args.lora_rank), reinit=True)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    load_checkpoint(model, Namespace(load=str(folder)))
    if value.get("use_lora") and sys.argv[3:] == ["--merge"]:
        model.get_mixin("lora").merge_lora()
        vit.get_mixin("lora").merge_lora()
    torch.save(model.state_dict(), out)


if __name__ == "__main__":
    main()
