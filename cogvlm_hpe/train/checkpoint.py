"""Checkpoints that are complete or not there, and do not know how many ranks wrote them.

step-00000100/
    adapter_model.safetensors, adapter_config.json    the adapter as plain peft reads it
    or model.safetensors, config.json, tokenizer.json the whole model, when there is no adapter
    hpe.json             scope, answer format, prompts, base fingerprint
    optimizer.safetensors, auxiliary.safetensors      by parameter name, float32
    trainer.json         step and loader state
    manifest.json        sizes and sha256 of all of these, written last
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cogvlm_hpe.train.adapter import PREFIX, adapter_state, peft_name
from cogvlm_hpe.train.module import MODEL_PREFIX
from launcher.errors import UserError
from launcher.files import atomic_folder, sha256

FOLDER = "checkpoints"
AUXILIARY = "auxiliary.safetensors"
_MANIFEST = "manifest.json"


@dataclass
class Saved:
    """What a checkpoint holds; `weights` under the engine's parameter names."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


@dataclass
class Describe:
    """Files that belong in every checkpoint of a run, made once at its start."""

    notes: dict[str, Any]
    lora: Any | None  # peft's LoraConfig; None when the whole model trains
    model_config: Any
    tokenizer: Any


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` global steps lies."""
    return run_dir / FOLDER / f"step-{step:08d}"


def save(
    run_dir: Path,
    step: int,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    loader: dict[str, Any],
    describe: Describe,
    keep: int,
) -> Path:
    """Rank 0. Write the checkpoint after `step` steps, point `last` at it, and drop all but the newest `keep`."""
    final = folder_of(run_dir, step)
    if not final.exists():
        own = {name.removeprefix(MODEL_PREFIX): t for name, t in weights.items() if name.startswith(MODEL_PREFIX)}
        rest = {name: t for name, t in weights.items() if not name.startswith(MODEL_PREFIX)}
        with atomic_folder(final) as folder:
            _write_model(folder, own, describe)
            if rest:
                save_file(rest, folder / AUXILIARY)
            save_file(optimizer, folder / "optimizer.safetensors")
            _write_json(folder / "trainer.json", {"step": step, "loader": loader})
            _write_manifest(folder)
    _point(run_dir / "last", final)
    for old in sorted((run_dir / FOLDER).glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def _write_model(folder: Path, weights: dict[str, Tensor], describe: Describe) -> None:
    if describe.lora is not None:
        save_file(adapter_state(weights), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        describe.lora.save_pretrained(str(folder))
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        describe.model_config.save_pretrained(str(folder))
        describe.tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "hpe.json", describe.notes)


def _write_manifest(folder: Path) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())}
    _write_json(folder / _MANIFEST, {"files": files})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _point(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run: one with a manifest; None if there is none."""
    whole = [p for p in sorted((run_dir / FOLDER).glob("step-*")) if (p / _MANIFEST).is_file()]
    return whole[-1] if whole else None


def read(folder: Path) -> Saved:
    """A checkpoint, every file checked against the manifest. Raises UserError naming the file that is wrong."""
    manifest = json.loads((folder / _MANIFEST).read_text())["files"]
    for name, said in manifest.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != said["bytes"] or sha256(path) != said["sha256"]:
            raise UserError(f"{path}: not as its manifest says; remove this checkpoint and resume from the one before")
    try:
        weights = _read_weights(folder)
        optimizer = load_file(folder / "optimizer.safetensors")
    except SafetensorError as error:
        raise UserError(f"{folder}: cannot be read ({error})") from None
    return Saved(json.loads((folder / "trainer.json").read_text())["step"], weights, optimizer)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    adapter, model = folder / "adapter_model.safetensors", folder / "model.safetensors"
    for name, tensor in load_file(adapter if adapter.is_file() else model).items():
        name = name.removeprefix(PREFIX).replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        out[MODEL_PREFIX + name] = tensor
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
