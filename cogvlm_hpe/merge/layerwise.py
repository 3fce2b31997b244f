"""Layer-based merge (HPE-CogVLM, arXiv 2406.01914): per layer, one side's weight or the other's, whole.

One adapter: its tuned weight against the original. A layer at or above the similarity threshold stays tuned; elsewhere
the original is back. Two adapters: the changes that both make to a layer are compared, and the second one's layer wins
where the first's wins otherwise. `keep="below"` turns the direction round: where an adapter changed much, it stays.
The paper's public text names the rule but neither the threshold nor what one layer is: quantile 0.5 and `projection`
are this project's defaults, `below` and two adapters its additions.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cogvlm_hpe.merge.base import Base
from cogvlm_hpe.merge.factors import Factor, Factors
from cogvlm_hpe.merge.products import Products, base_and_tuned, of_changes
from launcher.comm import Comm
from launcher.errors import UserError

Granularity = Literal["projection", "module", "block"]
Keep = Literal["above", "below"]
DEFAULT_QUANTILE = 0.5
DIGITS = ".9g"  # a small LoRA on large weights: similarities differ in the seventh decimal


@dataclass(frozen=True)
class Choice:
    """What became of one adapted layer: `tuned` if the adapter (the second of two) won."""

    layer: str
    group: str
    similarity: float
    tuned: bool
    rank: int


def group_of(layer: str, granularity: Granularity) -> str:
    """The unit that wins or loses together: the projection itself, its parent module, or its numbered block."""
    parts = layer.split(".")
    if granularity == "projection":
        return layer
    if granularity == "module":
        return ".".join(parts[:-1]) or layer
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else layer


def similarities(base: Base, factors: Factors, granularity: Granularity, comm: Comm | None = None) -> dict[str, float]:
    """All ranks. Cosine of original and tuned weight of each group; the base is read once. Raises UserError on NaN."""
    return _cosines(base_and_tuned(base, factors, comm), granularity)


def similarities_of_two(first: Factors, second: Factors, granularity: Granularity) -> dict[str, float]:
    """Cosine of the two changes of each group that has layers in both; nothing but the factors is needed."""
    both = {layer: of_changes(first[layer], second[layer]) for layer in sorted(first.keys() & second.keys())}
    if not both:
        raise UserError("the two adapters have no layer in common, so none can win over the other; use --method cat")
    return _cosines(both, granularity)


def _cosines(products: Mapping[str, Products], granularity: Granularity) -> dict[str, float]:
    sums: dict[str, Products] = {}
    for layer, found in products.items():
        if not math.isfinite(found.cosine):
            raise UserError(f"layer {layer}: similarity {found.cosine}; the base or the adapter holds NaN or infinity")
        group = group_of(layer, granularity)
        sums[group] = sums[group] + found if group in sums else found
    return {group: total.cosine for group, total in sums.items()}


def threshold_of(
    found: Mapping[str, float], threshold: float | None, quantile: float | None, keep: Keep = "above"
) -> float:
    """The similarity that decides: the one given, else the quantile of those found, which is one of them."""
    if threshold is not None:
        return threshold
    quantile = DEFAULT_QUANTILE if quantile is None else quantile
    return float(np.quantile(list(found.values()), quantile, method="higher" if keep == "above" else "lower"))


def choose(
    factors: Factors, found: Mapping[str, float], threshold: float, granularity: Granularity, keep: Keep = "above"
) -> list[Choice]:
    """Winner takes all, for every layer of `factors` that has a similarity, in name order; the threshold itself wins.

    Raises UserError if no layer stays tuned.
    """
    choices = []
    for layer, factor in sorted(factors.items()):
        group = group_of(layer, granularity)
        if group in found:
            tuned = found[group] >= threshold if keep == "above" else found[group] <= threshold
            choices.append(Choice(layer, group, found[group], tuned, factor.rank))
    if not any(choice.tuned for choice in choices):
        best = max(found.values()) if keep == "above" else min(found.values())
        raise UserError(
            f"no layer is at similarity {threshold:{DIGITS}} or {keep} ({'highest' if keep == 'above' else 'lowest'}: "
            f"{best:{DIGITS}}), so nothing would stay tuned; move --threshold beyond that or use --quantile"
        )
    return choices


def winners(factors: Factors, choices: Iterable[Choice], rest: Factors | None = None) -> dict[str, Factor]:
    """The factors of the layers that stay tuned; elsewhere `rest`'s factor, or none: the base's weight again.

    A layer that only one of `factors` and `rest` has is nobody's loss and stays.
    """
    lost = {choice.layer for choice in choices if not choice.tuned}
    kept = {layer: factor for layer, factor in factors.items() if layer not in lost}
    return dict(rest or {}) | kept
