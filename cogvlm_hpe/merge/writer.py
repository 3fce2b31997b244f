"""A merge from adapters to a finished folder: complete, or not there at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_hpe.merge import dense, lowrank, methods, report, scope
from cogvlm_hpe.merge.base import Base
from cogvlm_hpe.merge.factors import SCOPE, Adapter, Factors, read_adapter, write_adapter, write_notes
from cogvlm_hpe.merge.memory import Watch, bound_bytes
from cogvlm_hpe.merge.methods import LowRank, Merged
from cogvlm_hpe.merge.settings import ELEMENTWISE, Settings
from launcher.comm import Comm
from launcher.errors import UserError
from launcher.files import atomic_folder, write_json_atomic


@dataclass(frozen=True)
class Job:
    """A merge that is ready to be written: settings, inputs, each result with its name, and memory since the start."""

    settings: Settings
    base: Base
    adapters: list[Adapter]
    results: list[tuple[str, Merged]]
    watch: Watch


def prepare(settings: Settings, comm: Comm) -> Job:
    """All ranks. Read, compare and choose, by settings that `settings.check` passed.

    Raises UserError for adapters and bases that do not fit together.
    """
    from cogvlm_hpe.model.folders import resolve_base

    watch = Watch()
    base, adapters = Base(resolve_base(settings.base)), [read_adapter(path) for path in settings.adapter]
    _check_scope(settings, adapters[0])
    compared = methods.compare(settings, base, adapters, comm)
    if comm.rank == 0:
        bound_mb, own_mb = bound_bytes(settings, base, adapters) / 1e6, watch.start_bytes / 1e6
        print(f"memory: at most {bound_mb:.0f} MB a rank beside the program's own {own_mb:.0f} MB", flush=True)
    results = methods.merge(settings, base, adapters, compared, comm)
    if settings.output == "adapter" and settings.rank is None:
        for _, merged in results:
            methods.factors_of(merged.changes)
    return Job(settings, base, adapters, results, watch)


def _check_scope(settings: Settings, adapter: Adapter) -> None:
    scope_of = adapter.scope
    if settings.output == "adapter" or scope_of == "all":
        return
    if not settings.every_token:
        raise UserError(
            f"{adapter.path}: scope {scope_of}: works on {scope_of} tokens only, and weights change every token; "
            "keep --output adapter, or give --every-token to write what the change makes of the answers beside them"
        )
    if settings.method in ELEMENTWISE:
        raise UserError(
            f"{adapter.path}: scope {scope_of}: what weights make of the answers is measured on an adapter, and "
            f"--method {settings.method} has none; merge with --rank N first, then write that one's weights"
        )


def write(job: Job, comm: Comm) -> list[tuple[str, Merged, dict[str, float]]]:
    """All ranks. Write everything; each result with what its layers lost by rounding or by a low rank.

    Raises UserError where the output exists, the disk is too small or a tensor is not finite.
    """
    if job.settings.output != "adapter":
        written = [_write_dense(job, merged, comm) for _, merged in job.results]
    elif job.settings.sweeps:
        written = _write_sweep(job) if comm.rank == 0 else []
    else:
        written = [_write_one(job, comm)]
    took_mb = comm.max(job.watch.stop()) / 1e6
    if comm.rank == 0:
        print(f"memory: {took_mb:.0f} MB were needed beside the program's own, in the rank that needed most")
    return written


def _write_one(job: Job, comm: Comm) -> tuple[str, Merged, dict[str, float]]:
    [(name, merged)] = job.results
    record, rank = merged.record, job.settings.rank
    losses: dict[str, float] = {}
    if isinstance(merged.changes, LowRank):
        factors = merged.changes.factors
    else:
        assert rank is not None, "prepare refuses an adapter of full rank"
        factors, losses = lowrank.nearest(merged.changes, rank, comm)
        record = record | {"rank": rank}
    if comm.rank == 0:
        with atomic_folder(job.settings.out) as folder:
            _fill(folder, job, merged, job.settings.out.resolve().name, factors, record, losses)
    return name, merged, losses


def _write_sweep(job: Job) -> list[tuple[str, Merged, dict[str, float]]]:
    with atomic_folder(job.settings.out) as folder:
        for name, merged in job.results:
            (folder / name).mkdir()
            _fill(folder / name, job, merged, name, methods.factors_of(merged.changes), merged.record, {})
        keys = ("threshold", "quantile", "keep", "granularity", "tuned", "layers_total")
        rows = [{"adapter": name} | {key: merged.record[key] for key in keys} for name, merged in job.results]
        write_json_atomic(folder / "sweep.json", rows)
        (folder / "sweep.md").write_text(report.sweep(rows), encoding="utf-8")
    return [(name, merged, {}) for name, merged in job.results]


def _fill(
    folder: Path, job: Job, merged: Merged, name: str, factors: Factors, record: Mapping[str, Any],
    losses: dict[str, float],
) -> None:  # fmt: skip
    """One adapter and what explains it."""
    write_adapter(folder, factors, job.adapters[0], job.base.path.resolve(), record)
    _explain(folder, job, record, merged, name, report.Losses("low rank", losses))


def _write_dense(job: Job, merged: Merged, comm: Comm) -> tuple[str, Merged, dict[str, float]]:
    record = merged.record | {"output": job.settings.output}
    if job.adapters[0].scope != "all" and comm.rank == 0:
        record |= {
            "text_only_lost": scope.difference(job.base.path, job.adapters[0], methods.factors_of(merged.changes))
        }

    def explain(folder: Path, losses: dict[str, float]) -> None:
        hpe = {key: value for key, value in job.adapters[0].hpe.items() if key not in (SCOPE, "base_fingerprint")}
        write_notes(folder, hpe | {SCOPE: "all"}, record)
        _explain(folder, job, record, merged, job.settings.out.resolve().name, report.Losses("rounding", losses))

    return "", merged, dense.write(job.settings, merged, job.base.weights, comm, explain)


def _explain(
    folder: Path, job: Job, record: Mapping[str, Any], merged: Merged, name: str, losses: "report.Losses"
) -> None:
    """merge.json, merge.md, README.md; heatmap.png and its TensorBoard file if layers were chosen."""
    job.watch.stop()  # what libraries that draw and write tables take is the program's own
    said = dict(record)
    layers = report.layer_rows(merged.choices, losses)
    write_json_atomic(folder / "merge.json", said | {"layers": layers})
    text = report.markdown(said, layers)
    (folder / "merge.md").write_text(text, encoding="utf-8")
    card = report.card(name, job.base.path.resolve(), said)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if merged.choices:
        report.heatmap(folder / "heatmap.png", merged.choices, said)
        report.tensorboard(folder, text)
