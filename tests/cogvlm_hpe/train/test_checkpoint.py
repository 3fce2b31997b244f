"""Checkpoints: complete or not there, and checked when read."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from cogvlm_hpe.train import checkpoint
from launcher.errors import UserError

NAME = "cogvlm.model.layers.0.self_attn.language_expert_dense.lora_A.default.weight"


@pytest.fixture
def describe() -> checkpoint.Describe:
    lora = LoraConfig(r=2, target_modules=["model.layers.0.self_attn.language_expert_dense"])
    return checkpoint.Describe({"scope": "text"}, lora, None, None)


def save(run_dir: Path, step: int, describe: checkpoint.Describe, keep: int = 2) -> Path:
    weights = {NAME: torch.full((2, 3), float(step)), "dense.tower.weight": torch.ones(2)}
    optimizer = {f"{NAME}/exp_avg": torch.zeros(2, 3)}
    return checkpoint.save(run_dir, step, weights, optimizer, {"step": step}, describe, keep)


def test_what_is_read_is_what_was_saved(tmp_path: Path, describe: checkpoint.Describe) -> None:
    saved = checkpoint.read(save(tmp_path, 3, describe))
    assert saved.step == 3
    assert saved.weights.keys() == {NAME, "dense.tower.weight"}
    assert saved.weights[NAME].equal(torch.full((2, 3), 3.0))


def test_last_moves_and_the_newest_are_kept(tmp_path: Path, describe: checkpoint.Describe) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, describe)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]
    assert (tmp_path / "last").resolve().name == "step-00000003"
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "step-00000003"


def test_a_folder_without_manifest_is_not_a_checkpoint(tmp_path: Path, describe: checkpoint.Describe) -> None:
    save(tmp_path, 1, describe)
    (save(tmp_path, 2, describe) / "manifest.json").unlink()
    assert checkpoint.newest(tmp_path).name == "step-00000001"


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damage_is_named(tmp_path: Path, describe: checkpoint.Describe, damage: str) -> None:
    folder = save(tmp_path, 1, describe)
    path = folder / "optimizer.safetensors"
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"optimizer\.safetensors"):
        checkpoint.read(folder)


def test_a_failed_save_leaves_the_one_before(
    tmp_path: Path, describe: checkpoint.Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, describe)
    monkeypatch.setattr(checkpoint, "_write_manifest", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2, describe)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert (tmp_path / "last").resolve().name == "step-00000001"


def test_other_parameters_are_refused_by_name(tmp_path: Path, describe: checkpoint.Describe) -> None:
    folder = save(tmp_path, 1, describe)
    with pytest.raises(UserError, match="lora_A"):
        checkpoint.check_names(checkpoint.read(folder), ["dense.tower.weight"], folder)


def test_files_can_be_read_by_others(tmp_path: Path, describe: checkpoint.Describe) -> None:
    folder = save(tmp_path, 1, describe)
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert all((folder / name).stat().st_mode & 0o044 for name in manifest)
