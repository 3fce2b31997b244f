"""Merged weights as a whole checkpoint, a tensor at a time: spread over ranks by files, and resumed between files."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvlm_hpe.merge.methods import Changes, Merged
from cogvlm_hpe.merge.settings import Settings
from cogvlm_hpe.model import convert, sat
from cogvlm_hpe.model.folders import HF_CONFIG, SAT_CONFIG
from cogvlm_hpe.model.pickled import save_entries
from cogvlm_hpe.model.sat_weights import LATEST, rank_file
from cogvlm_hpe.model.tuned import TunedWeights, squares
from cogvlm_hpe.model.weights import Weights
from launcher.comm import Comm
from launcher.errors import UserError
from launcher.files import publish_folder, write_json_atomic
from launcher.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import StateDictSplit

_RECIPE = "recipe.json"
_LOSSES = ".losses.json"
SAMPLED_ROWS = 64


def expected_losses(base: Weights, changes: Changes) -> dict[str, float]:
    """Layer → ‖rounding error‖ / ‖change‖ on some rows of it: what writing would lose, known before it.

    Methods on single elements take their densities among these rows.
    """
    out = {}
    for layer, (n_out, n_in) in sorted(changes.shapes().items()):
        first = max(0, n_out - SAMPLED_ROWS) // 2
        last = min(n_out, first + SAMPLED_ROWS)
        rows = base.flat(f"{layer}.weight", first * n_in, last * n_in).reshape(-1, n_in)
        change = changes.sample(layer, first, last).double()
        size, exact = squares(change), change.add_(rows)
        base.forget(f"{layer}.weight")
        out[layer] = (squares(exact.sub_(exact.to(rows.dtype))) / size) ** 0.5 if size else 0.0
    return out


def _foretell(base: Weights, changes: Changes) -> None:
    losses = expected_losses(base, changes)
    if not losses:
        return
    lines = [f"rounding will lose of each layer's change, as {SAMPLED_ROWS} rows of it say:"]
    lines += [f"  {loss:7.2%}  {layer}" for layer, loss in losses.items()]
    typical = sorted(losses.values())[len(losses) // 2]
    print(
        "\n".join([*lines, f"  {typical:7.2%}  in the middle; an adapter (--output adapter) loses nothing"]), flush=True
    )


Job = Callable[[Path, Callable[[], None]], None]
"""Writes one file; calls the second argument after each tensor."""


@dataclass(frozen=True)
class Form:
    """The files of a checkpoint, each with its number of tensors and what writes it, and what writes the small rest."""

    files: Mapping[str, tuple[int, Job]]
    finish: Callable[[Path], None]


def write(
    settings: Settings, merged: Merged, base: Weights, comm: Comm, explain: Callable[[Path, dict[str, float]], None]
) -> dict[str, float]:
    """All ranks. Write the checkpoint; rank 0 adds what `explain(folder, losses)` writes and makes it visible.

    Files that an interrupted run with the same recipe finished stay. Returns the loss of each layer by rounding.
    Raises UserError for a tensor that is not finite, a disk too small, or an unfinished folder of another merge.
    """
    weights = TunedWeights(base, merged.changes)
    form = _sat_form(weights, settings.mp) if settings.output == "sat" else _hf_form(weights, settings.max_shard_gb)
    unfinished = settings.out.with_name(f".{settings.out.name}.unfinished")
    if comm.rank == 0:
        _foretell(base, merged.changes)
        _begin(unfinished, merged.record | {"output": settings.output, "files": list(form.files)}, weights)
    comm.barrier()
    mine = list(form.files.items())[comm.rank :: comm.size]
    with Progress(comm).bar("write tensors", sum(count for _, (count, _) in mine)) as bar, _Sealer() as sealer:
        for file, (count, job) in mine:
            if (unfinished / file).exists():
                bar.advance(count)
                continue
            weights.losses.clear()
            job(_temporary(unfinished / file), bar.advance)
            sealer.seal(unfinished / file, dict(weights.losses))
    gathered = comm.gather([_read_losses(unfinished / file) for file, _ in mine])
    losses = {layer: loss for found in gathered or [] for part in found for layer, loss in part.items()}
    if comm.rank == 0:
        form.finish(unfinished)
        explain(unfinished, losses)
        for path in [unfinished / _RECIPE, *unfinished.rglob(f"*{_LOSSES}")]:
            path.unlink()
        publish_folder(unfinished, settings.out)
    comm.barrier()
    return losses


def _begin(folder: Path, recipe: dict[str, Any], weights: Weights) -> None:
    """Make the folder, or take up one that the same merge left behind."""
    path, recipe = folder / _RECIPE, json.loads(json.dumps(recipe))
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != recipe:
            raise UserError(f"{folder}: left unfinished by a merge with other settings or inputs; remove it first")
        for rest in folder.rglob("*.tmp"):
            rest.unlink()
        found = sum((folder / file).exists() for file in recipe["files"])
        print(f"continuing {folder}: {found} of {len(recipe['files'])} files are there")
        return
    shutil.rmtree(folder, ignore_errors=True)
    convert.need_room(folder, convert.total_bytes(weights))
    for file in recipe["files"]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, recipe)


def _temporary(path: Path) -> Path:
    """The name of a file until it is whole and durable."""
    return path.with_name(f"{path.name}.tmp")


class _Sealer:
    """Makes files durable, gives them their names and puts beside them what rounding lost; while others are written."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> "_Sealer":
        return self

    def seal(self, path: Path, losses: Mapping[str, float]) -> None:
        """Begin to; the one before is finished first, so that the disk is at most one file behind."""
        if self._last:
            self._last.result()
        self._last = self._thread.submit(_seal, path, losses)

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        if self._last:
            self._last.result()


def _seal(path: Path, losses: Mapping[str, float]) -> None:
    with _temporary(path).open("rb") as file:
        os.fsync(file.fileno())
    write_json_atomic(path.with_name(path.name + _LOSSES), losses)
    os.replace(_temporary(path), path)


def _read_losses(path: Path) -> dict[str, float]:
    losses: dict[str, float] = json.loads(path.with_name(path.name + _LOSSES).read_text(encoding="utf-8"))
    return losses


def _hf_form(weights: Weights, max_shard_gb: float) -> Form:
    plan = convert.shard_plan(weights, int(max_shard_gb * 1e9))

    def job(names: list[str]) -> Job:
        return lambda path, done: convert.write_shard(weights, path, names, done)

    files = {file: (len(names), job(names)) for file, names in plan.filename_to_tensors.items()}
    return Form(files, partial(_finish_hf, weights, plan))


def _finish_hf(weights: Weights, plan: "StateDictSplit", folder: Path) -> None:
    convert.write_shard_index(folder, plan)
    write_json_atomic(folder / HF_CONFIG, convert.hf_config(weights))
    convert.copy_companions(weights.folder, folder)


def _sat_form(weights: Weights, mp_size: int) -> Form:
    convert.check_mp(weights, mp_size)
    config = sat.sat_config(weights.architecture, mp_size)

    def job(mp_rank: int) -> Job:
        entries = convert.base_entries(weights, mp_rank, mp_size, set())
        return lambda path, done: save_entries(path, "module", entries, done)

    files = {f"1/{rank_file(rank)}": (len(weights.names()) + 1, job(rank)) for rank in range(mp_size)}
    return Form(files, partial(_finish_sat, weights, config))


def _finish_sat(weights: Weights, config: dict[str, Any], folder: Path) -> None:
    write_json_atomic(folder / SAT_CONFIG, config)
    convert.copy_companions(weights.folder, folder)
    (folder / LATEST).write_text("1", encoding="utf-8")
