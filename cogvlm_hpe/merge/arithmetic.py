"""Merges that are exact on factors: scaling, sums, averages and spherical interpolation of adapters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from cogvlm_hpe.merge.factors import Factor, Factors
from cogvlm_hpe.merge.products import of_changes
from launcher.errors import UsageError

Weights = Sequence[Mapping[str, float]]
"""For each adapter: layer → its weight there."""
_PARALLEL = 0.9995  # beyond this cosine, sin(angle) divides rounding errors: a straight line instead


def weighted_sum(parts: Sequence[Factors], weights: Weights) -> dict[str, Factor]:
    """Σ weight · adapter (task arithmetic, and concatenation where every weight is 1)."""
    return add([_weighted(part, of) for part, of in zip(parts, weights, strict=True)])


def average(parts: Sequence[Factors], weights: Weights) -> dict[str, Factor]:
    """Σ weight · adapter / Σ weight: what averaging the tuned models gives; a missing layer counts as no change.

    Raises UsageError for a layer whose weights add up to nothing.
    """
    totals = {layer: sum(of[layer] for of in weights) for layer in weights[0]}
    for layer, total in totals.items():
        if abs(total) < 1e-8:
            raise UsageError(f"--method linear divides by the sum of the weights, which is {total:g} for {layer}")
    return weighted_sum(parts, [{layer: of[layer] / totals[layer] for layer in of} for of in weights])


def spherical(first: Factors, second: Factors, t: float) -> dict[str, Factor]:
    """SLERP between the changes of two adapters, layer by layer: t = 0 gives the first, t = 1 the second.

    Angles are those between the changes; between whole tuned weights they are nearly 0 and SLERP is a plain average.
    A layer that one adapter lacks, or whose changes are parallel, is interpolated along a straight line.
    """
    shares = {layer: _shares(first.get(layer), second.get(layer), t) for layer in first.keys() | second.keys()}
    weights = [{layer: both[which] for layer, both in shares.items()} for which in (0, 1)]
    return weighted_sum([first, second], weights)


def _shares(one: Factor | None, other: Factor | None, t: float) -> tuple[float, float]:
    cosine = of_changes(one, other).cosine if one is not None and other is not None else 1.0
    if abs(cosine) > _PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _weighted(factors: Factors, weights: Mapping[str, float]) -> dict[str, Factor]:
    return {layer: replace(factor, scale=weights[layer] * factor.scale) for layer, factor in factors.items()}


def add(parts: Sequence[Factors]) -> dict[str, Factor]:
    """The sum of adapters: factors side by side, ranks add, no cross terms; what has scale 0 takes no rank.

    A layer's scales become that of its first part; the others are carried by B in the wider of both dtypes, float32
    at least, and exactly so where the ratio is a power of two.
    """
    names = sorted({name for part in parts for name in part})
    return {name: _joined([part[name] for part in parts if name in part]) for name in names}


def _joined(factors: Sequence[Factor]) -> Factor:
    factors = [factor for factor in factors if factor.scale] or factors[:1]
    first = factors[0]
    if len(factors) == 1:
        return first
    dtype = torch.float32
    for factor in factors:
        dtype = torch.promote_types(dtype, torch.promote_types(factor.a.dtype, factor.b.dtype))
    lead = first.scale
    columns = [(factor.b.double() * (factor.scale / lead)).to(dtype) for factor in factors]
    return Factor(torch.cat([factor.a.to(dtype) for factor in factors]), torch.cat(columns, dim=1), lead)
