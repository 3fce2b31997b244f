"""Checkpoints that are complete or not there, and do not know how many ranks wrote them.

step-00000100/
    adapter_model.safetensors, adapter_config.json    the adapter as plain peft reads it
    or model.safetensors, config.json, tokenizer.json the whole model, when there is no adapter
    hpe.json             scope, answer format, prompts, base fingerprint, scores where the run was judged
    optimizer.safetensors, auxiliary.safetensors      by parameter name, float32
    trainer.json         step and loader state; random numbers need none, they are a function of seed, step and rank
    manifest.json        sizes and sha256 of all of these, written last
"""

import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvlm_hpe.merge.factors import ADAPTER_TENSORS, Adapter, Factors, read_adapter, write_adapter
from cogvlm_hpe.train.adapter import factors_of, joined, own_name, parted, peft_name
from cogvlm_hpe.train.module import MODEL_PREFIX
from launcher.errors import UserError
from launcher.files import atomic_folder, sha256, write_json_atomic

FOLDER = "checkpoints"
_MANIFEST, _NOTES, _TRAINER = "manifest.json", "hpe.json", "trainer.json"
_MODEL, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"
AUXILIARY = "auxiliary.safetensors"


@dataclass
class Saved:
    """What a checkpoint holds; `weights` under the engine's parameter names."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    loader: dict[str, Any]


@dataclass
class Describe:
    """Files that belong in every checkpoint of a run, made once at its start."""

    notes: dict[str, Any]
    lora: LoraConfig | None  # None when the whole model trains
    model_config: Any
    tokenizer: Any
    before: Factors = field(default_factory=dict)  # what the trained factors are stacked on


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` global steps lies."""
    return run_dir / FOLDER / f"step-{step:08d}"


@dataclass
class Writer:
    """Rank 0's hand. With `beside` a checkpoint is written by a thread while the next steps run.

    keep: so many of the newest checkpoints stay, and the best one by the score `best`.
    """

    run_dir: Path
    describe: Describe
    keep: int = 2
    best: str = "geodesic_deg"
    beside: bool = False
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _under_way: Future[Path] | None = None

    def save(
        self,
        step: int,
        weights: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        loader: dict[str, Any],
        scores: dict[str, float] | None = None,
    ) -> None:
        """Write the checkpoint after `step` steps, point `last` and `best`, and drop what is not to be kept.

        Where that is there already, the scores are put into it. The tensors are the writer's from now on. Raises
        UserError where this or an earlier one cannot be written; the ones before it are as they were.
        """
        self.wait()
        self._under_way = self._thread.submit(self._save, step, weights, optimizer, loader, scores)
        if not self.beside:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong there."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def look(self) -> None:
        """Raise what went wrong beside the steps, if something has; does not wait."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def is_best(self, scores: dict[str, float]) -> bool:
        """Whether no kept checkpoint has a better score."""
        self.wait()
        rivals = _scored(_complete(self.run_dir), self.best)
        return self.best in scores and all(
            _badness(self.best, scores[self.best]) < badness for badness in rivals.values()
        )

    def _save(
        self,
        step: int,
        weights: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        loader: dict[str, Any],
        scores: dict[str, float] | None,
    ) -> Path:
        final = folder_of(self.run_dir, step)
        try:
            if not (final / _MANIFEST).is_file():
                shutil.rmtree(final, ignore_errors=True)
                with atomic_folder(final) as folder:
                    _write(folder, step, weights, optimizer, loader, self.describe, scores)
            elif scores is not None:
                _add_scores(final, scores)
            _point(self.run_dir / "last", final)
            self._tidy()
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{final}: cannot be written ({error}); the checkpoints before it are whole: make room, then --resume"
            ) from None
        return final

    def _tidy(self) -> None:
        whole = _complete(self.run_dir)
        kept, scored = whole[-self.keep :], _scored(whole, self.best)
        if scored:
            kept.append(min(scored, key=lambda folder: scored[folder]))
            _point(self.run_dir / "best", kept[-1])
        for old in whole:
            if old not in kept:
                os.rename(old, old.with_name(f".{old.name}.tmp-old"))  # out of sight first: never seen half removed
        for rest in (self.run_dir / FOLDER).glob(".*.tmp-*"):
            shutil.rmtree(rest)


def _scored(folders: list[Path], name: str) -> dict[Path, float]:
    """How bad the judged ones of these checkpoints are, oldest first."""
    notes = {folder: json.loads((folder / _NOTES).read_text()) for folder in folders}
    found = {folder: said.get("scores", {}).get(name) for folder, said in notes.items()}
    return {folder: _badness(name, score) for folder, score in found.items() if score is not None}


def _badness(name: str, score: float) -> float:
    return score if name.endswith("_deg") else -score


def _write(
    folder: Path,
    step: int,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    loader: dict[str, Any],
    describe: Describe,
    scores: dict[str, float] | None,
) -> None:
    own = {name.removeprefix(MODEL_PREFIX): t for name, t in weights.items() if name.startswith(MODEL_PREFIX)}
    rest = {name: t for name, t in weights.items() if not name.startswith(MODEL_PREFIX)}
    if describe.lora is None:
        _write_model(folder, own, describe, step)
    else:
        _write_adapter(folder, own, describe, step)
    if rest:
        save_file(rest, folder / AUXILIARY)
    _save(folder / _OPTIMIZER, optimizer, step)
    _write_json(folder / _NOTES, describe.notes | ({} if scores is None else {"scores": scores}))
    _write_json(folder / _TRAINER, {"step": step, "loader": loader})
    _write_manifest(folder)


def _add_scores(folder: Path, scores: dict[str, float]) -> None:
    """Into a checkpoint that was saved unjudged; at every moment each file is as the manifest says, or not in it."""
    files = json.loads((folder / _MANIFEST).read_text())["files"]
    notes = json.loads((folder / _NOTES).read_text()) | {"scores": scores}
    write_json_atomic(folder / _MANIFEST, {"files": {name: said for name, said in files.items() if name != _NOTES}})
    write_json_atomic(folder / _NOTES, notes)
    write_json_atomic(folder / _MANIFEST, {"files": files | {_NOTES: _described(folder / _NOTES)}})


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _write_model(folder: Path, weights: dict[str, Tensor], describe: Describe, step: int) -> None:
    _save(folder / _MODEL, weights, step)
    describe.model_config.save_pretrained(str(folder))
    describe.tokenizer.save(str(folder / "tokenizer.json"))


def _write_adapter(folder: Path, weights: dict[str, Tensor], describe: Describe, step: int) -> None:
    lora = describe.lora
    assert lora is not None
    whole = joined(weights, lora, describe.before)
    like = Adapter(folder, whole, lora.to_dict(), describe.notes)
    write_adapter(folder, whole, like, Path(str(lora.base_model_name_or_path)))
    found = read_adapter(folder).factors
    _refuse_other(ADAPTER_TENSORS, _shapes(found), _shapes(whole), step)
    learned = any(bool(found[layer].b[:, : lora.r].any()) for layer in factors_of(weights, lora))
    if step and not learned:
        raise UserError(
            f"{ADAPTER_TENSORS} after step {step}: every lora_B is zero, nothing was learned; is train.lr 0?"
        )


def _shapes(factors: Factors) -> dict[str, Any]:
    return {layer: (tuple(factor.a.shape), tuple(factor.b.shape)) for layer, factor in factors.items()}


def _save(path: Path, tensors: dict[str, Tensor], step: int) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    with safe_open(path, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    _refuse_other(path.name, found, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, step)


def _refuse_other(name: str, found: dict[str, Any], wanted: dict[str, Any], step: int) -> None:
    wrong = sorted(found.items() ^ wanted.items())
    if wrong:
        raise UserError(f"{name} after step {step}: {wrong[0][0]} was not written as it is; save again")


def _write_manifest(folder: Path) -> None:
    _write_json(folder / _MANIFEST, {"files": {path.name: _described(path) for path in sorted(folder.iterdir())}})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _point(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run: one with a manifest; None if there is none."""
    whole = _complete(run_dir)
    return whole[-1] if whole else None


