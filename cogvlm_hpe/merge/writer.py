"""A merge from adapters to a finished folder: complete, or not there at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_hpe.merge import arithmetic, layerwise, report
from cogvlm_hpe.merge.base import Base, check_fingerprint
from cogvlm_hpe.merge.factors import ADAPTER_TENSORS, Adapter, Factor, read_adapter, write_adapter
from cogvlm_hpe.merge.layerwise import Choice, Granularity
from launcher.errors import UsageError, UserError
from launcher.files import atomic_folder, sha256, write_json_atomic

_MUST_AGREE = ("scope", "answer_format", "prompts", "base_fingerprint")


@dataclass(frozen=True)
class Merged:
    """The result of a merge: factors to write, the record of what was done, and each layer's fate if it had one."""

    factors: Mapping[str, Factor]
    record: dict[str, Any]
    choices: list[Choice]


def merge_layerwise(
    base: Base, adapter: Adapter, threshold: float | None, quantile: float | None, granularity: Granularity
) -> Merged:
    """The layer-based merge of one adapter with its base. Raises UserError where nothing would stay tuned."""
    fingerprint = check_fingerprint(base, adapter)
    found = layerwise.similarities(base, adapter.factors, granularity)
    limit = layerwise.threshold_of(found, threshold, quantile)
    choices = layerwise.choose(adapter.factors, found, limit, granularity)
    quantile = layerwise.DEFAULT_QUANTILE if threshold is None and quantile is None else quantile
    record = {
        "method": "layerwise",
        "granularity": granularity,
        "threshold": limit,
        "quantile": quantile,
        "tuned": sum(choice.tuned for choice in choices),
        "layers_total": len(choices),
        "adapters": [_origin(adapter, 1.0)],
        "base_fingerprint": fingerprint,
    }
    return Merged(layerwise.winners(adapter.factors, choices), record, choices)


def merge_arithmetic(base: Base, adapters: Sequence[Adapter], weights: Sequence[float]) -> Merged:
    """Σ weight · adapter on the base. Raises UserError where the adapters do not fit together."""
    if len(weights) != len(adapters):
        raise UsageError(f"{len(weights)} --weight for {len(adapters)} --adapter: give one each, in the same order")
    for other in adapters[1:]:
        for key in _MUST_AGREE:
            if other.hpe.get(key) != adapters[0].hpe.get(key):
                raise UserError(
                    f"adapters {adapters[0].path} and {other.path} differ in {key} (hpe.json); they cannot be summed"
                )
    fingerprints = [check_fingerprint(base, adapter) for adapter in adapters]
    parts = [arithmetic.scale(adapter.factors, weight) for adapter, weight in zip(adapters, weights, strict=True)]
    record = {
        "method": "task-arithmetic",
        "adapters": [_origin(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True)],
        "base_fingerprint": fingerprints[0],
    }
    return Merged(arithmetic.add(parts), record, [])


def _origin(adapter: Adapter, weight: float) -> dict[str, Any]:
    return {"name": adapter.path.resolve().name, "weight": weight, "sha256": sha256(adapter.path / ADAPTER_TENSORS)}


def write(out: Path, merged: Merged, base: Base, like: Adapter) -> None:
    """Adapter, merge.json, merge.md, README.md; heatmap.png if layers were chosen. Raises UserError if `out` exists."""
    with atomic_folder(out) as folder:
        write_adapter(folder, merged.factors, like, base.path.resolve(), merged.record)
        layers = [
            {"layer": c.layer, "group": c.group, "similarity": c.similarity, "winner": report.winner(c), "rank": c.rank}
            for c in merged.choices
        ]
        write_json_atomic(folder / "merge.json", merged.record | {"layers": layers})
        (folder / "merge.md").write_text(report.markdown(merged.record, merged.choices), encoding="utf-8")
        (folder / "README.md").write_text(report.card(out.resolve().name, base.path, merged.record), encoding="utf-8")
        if merged.choices:
            report.heatmap(folder / "heatmap.png", merged.choices, merged.record["threshold"])


def read_adapters(paths: Sequence[Path]) -> list[Adapter]:
    """Each folder's factors; the first one's configuration is the model for what is written."""
    return [read_adapter(path) for path in paths]
