"""From settings and adapters to the merged change of every layer: as factors where that is exact, else dense."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib import metadata
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from cogvlm_hpe.merge import arithmetic, layerwise, sparse
from cogvlm_hpe.merge.arithmetic import Weights
from cogvlm_hpe.merge.base import Base, check_fingerprint, check_together
from cogvlm_hpe.merge.factors import ADAPTER_TENSORS, Adapter, Factors
from cogvlm_hpe.merge.layerwise import Choice, Granularity, Keep
from cogvlm_hpe.merge.settings import DARE, DEFAULTS, ELEMENTWISE, Settings
from cogvlm_hpe.model.fingerprint import fingerprint
from cogvlm_hpe.model.threads import in_order
from cogvlm_hpe.model.tuned import Changes as ByRows
from cogvlm_hpe.model.tuned import Rows
from launcher.comm import Comm
from launcher.errors import UsageError, UserError
from launcher.files import sha256

_RECORDED = ("density", "gamma", "seed", "t", "layer_weight")
_BLOCK_ELEMENTS = 2**18  # 1 MiB of float32
_PACKAGES = ("cogvlm-hpe", "torch", "numpy", "peft", "safetensors")


class Changes(ByRows, Protocol):
    """The merged change of every adapted layer."""

    def change(self, layer: str) -> Tensor:
        """(n_out, n_in) float32, the caller's own."""
        ...

    def sample(self, layer: str, first: int, last: int) -> Tensor:
        """Rows [first, last) as they would be if the layer had no others."""
        ...

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer → (n_out, n_in)."""
        ...


@dataclass(frozen=True)
class LowRank:
    """Changes that are factors."""

    factors: Factors

    def layers(self) -> list[str]:
        """Sorted module names."""
        return sorted(self.factors)

    def change(self, layer: str) -> Tensor:
        """(n_out, n_in) float32."""
        return self.sample(layer, 0, len(self.factors[layer].b))

    def rows_of(self, layer: str) -> Rows:
        """float32, made of the factors when asked for."""
        factor = self.factors[layer]
        a, b = factor.a.float(), factor.b.float()
        return lambda first, last: (b[first:last] @ a).mul_(factor.scale)

    def sample(self, layer: str, first: int, last: int) -> Tensor:
        """(last - first, n_in) float32; rows do not depend on each other."""
        return self.rows_of(layer)(first, last)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer → (n_out, n_in)."""
        return {layer: (len(factor.b), factor.a.shape[1]) for layer, factor in self.factors.items()}


