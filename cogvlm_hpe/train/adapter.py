"""LoRA by peft: which layers, which tokens, what trains, and what is saved."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn

from cogvlm_hpe.config import AdapterConfig, RunConfig
from cogvlm_hpe.model.folders import ADAPTER_CONFIG, read_notes, resolve_base
from cogvlm_hpe.model.load import DTYPES, empty_model
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.weights import read_config
from launcher.errors import UsageError, UserError

_LAYER = r"model\.layers\.\d+\."
_VIT_LAYER = r"model\.vision\.transformer\.layers\.\d+\."
TARGETS = {
    "language.attention": _LAYER + r"self_attn\.language_expert_(query_key_value|dense)",
    "language.mlp": _LAYER + r"mlp\.language_mlp\.(gate|up|down)_proj",
    "vision.attention": _LAYER + r"self_attn\.vision_expert_(query_key_value|dense)",
    "vision.mlp": _LAYER + r"mlp\.vision_mlp\.(gate|up|down)_proj",
    "vit.attention": _VIT_LAYER + r"attention\.(query_key_value|dense)",
    "vit.mlp": _VIT_LAYER + r"mlp\.fc[12]",
    "glue": r"model\.vision\.linear_proj\.(linear_proj|gate_proj|dense_h_to_4h|dense_4h_to_h)",
}
"""Names a config may use for groups of linear layers."""

_REST = {
    "embedding": r"model\.embed_tokens",
    "head": r"lm_head",
    "norms": rf"(?:{_LAYER}(?:input|post_attention)_layernorm|model\.norm)",
    "vit.norms": _VIT_LAYER + r"(?:input|post_attention)_layernorm",
    "patches": r"model\.vision\.patch_embedding(?:\.proj|\.position_embedding)?",
    "ends": r"model\.vision",  # boi and eoi
    "glue.norm": r"model\.vision\.linear_proj\.norm1",
    "auxiliary": r"dense\.\w+",
}
"""What trains besides when a whole model does."""

PREFIX = "base_model.model."
"""What plain peft puts before a module's name in an adapter file."""


def target_modules(model: nn.Module, targets: list[str]) -> list[str]:
    """Full names of the linear layers of these groups. Raises UsageError for an unknown group or one without layers."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    out: list[str] = []
    for target in targets:
        if target not in TARGETS:
            raise UsageError(f"adapter.targets {target!r}: not one of {', '.join(TARGETS)}")
        found = [name for name in linear if re.fullmatch(TARGETS[target], name)]
        if not found:
            raise UsageError(f"adapter.targets {target!r}: this model has no such layer")
        out += found
    return out


def add_lora(model: CogVLMForCausalLM, config: AdapterConfig, base: str) -> LoraConfig:
    """Freeze the base and put factors beside its linear layers, in place; the factors are float32 until the engine.

    With `config.init` they start from that adapter's, which must have the same layers and rank.
    """
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=target_modules(model, config.targets),
        base_model_name_or_path=base,
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inject_adapter_in_model(lora, model, low_cpu_mem_usage=model.device.type == "meta")
    model.adapter_scope = config.scope
    if config.init:
        _start_from(model, config, lora)
    return lora


def _start_from(model: CogVLMForCausalLM, config: AdapterConfig, lora: LoraConfig) -> None:
    from safetensors.torch import load_file

    folder = Path(str(config.init))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"adapter.init {folder}: no adapter there; name an adapter or checkpoint folder")
    before = LoraConfig.from_pretrained(str(folder))
    scope = read_notes(folder)["scope"]
    same = (before.r, before.lora_alpha, before.use_rslora, scope) == (
        lora.r,
        lora.lora_alpha,
        lora.use_rslora,
        config.scope,
    )
    if not same:
        raise UsageError(
            f"adapter.init {folder}: rank {before.r}, alpha {before.lora_alpha}, scope {scope} differ from this "
            "config's; a stage continues with the shape it starts from"
        )
    result = set_peft_model_state_dict(model, load_file(str(folder / "adapter_model.safetensors")))
    if result.unexpected_keys:
        raise UserError(f"adapter.init {folder}: holds layers this stage does not train, {result.unexpected_keys[0]}")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class TrainableRow:
    """Parameters of one group (a name in TARGETS, or what else a whole model has) and one dtype."""

    group: str
    layers: int  # transformer layers it lies in; 1 for what stands outside of them
    tensors: int
    parameters: int
    dtype: str


def trainable_table(model: nn.Module) -> list[TrainableRow]:
    """What trains, by group in the model's order; whole numbers also where ZeRO-3 has split the parameters."""
    found: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, parameter in trainable(model).items():
        key = (group_of(name), str(parameter.dtype).removeprefix("torch."))
        found.setdefault(key, []).append((name, _count(parameter)))
    return [
        TrainableRow(group, len({_place(name) for name, _ in of}), len(of), sum(count for _, count in of), dtype)
        for (group, dtype), of in found.items()
    ]


def trainable_text(model: nn.Module) -> str:
    """The table for people, with the share of all parameters that trains."""
    rows = trainable_table(model)
    total, trained = sum(_count(p) for p in model.parameters()), sum(row.parameters for row in rows)
    lines = [("trains", "layers", "tensors", "parameters", "dtype")]
    lines += [(r.group, str(r.layers), str(r.tensors), f"{r.parameters:,}", r.dtype) for r in rows]
    text = [f"{a:<20} {b:>6} {c:>7} {d:>14}  {e}".rstrip() for a, b, c, d, e in lines]
    return "\n".join([*text, f"{trained:,} of {total:,} parameters train ({trained / total:.3%})"])


def count_trainable(config: RunConfig) -> str:
    """The table of a config; no weight is read and no memory taken for one. Raises UserError or UsageError."""
    model = empty_model(read_config(resolve_base(config.model.base)), DTYPES[config.model.dtype])
    if config.adapter is not None:
        add_lora(model, replace(config.adapter, init=None), config.model.base)
    return trainable_text(model)


def group_of(name: str) -> str:
    """The group of layers (a name in TARGETS, or what else a whole model has) that a parameter belongs to."""
    owner = re.sub(r"(\.lora_[AB]\.\w+)?\.\w+$", "", name)
    for group, pattern in (TARGETS | _REST).items():
        if re.search(rf"(?:^|\.){pattern}$", owner):
            return group
    return "other"


def _place(name: str) -> str:
    """The transformer layer a parameter lies in, or nothing."""
    found = re.search(r"^.*?\blayers\.\d+\.", name)
    return found.group() if found else ""


def _count(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def peft_name(name: str) -> str:
    """A parameter's name as plain peft writes it: no adapter name inside, its prefix in front."""
    return PREFIX + name.replace(".default.", ".")


def adapter_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trainable tensors under peft's names."""
    return {peft_name(name): tensor.contiguous() for name, tensor in state.items()}


def notes(config: AdapterConfig, answer_format: str, prompts: dict[Any, str], base_fingerprint: str) -> dict[str, Any]:
    """What hpe.json says of an adapter."""
    return {
        "scope": config.scope,
        "answer_format": answer_format,
        "prompts": dict(prompts),
        "base_fingerprint": base_fingerprint,
    }