def torn(run_dir: Path) -> list[Path]:
    """What has a checkpoint's name and no manifest: this program leaves none such, a copy that broke off does."""
    return [p for p in _named(run_dir) if not (p / _MANIFEST).is_file()]


def _complete(run_dir: Path) -> list[Path]:
    return [p for p in _named(run_dir) if (p / _MANIFEST).is_file()]


def _named(run_dir: Path) -> list[Path]:
    """What has a checkpoint's name, oldest first; step-00004000.keep is somebody's copy, which nothing here touches."""
    return [p for p in sorted((run_dir / FOLDER).glob("step-*")) if re.fullmatch(r"step-\d+", p.name)]


def read(folder: Path, before: Factors | None = None) -> Saved:
    """A checkpoint, every file checked against the manifest; `before` is what its adapter was stacked on.

    Raises UserError naming the file that is wrong.
    """
    manifest = json.loads((folder / _MANIFEST).read_text())["files"]
    for name, said in manifest.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != said["bytes"] or sha256(path) != said["sha256"]:
            raise UserError(f"{path}: not as its manifest says; remove this checkpoint and resume from the one before")
    try:
        weights = _read_weights(folder, before or {})
        optimizer = load_file(folder / _OPTIMIZER)
    except SafetensorError as error:
        raise UserError(f"{folder}: cannot be read ({error})") from None
    trainer = json.loads((folder / _TRAINER).read_text())
    return Saved(trainer["step"], weights, optimizer, trainer["loader"])


def _read_weights(folder: Path, before: Factors) -> dict[str, Tensor]:
    adapter = folder / ADAPTER_TENSORS
    if adapter.is_file():
        own = parted({own_name(name): tensor for name, tensor in load_file(adapter).items()}, before)
    else:
        own = load_file(folder / _MODEL)
    out = {MODEL_PREFIX + name: tensor for name, tensor in own.items()}
    if (folder / AUXILIARY).is_file():
        out |= load_file(folder / AUXILIARY)
    return out


def check_names(saved: Saved, names: list[str], folder: Path) -> None:
    """Raise UserError unless the checkpoint holds exactly the parameters this run trains."""
    wrong = sorted(set(saved.weights) ^ set(names))
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} parameters differ from this config's, the first {peft_name(wrong[0])}; "
            "resume with the config the run was started with"
        )
