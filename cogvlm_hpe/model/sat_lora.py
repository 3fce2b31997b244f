"""SAT's LoRA as factors, and back.

SAT adapts the attention of language layers (language expert) and of ViT layers. Its fused q, k, v has three independent
pairs: W = W0 + [B0·A0; B1·A1; B2·A2]·alpha/r. As one pair that is A = [A0; A1; A2], B = diag(B0, B1, B2), of rank 3r.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cogvlm_hpe.merge.factors import Adapter, Factor, Factors
from cogvlm_hpe.model.architecture import Architecture
from launcher.errors import UserError

Pairs = Mapping[str, list[tuple[Tensor, Tensor]]]
"""Module (Hugging Face name) → its pairs A (r, n_in), B (n_out / parts, r)."""

_LANGUAGE = "model.layers.{}.self_attn.language_expert_{}"
_VIT = "model.vision.transformer.layers.{}.attention.{}"
_PARTS = {"query_key_value": 3, "dense": 1}


def factors_of(pairs: Pairs, alpha: float) -> dict[str, Factor]:
    """SAT's pairs as one factor per layer, all of one rank (3r) and one scale (alpha / r), exact.

    The pair of `dense` is filled with zeros up to that rank, so that one rank and alpha hold for the whole adapter and
    a further stage can train on from it.
    """
    rank = max(sum(a.shape[0] for a, _ in found) for found in pairs.values())
    out = {}
    for module, found in pairs.items():
        a = torch.cat([a for a, _ in found])
        b = torch.block_diag(*(b for _, b in found))
        lack = rank - a.shape[0]
        a, b = torch.nn.functional.pad(a, (0, 0, 0, lack)), torch.nn.functional.pad(b, (0, lack))
        out[module] = Factor(a, b, alpha / found[0][0].shape[0])
    return out


def pairs_of(factors: Factors, config: Architecture) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], int]:
    """Factors as SAT's pairs, for every layer that SAT adapts, and their common rank r.

    Layers without a factor get zeros. SAT's code knows alpha = 1 only, so each factor's own scale goes into B, in
    float32 unless it is 1 / r already. The rank goes down to what B uses: what `factors_of` made comes back as it was.
    Raises UserError where a factor lies elsewhere.
    """
    homes = _homes(config)
    elsewhere = sorted(set(factors) - set(homes))
    if elsewhere:
        raise UserError(
            f"{len(elsewhere)} adapted layers have no place in a SAT LoRA, which is on the attention of language and "
            f"ViT layers only, the first {elsewhere[0]}; bake the adapter into the weights with --merge"
        )
    used = {module: _used(factor, homes[module][0]) for module, factor in factors.items()}
    rank = max((a.shape[0] for found in used.values() for a, _ in found), default=1) or 1
    dtype = next(iter(factors.values())).a.dtype
    out = {}
    for module, (parts, n_out, n_in) in homes.items():
        found = used.get(module) or [(torch.zeros(0, n_in, dtype=dtype), torch.zeros(n_out // parts, 0, dtype=dtype))]
        weight = round(factors[module].scale * rank, 12) if module in factors else 1.0
        out[module] = [_padded(a, b, rank, weight) for a, b in (found * parts if module not in used else found)]
    return out, rank


def _homes(config: Architecture) -> dict[str, tuple[int, int, int]]:
    """Module → (parts, n_out, n_in) of every linear layer that SAT's LoRA adapts."""
    towers = (
        (_LANGUAGE, config.num_hidden_layers, config.hidden_size),
        (_VIT, config.vision_config["num_hidden_layers"], config.vision_config["hidden_size"]),
    )
    return {
        pattern.format(layer, kind): (parts, parts * width, width)
        for pattern, layers, width in towers
        for layer in range(layers)
        for kind, parts in _PARTS.items()
    }


def _used(factor: Factor, parts: int) -> list[tuple[Tensor, Tensor]]:
    """For each part of the output, the rows of A and columns of B that are not zero there."""
    out = []
    for b in factor.b.chunk(parts):
        kept = b.any(dim=0)
        out.append((factor.a[kept], b[:, kept]))
    return out


def _padded(a: Tensor, b: Tensor, rank: int, weight: float) -> tuple[Tensor, Tensor]:
    if weight != 1.0:
        b = (b.double() * weight).float()
    lack = rank - a.shape[0]
    return torch.nn.functional.pad(a, (0, 0, 0, lack)), torch.nn.functional.pad(b, (0, lack))


def adapter_like(folder: Path, base_fingerprint: str, alpha: float) -> Adapter:
    """What adapter_config.json and hpe.json say of an adapter that came from a SAT LoRA, apart from its layers."""
    from peft import LoraConfig

    config = {key: value for key, value in LoraConfig().to_dict().items() if key != "target_modules"}
    origin = {"from": "SAT LoRA", "source": str(folder.resolve()), "sat_alpha": alpha}
    hpe = {"scope": "all", "base_fingerprint": base_fingerprint, "origin": origin}
    return Adapter(folder, {}, json.loads(json.dumps(config)), hpe)
