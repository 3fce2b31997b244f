"""Layer-based merge (HPE-CogVLM, arXiv 2406.01914): per layer, the tuned weight or the original one, whole.

A layer whose tuned weight keeps a high cosine similarity to the original wins and stays tuned; otherwise the original
layer wins. The paper's public text names the rule but neither the threshold nor what one layer is: quantile 0.5 and
`projection` are this project's defaults.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from cogvlm_hpe.merge.base import Base
from cogvlm_hpe.merge.factors import Factor, Factors
from launcher.errors import UsageError, UserError
from launcher.progress import track

Granularity = Literal["projection", "module", "block"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
DEFAULT_QUANTILE = 0.5


@dataclass(frozen=True)
class Moments:
    """⟨W0, W0⟩, ⟨W0, ΔW⟩ and ⟨ΔW, ΔW⟩ of a layer, float64. They add over the layers of a group."""

    base: float
    cross: float
    delta: float

    def __add__(self, other: "Moments") -> "Moments":
        """Of both layers together."""
        return Moments(self.base + other.base, self.cross + other.cross, self.delta + other.delta)

    @property
    def cosine(self) -> float:
        """cos(W0, W0 + ΔW): 0 where either is zero, NaN where a weight is not finite."""
        if not all(map(math.isfinite, (self.base, self.cross, self.delta))):
            return math.nan  # said here: min and max below would swallow it
        tuned = self.base + 2.0 * self.cross + self.delta
        norm = math.sqrt(max(self.base, 0.0)) * math.sqrt(max(tuned, 0.0))
        return min(1.0, max(-1.0, (self.base + self.cross) / norm)) if norm != 0.0 else 0.0


@dataclass(frozen=True)
class Choice:
    """What became of one adapted layer."""

    layer: str
    group: str
    similarity: float
    tuned: bool
    rank: int


def moments(rows: Iterable[tuple[int, torch.Tensor]], factor: Factor) -> Moments:
    """Moments of a layer from its weight's row blocks `(first row, (k, n_in))`, in one pass.

    ⟨W0, BA⟩ = tr(Bᵀ·W0·Aᵀ) and ‖BA‖² = tr((BᵀB)(AAᵀ)): no (n_out, n_in) product is formed.
    """
    a, b = factor.a.double(), factor.b.double()
    base = cross = 0.0
    for start, block in rows:
        block = block.double()
        base += float(block.square().sum())
        cross += float((b[start : start + len(block)].T @ block).mul_(a).sum())
    delta = float(((b.T @ b) * (a @ a.T)).sum())
    return Moments(base, factor.scale * cross, factor.scale**2 * delta)


def group_of(layer: str, granularity: Granularity) -> str:
    """The unit that wins or loses together: the projection itself, its parent module, or its numbered block."""
    parts = layer.split(".")
    if granularity == "projection":
        return layer
    if granularity == "module":
        return ".".join(parts[:-1]) or layer
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else layer


def similarities(base: Base, factors: Factors, granularity: Granularity) -> dict[str, float]:
    """Cosine of each group; the base is read once, a block of rows at a time. Raises UserError on NaN."""
    sums: dict[str, Moments] = {}
    for layer, factor in track(sorted(factors.items()), "read base"):
        group = group_of(layer, granularity)
        sums[group] = sums.get(group, Moments(0.0, 0.0, 0.0)) + moments(base.rows(layer, factor), factor)
    found = {group: total.cosine for group, total in sums.items()}
    for group, value in found.items():
        if not math.isfinite(value):
            raise UserError(f"layer {group}: similarity {value}; the base or the adapter holds NaN or infinity")
    return found


def threshold_of(found: Mapping[str, float], threshold: float | None, quantile: float | None) -> float:
    """The similarity from which a group stays tuned: given, or the quantile of those found (one of them)."""
    if threshold is not None and quantile is not None:
        raise UsageError("--threshold and --quantile exclude each other; give one")
    if threshold is not None:
        return threshold
    quantile = DEFAULT_QUANTILE if quantile is None else quantile
    if not 0.0 <= quantile <= 1.0:
        raise UsageError(f"--quantile {quantile}: must be within [0, 1]")
    return float(np.quantile(list(found.values()), quantile, method="higher"))


def choose(factors: Factors, found: Mapping[str, float], threshold: float, granularity: Granularity) -> list[Choice]:
    """Winner takes all, for every adapted layer in name order. Raises UserError if no layer stays tuned."""
    choices = []
    for layer, factor in sorted(factors.items()):
        group = group_of(layer, granularity)
        choices.append(Choice(layer, group, found[group], found[group] >= threshold, factor.rank))
    if not any(choice.tuned for choice in choices):
        best = max(found.values())
        raise UserError(
            f"no layer reaches similarity {threshold:g} (highest: {best:.6f}), so nothing would stay tuned; "
            "lower --threshold or use --quantile"
        )
    return choices


def winners(factors: Factors, choices: Iterable[Choice]) -> dict[str, Factor]:
    """The factors of the layers that stay tuned; all others are the base's again."""
    return {choice.layer: factors[choice.layer] for choice in choices if choice.tuned}
