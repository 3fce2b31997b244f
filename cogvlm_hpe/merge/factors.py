"""LoRA adapters as factors: a tuned model is base + Σ scale · B·A, and B·A is never formed.

Shapes: r rank, n_in and n_out widths of the adapted layer; A is (r, n_in), B is (n_out, r).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cogvlm_hpe.model.folders import read_json
from launcher.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
HPE_CONFIG = "hpe.json"
SCOPE = "scope"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_UNSUPPORTED = {
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
}


_CHANGES_BASE = re.compile(r"pissa.*|corda.*|olora|loftq|lora_ga")
"""Values of init_lora_weights with which peft takes the first factors out of the base each time it puts them in."""


@dataclass(frozen=True)
class Factor:
    """What one adapted layer adds to its weight: scale · b·a. Tensors keep the dtype they are stored in."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    def rows(self, first: int, last: int) -> "Factor":
        """What it adds to rows [first, last) of the weight."""
        return Factor(self.a, self.b[first:last], self.scale)

    def delta(self) -> torch.Tensor:
        """(n_out, n_in) float64, dense: for small layers and checks only."""
        return self.scale * (self.b.double() @ self.a.double())


Factors = Mapping[str, Factor]
"""Module name, as in the base model, to its factor."""


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: its factors, peft's config and this project's hpe.json (empty for a foreign adapter)."""

    path: Path
    factors: Factors
    config: dict[str, Any]
    hpe: dict[str, Any] = field(default_factory=dict)

    @property
    def scope(self) -> str:
        """Which tokens it works on: `all`, as plain peft has it, or `text`."""
        scope: str = self.hpe.get(SCOPE, "all")
        return scope


def read_adapter(path: Path) -> Adapter:
    """Read a peft LoRA folder. Raises UserError where it is no plain LoRA adapter or holds non-finite numbers."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    config = read_json(path / ADAPTER_CONFIG)
    _check_plain_lora(path, config)
    try:
        tensors = load_file(path / ADAPTER_TENSORS)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path / ADAPTER_TENSORS}: not a whole safetensors file ({error}); save the adapter again"
        ) from None
    hpe = read_json(path / HPE_CONFIG) if (path / HPE_CONFIG).exists() else {}
    return Adapter(path, _pair(path, tensors, config), config, hpe)


def _check_plain_lora(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {config.get('peft_type')!r}: only LORA adapters have factors to merge")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise UserError(f"{path}: {ADAPTER_CONFIG} has no number {key}; save the adapter again")
    for key, plain in _UNSUPPORTED.items():
        if config.get(key, plain) not in (plain, None, []):
            raise UserError(
                f"{path}: {key} = {config[key]!r}: only plain LoRA can be merged as factors; train without it"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_BASE.fullmatch(start.lower()):
        raise UserError(
            f"{path}: init_lora_weights = {start!r}: it changes the base, so that the factors are not all there is to "
            "merge; convert it to plain LoRA (path_initial_model_for_weight_conversion of peft's save_pretrained)"
        )


def _pair(path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Factors:
    factors = {}
    for key in sorted(tensors):
        name, is_a = key.removeprefix(_PREFIX).removesuffix(_A), key.endswith(_A)
        if not is_a and not key.endswith(_B):
            raise UserError(
                f"{path}: tensor {key} is neither lora_A nor lora_B of a linear layer; only plain LoRA merges"
            )
        partner = key.removesuffix(_A) + _B if is_a else key.removesuffix(_B) + _A
        if partner not in tensors:
            raise UserError(f"{path}: {key} has no {partner} beside it; save the adapter again")
        if is_a:
            factors[name] = _factor(path, name, tensors[key], tensors[partner], config)
    if not factors:
        raise UserError(f"{path}: the adapter holds no LoRA layer; nothing to merge")
    return factors


def _factor(path: Path, name: str, a: torch.Tensor, b: torch.Tensor, config: Mapping[str, Any]) -> Factor:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{path}: {name}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are not factors of a matrix"
        )
    for letter, tensor in (("A", a), ("B", b)):
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name}: lora_{letter} holds NaN or infinity; take an earlier checkpoint")
    rank, alpha = _pattern(config, "rank_pattern", name, config["r"]), _pattern(config, "alpha_pattern", name, None)
    if rank != a.shape[0]:
        raise UserError(f"{path}: {name}: adapter_config.json says rank {rank}, the file holds {a.shape[0]}")
    alpha = config["lora_alpha"] if alpha is None else alpha
    return Factor(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _pattern(config: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    pattern = config.get(key) or {}
    if not pattern:
        return default
    from peft.utils.other import get_pattern_key  # peft's own rule, so that both read a pattern alike

    return pattern.get(get_pattern_key(list(pattern), name), default)


def write_adapter(
    folder: Path, factors: Factors, like: Adapter, base: Path, merge: Mapping[str, Any] | None = None
) -> None:
    """Write `factors` into an existing `folder` as an adapter that plain `peft.PeftModel.from_pretrained` loads.

    Config and hpe.json are those of `like`, with the explicit list of layers; a `merge` is recorded in hpe.json.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, factor in sorted(factors.items()):
        tensors[f"{_PREFIX}{name}{_A}"] = factor.a.contiguous()
        tensors[f"{_PREFIX}{name}{_B}"] = factor.b.contiguous()
    save_file(tensors, folder / ADAPTER_TENSORS, metadata={"format": "pt"})
    config = (
        like.config
        | _layers_config(factors, bool(like.config.get("use_rslora")))
        | {"base_model_name_or_path": str(base)}
    )
    _write_sorted(folder / ADAPTER_CONFIG, config)
    write_notes(folder, like.hpe, merge)


def write_notes(folder: Path, notes: Mapping[str, Any], merge: Mapping[str, Any] | None = None) -> None:
    """Write hpe.json into an existing folder; of a `merge` without the scores, which its input had."""
    if merge:
        notes = {key: value for key, value in notes.items() if key != "scores"} | {"merge": dict(merge)}
    _write_sorted(folder / HPE_CONFIG, notes)


def _layers_config(factors: Factors, rslora: bool) -> dict[str, Any]:
    ranks = {name: factor.rank for name, factor in factors.items()}
    alphas = {name: _alpha(factor, rslora) for name, factor in factors.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    # "^" makes peft take the name whole: without it a pattern also fits longer names that end alike.
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": value for name, value in sorted(ranks.items()) if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in sorted(alphas.items()) if value != alpha},
        "use_rslora": rslora,
        "init_lora_weights": True,
        "target_modules": sorted(factors),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
    }


def _alpha(factor: Factor, rslora: bool) -> float:
    """The alpha from which peft computes this scale again: a round number where one gives the very same scale."""
    norm = math.sqrt(factor.rank) if rslora else factor.rank
    alpha = factor.scale * norm
    return round(alpha, 9) if round(alpha, 9) / norm == factor.scale else alpha


def _commonest(values: Iterable[float]) -> float:
    counted = sorted(values)
    value = max(counted, key=counted.count)
    return int(value) if value == int(value) else value


def _write_sorted(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
