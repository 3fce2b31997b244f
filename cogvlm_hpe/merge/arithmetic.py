"""Task arithmetic on factors: scaling and sums of adapters, exact, with no cross terms between them."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from cogvlm_hpe.merge.factors import Factor, Factors


def scale(factors: Factors, weight: float) -> dict[str, Factor]:
    """Task arithmetic with one adapter: every layer's part times `weight`. Exact: only the scale changes."""
    return {name: replace(factor, scale=weight * factor.scale) for name, factor in factors.items()}


def add(parts: Sequence[Factors]) -> dict[str, Factor]:
    """The sum of adapters: factors side by side, ranks add, no cross terms.

    A layer's scales become that of its first part; the others are carried by B in the wider of both dtypes, float32
    at least, and exactly so where the ratio is a power of two.
    """
    names = sorted({name for part in parts for name in part})
    return {name: _joined([part[name] for part in parts if name in part]) for name in names}


def _joined(factors: Sequence[Factor]) -> Factor:
    first = factors[0]
    if len(factors) == 1:
        return first
    dtype = torch.float32
    for factor in factors:
        dtype = torch.promote_types(dtype, torch.promote_types(factor.a.dtype, factor.b.dtype))
    lead = first.scale or 1.0
    columns = [(factor.b.double() * (factor.scale / lead)).to(dtype) for factor in factors]
    return Factor(torch.cat([factor.a.to(dtype) for factor in factors]), torch.cat(columns, dim=1), lead)