@dataclass(frozen=True)
class Elementwise:
    """Changes of full rank, made of several adapters' element by element, a layer at a time when asked for."""

    parts: Sequence[Factors]
    weights: Weights
    method: str
    sparsity: sparse.Sparsity

    def layers(self) -> list[str]:
        """Sorted module names."""
        return sorted({layer for part in self.parts for layer in part})

    def change(self, layer: str) -> Tensor:
        """(n_out, n_in) float32."""
        rows, out = self.rows_of(layer), torch.empty(self.shapes()[layer])
        blocks = out.split(max(1, _BLOCK_ELEMENTS // out.shape[1]))
        starts = list(itertools.accumulate((len(block) for block in blocks), initial=0))
        for block, joined in zip(blocks, in_order(lambda ends: rows(*ends), itertools.pairwise(starts)), strict=True):
            block.copy_(joined)
        return out

    def rows_of(self, layer: str) -> Rows:
        """float32; an adapter that lacks the layer has no part in it. Adapters are thinned out side by side."""
        held = [number for number, part in enumerate(self.parts) if layer in part]
        weights = [self.weights[number][layer] for number in held]
        method = sparse.METHODS[self.method]

        def thinned(number: int) -> Tensor:
            return method.thin(LowRank(self.parts[number]).change(layer), self.sparsity, f"{layer} {number}")

        changes = list(in_order(thinned, held))
        return lambda first, last: method.join([change[first:last] for change in changes], weights)

    def sample(self, layer: str, first: int, last: int) -> Tensor:
        """(last - first, n_in) float32, with the densities among these rows alone."""
        parts = [{layer: part[layer].rows(first, last)} if layer in part else {} for part in self.parts]
        return replace(self, parts=parts).change(layer)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer → (n_out, n_in)."""
        return {layer: shape for part in self.parts for layer, shape in LowRank(part).shapes().items()}


@dataclass(frozen=True)
class Merged:
    """The result of a merge: what is added to the base, the record of what was done, each layer's fate if any."""

    changes: Changes
    record: dict[str, Any]
    choices: list[Choice] = field(default_factory=list)


def merge(
    settings: Settings, base: Base, adapters: Sequence[Adapter], record: dict[str, Any], comm: Comm
) -> list[tuple[str, Merged]]:
    """All ranks. The merge, or every candidate of a sweep with its name; the layers of the base are shared out.

    `record` is what `compare` gave.
    """
    if settings.method == "layerwise":
        return _layerwise(settings, base, adapters, record, comm)
    return [("", Merged(_changes(settings, adapters), record))]


def compare(settings: Settings, base: Base, adapters: Sequence[Adapter], comm: Comm) -> dict[str, Any]:
    """All ranks; the first one looks. What is merged and how, for the record.

    Raises UserError where adapters and base do not fit together.
    """
    record = {}
    if comm.rank == 0:
        check_together(adapters)
        for adapter in adapters:
            check_fingerprint(base, adapter)
            base.check(adapter.factors)
        record = _record(settings, base, adapters)
    return comm.broadcast(record)


def _record(settings: Settings, base: Base, adapters: Sequence[Adapter]) -> dict[str, Any]:
    said = {key: getattr(settings, key) for key in _RECORDED if getattr(settings, key) != getattr(DEFAULTS, key)}
    if settings.method in DARE:
        said["seed"] = settings.seed
    origins = [
        {"name": adapter.path.resolve().name, "weight": weight, "sha256": sha256(adapter.path / ADAPTER_TENSORS)}
        for adapter, weight in zip(adapters, settings.weights, strict=True)
    ]
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return {
        "method": settings.method,
        **said,
        "adapters": origins,
        "base_fingerprint": fingerprint(base.path),
        "versions": versions,
    }


def _changes(settings: Settings, adapters: Sequence[Adapter]) -> Changes:
    parts = [adapter.factors for adapter in adapters]
    weights = layer_weights(settings, parts)
    if settings.method == "slerp":
        return LowRank(arithmetic.spherical(parts[0], parts[1], settings.t) if len(parts) == 2 else parts[0])
    if settings.method == "linear":
        return LowRank(arithmetic.average(parts, weights))
    if settings.method in ELEMENTWISE:
        return _elementwise(settings, parts, weights)
    return LowRank(arithmetic.weighted_sum(parts, weights))


def _elementwise(settings: Settings, parts: list[Factors], weights: Weights) -> Changes:
    """Where every element stays and no sign is disputed the methods are sums, and exact on the factors."""
    density = cast(float, settings.density)
    alone = len(parts) == 1
    if density >= 1.0 and (alone or settings.method not in sparse.ELECTING):
        mean = settings.method == "ties"
        return LowRank(arithmetic.average(parts, weights) if mean else arithmetic.weighted_sum(parts, weights))
    return Elementwise(parts, weights, settings.method, sparse.Sparsity(density, settings.gamma, settings.seed))


def layer_weights(settings: Settings, parts: Sequence[Factors]) -> list[dict[str, float]]:
    """Layer → weight, for each adapter: its own weight times that of the last pattern that fits the layer.

    Raises UsageError for a pattern that fits no layer or names no number.
    """
    layers = sorted({layer for part in parts for layer in part})
    weights = [dict.fromkeys(layers, weight) for weight in settings.weights]
    for said in settings.layer_weight:
        pattern, factors = _pattern(said, len(parts))
        fitting = [layer for layer in layers if fnmatchcase(layer, pattern)]
        if not fitting:
            raise UsageError(f"--layer-weight {said}: fits no adapted layer; one is {layers[0]}")
        for of, whole, factor in zip(weights, settings.weights, factors, strict=True):
            of |= dict.fromkeys(fitting, whole * factor)
    return weights


def _pattern(said: str, count: int) -> tuple[str, list[float]]:
    pattern, _, numbers = said.rpartition("=")
    try:
        factors = [float(number) for number in numbers.split(",")]
    except ValueError:
        factors = []
    if not pattern or len(factors) not in (1, count) or not all(map(math.isfinite, factors)):
        raise UsageError(f"--layer-weight {said}: write PATTERN=WEIGHT, or PATTERN=W1,W2,… for {count} adapters")
    return pattern, factors * count if len(factors) == 1 else factors


def _layerwise(
    settings: Settings, base: Base, adapters: Sequence[Adapter], record: dict[str, Any], comm: Comm
) -> list[tuple[str, Merged]]:
    granularity = cast(Granularity, settings.granularity)
    tuned, rest = adapters[-1].factors, adapters[0].factors if len(adapters) == 2 else {}
    if rest:
        found = layerwise.similarities_of_two(rest, tuned, granularity)
    else:
        found = layerwise.similarities(base, tuned, granularity, comm)
    wanted: list[tuple[str, float | None, float | None]]
    wanted = [(f"quantile-{value:.15g}", None, value) for value in settings.sweep]
    wanted += [(f"threshold-{value:.15g}", value, None) for value in settings.sweep_thresholds]
    if not wanted:
        return [("", _candidate(settings, found, tuned, rest, record, settings.threshold, settings.quantile))]
    out = []
    for name, threshold, quantile in wanted:
        try:
            out.append((name, _candidate(settings, found, tuned, rest, record, threshold, quantile)))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return out


def _candidate(
    settings: Settings, found: Mapping[str, float], tuned: Factors, rest: Factors, record: dict[str, Any],
    threshold: float | None, quantile: float | None,
) -> Merged:  # fmt: skip
    granularity, keep = cast(Granularity, settings.granularity), cast(Keep, settings.keep)
    limit = layerwise.threshold_of(found, threshold, quantile, keep)
    choices = layerwise.choose(tuned, found, limit, granularity, keep)
    said = {
        "granularity": granularity,
        "keep": keep,
        "threshold": limit,
        "quantile": layerwise.DEFAULT_QUANTILE if threshold is None and quantile is None else quantile,
        "tuned": sum(choice.tuned for choice in choices),
        "layers_total": len(choices),
    }
    record = {"method": settings.method} | said | record
    return Merged(LowRank(layerwise.winners(tuned, choices, rest)), record, choices)


def factors_of(changes: Changes) -> Factors:
    """The factors of changes that are some. Raises UserError for changes of full rank."""
    if isinstance(changes, LowRank):
        return changes.factors
    raise UserError(
        "this method changes single elements, so its result has full rank and is no adapter; "
        "write weights with --output hf or sat, or the nearest adapter with --rank N"
    )
