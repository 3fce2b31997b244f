"""A small model of peft adapters and the merge command, for tests of the merge job."""

import json
from argparse import ArgumentParser
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import nn

from cogvlm_hpe.merge import command, methods
from cogvlm_hpe.merge import settings as known
from cogvlm_hpe.merge.base import Base
from cogvlm_hpe.merge.factors import read_adapter
from cogvlm_hpe.model.fingerprint import fingerprint
from cogvlm_hpe.model.weights import open_weights
from launcher.comm import single

TARGETS = ["query_key_value", "dense", "up_proj"]


class Block(nn.Module):
    """One decoder-like block with attention and feed-forward projections."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"query_key_value": nn.Linear(24, 72), "dense": nn.Linear(24, 24)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(24, 40), "down_proj": nn.Linear(40, 24)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, 24) to (…, 24)."""
        x = x + self.attention["dense"](self.attention["query_key_value"](x)[..., :24])
        return x + self.mlp["down_proj"](torch.tanh(self.mlp["up_proj"](x)))


class Tower(nn.Module):
    """Three blocks under `layers`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, 24) to (…, 24)."""
        for layer in self.layers:
            x = layer(x)
        return x


def make_tower() -> Tower:
    torch.manual_seed(0)
    return Tower()


def make_adapter(folder: Path, seed: int = 1, **options: object) -> Path:
    """A real peft adapter whose layers differ in strength, with an hpe.json beside it."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options
    model = peft.get_peft_model(make_tower(), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for i, (name, weight) in enumerate(model.named_parameters()):
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * (0.02 + 0.01 * i)
    model.save_pretrained(folder)
    (folder / "hpe.json").write_text(json.dumps({"scope": "text", "answer_format": "offset"}))
    return folder


def make_base(folder: Path, dtype: torch.dtype = torch.float32) -> Base:
    """Its original weights as a base folder."""
    folder.mkdir()
    (folder / "config.json").write_text('{"rms_norm_eps": 1e-05}')
    save_file(make_tower().to(dtype).state_dict(), folder / "model.safetensors")
    return Base(folder)


def tuned_weights(adapter: Path) -> dict[str, torch.Tensor]:
    """What peft itself makes of an adapter: the weights of the unloaded, merged float64 model."""
    model = peft.PeftModel.from_pretrained(make_tower().double(), adapter).double().merge_and_unload()
    return {name.removesuffix(".weight"): value.clone() for name, value in model.state_dict().items()}


def choose(base: Base, adapters: list[Path], **said: object) -> list[tuple[str, methods.Merged]]:
    """What a merge would write: each result with its name."""
    settings = known.Settings(base=str(base.path), adapter=adapters, out=Path("unwritten"), **said)
    known.check(settings)
    read, comm = [read_adapter(path) for path in adapters], single()
    return methods.merge(settings, base, read, methods.compare(settings, base, read, comm), comm)


def run(base: Base, adapters: list[Path], out: Path, *flags: str) -> int:
    parser = ArgumentParser()
    command.add_arguments(parser)
    named = [word for path in adapters for word in ("--adapter", str(path))]
    return command.run(parser.parse_args(["--base", str(base.path), *named, "--out", str(out), *flags]))


def make_cogvlm_adapter(folder: Path, base: Path, seed: int = 1, rank: int = 4, **notes: object) -> Path:
    """A peft adapter on every attention layer of a CogVLM's language model, strong enough to show in bf16."""
    config = peft.LoraConfig(r=rank, lora_alpha=rank)
    weights, generator, tensors = open_weights(base), torch.Generator().manual_seed(seed), {}
    names = [name for name in weights.names() if "language_expert" in name and name.endswith("weight")]
    for name in names:
        n_out, n_in = weights.shape(name)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, n_in, generator=generator) * 0.1
        tensors[f"{key}.lora_B.weight"] = torch.randn(n_out, rank, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads(json.dumps(config.to_dict(), default=list)) | {"peft_type": "LORA"}
    config |= {"target_modules": [name.removesuffix(".weight") for name in names], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    said = {"scope": "all", "answer_format": "offset", "base_fingerprint": fingerprint(base)}
    (folder / "hpe.json").write_text(json.dumps(said | notes))
    return folder
