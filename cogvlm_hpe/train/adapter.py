"""LoRA by peft: which layers, which tokens, what trains, and what is saved."""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from cogvlm_hpe.config import AdapterConfig, RunConfig
from cogvlm_hpe.merge.arithmetic import add
from cogvlm_hpe.merge.factors import Adapter, Factor, Factors, read_adapter
from cogvlm_hpe.model.folders import is_adapter, read_notes, resolve_base
from cogvlm_hpe.model.load import DTYPES, empty_model, put_adapter
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
_NEW, _BEFORE = "default", "before"  # peft's names of the factors that train, and of those they are stacked on
_A, _B = f".lora_A.{_NEW}.weight", f".lora_B.{_NEW}.weight"


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
    """Freeze the base and put fresh factors beside its linear layers, in place, in its dtype."""
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
    return lora


def input_of(config: AdapterConfig) -> tuple[str, str | None]:
    """The key and the folder of the adapter that a stage takes over; None for a first stage."""
    return ("stack", config.stack) if config.stack else ("init", config.init)


def read_input(config: AdapterConfig, base_fingerprint: str) -> Adapter | None:
    """The adapter that a stage takes over, or None.

    Raises UserError where there is none or it was made on another base, UsageError where its scope is another one.
    """
    key, folder = input_of(config)
    if folder is None:
        return None
    where = f"adapter.{key} {folder}"
    if not is_adapter(folder):
        raise UserError(f"{where}: no adapter there; name an adapter or checkpoint folder")
    said = read_notes(folder)
    if said.get("base_fingerprint") not in (None, base_fingerprint):
        raise UserError(f"{where}: made on another base (fingerprints differ); take an adapter of model.base")
    if said["scope"] != config.scope:
        raise UsageError(
            f"{where}: its scope is {said['scope']}, this config's {config.scope}; set adapter.scope to it"
        )
    return read_adapter(Path(folder))


@torch.no_grad()
def start_from(model: nn.Module, given: Adapter) -> None:
    """Copy an adapter's factors into the new ones; layers it lacks, as after a merge, start afresh.

    Another scale, as after task arithmetic, goes into B. Raises UserError for layers that do not train, UsageError
    where the rank differs.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, factor in given.factors.items():
        if name not in layers:
            raise UserError(f"adapter.init {given.path}: has {name}, which adapter.targets leaves out; add its group")
        layer = layers[name]
        rank, scale = layer.r[_NEW], layer.scaling[_NEW]
        if rank != factor.rank:
            raise UsageError(
                f"adapter.init {given.path}: {name} has rank {factor.rank}, here it is {rank}; set adapter.rank "
                "to its, or name it as adapter.stack"
            )
        layer.lora_A[_NEW].weight.copy_(factor.a)
        layer.lora_B[_NEW].weight.copy_(factor.b * (factor.scale / scale))


def stack_on(model: CogVLMForCausalLM, given: Adapter, base: Path) -> None:
    """Put an adapter's factors, which stay as they are, beside the new ones, in place. Raises UserError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # there are to be two
        put_adapter(model, given.path, base, read_notes(given.path), name=_BEFORE)
    _stand_on_before(model)


def stack_shapes(model: nn.Module, folder: str) -> None:
    """As `stack_on`, for a model on the meta device: shapes without numbers. Raises UserError."""
    if not is_adapter(folder):
        raise UserError(f"adapter.stack {folder}: no adapter there; name an adapter or checkpoint folder")
    lora = LoraConfig.from_pretrained(folder)
    lora.lora_dropout = 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # there are to be two
        inject_adapter_in_model(lora, model, adapter_name=_BEFORE, low_cpu_mem_usage=True)
    _stand_on_before(model)


def _stand_on_before(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([_BEFORE, _NEW])
    for parameter in stacked_factors(model).values():
        parameter.requires_grad_(False)


def stacked_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors that stay as they are beside the new ones, by name."""
    return {name: p for name, p in model.named_parameters() if f".{_BEFORE}." in name}


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
        add_lora(model, config.adapter, config.model.base)
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
    return PREFIX + name.replace(f".{_NEW}.", ".")


def own_name(name: str) -> str:
    """The way back from plain peft's name to the model's."""
    return re.sub(r"\.(lora_[AB])\.", rf".\1.{_NEW}.", name.removeprefix(PREFIX))


def factors_of(state: Mapping[str, Tensor], lora: LoraConfig) -> Factors:
    """Trained tensors as factors, by the name of their layer."""
    scale = lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
    layers = (name.removesuffix(_A) for name in state if name.endswith(_A))
    return {layer: Factor(state[layer + _A], state[layer + _B], scale) for layer in layers}


def joined(state: Mapping[str, Tensor], lora: LoraConfig, before: Factors) -> Factors:
    """One adapter that does what new factors and those they are stacked on do together: ranks add, the new come first.

    The new ones are in it bit for bit, so `parted` gives them back.
    """
    return add([factors_of(state, lora), before])


def parted(state: Mapping[str, Tensor], before: Factors) -> dict[str, Tensor]:
    """The new tensors of a joined adapter. Raises UserError where it was not joined with these factors."""
    out = {}
    for name, tensor in state.items():
        layer, is_a = name.removesuffix(_A).removesuffix(_B), name.endswith(_A)
        own = tensor.shape[0 if is_a else 1] - (before[layer].rank if layer in before else 0)
        if is_a and layer in before and not tensor[own:].equal(before[layer].a.to(tensor.dtype)):
            raise UserError(f"adapter.stack: {layer} is not as it was when this run was started; name the same adapter")
        if own:
            out[name] = (tensor[:own] if is_a else tensor[:, :own]).contiguous()
    return out
