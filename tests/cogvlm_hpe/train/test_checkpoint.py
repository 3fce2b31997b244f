"""Checkpoints: complete or not there, and checked when read."""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

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


def tensors(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    weights = {NAME: torch.full((2, 3), float(step)), "dense.tower.weight": torch.ones(2)}
    return weights | {NAME.replace("lora_A", "lora_B"): torch.ones(3, 2)}, {f"{NAME}/exp_avg": torch.zeros(2, 3)}


def save(run_dir: Path, step: int, describe: checkpoint.Describe, score: float | None = None, **how: Any) -> Path:
    scores = None if score is None else {"geodesic_deg": score}
    checkpoint.Writer(run_dir, describe, **how).save(step, *tensors(step), {"step": step}, scores)
    return checkpoint.folder_of(run_dir, step)


def test_what_is_read_is_what_was_saved(tmp_path: Path, describe: checkpoint.Describe) -> None:
    saved = checkpoint.read(save(tmp_path, 3, describe))
    assert saved.step == 3
    assert saved.weights.keys() == {NAME, NAME.replace("lora_A", "lora_B"), "dense.tower.weight"}
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


def test_the_best_is_kept_besides_the_newest(tmp_path: Path, describe: checkpoint.Describe) -> None:
    for step, score in ((1, 30.0), (2, 10.0), (3, None), (4, 20.0), (5, None)):
        save(tmp_path, step, describe, score)
    assert [p.name[-1] for p in sorted((tmp_path / "checkpoints").iterdir())] == ["2", "4", "5"]
    assert ((tmp_path / "best").resolve().name, (tmp_path / "last").resolve().name) == (
        "step-00000002",
        "step-00000005",
    )
    writer = checkpoint.Writer(tmp_path, describe)
    assert [writer.is_best({"geodesic_deg": score}) for score in (9.0, 10.0, 11.0)] == [True, False, False]
    assert checkpoint.Writer(tmp_path, describe, best="grounding_accuracy").is_best({"grounding_accuracy": 0.1})


def test_more_is_better_where_the_score_is_no_error(tmp_path: Path, describe: checkpoint.Describe) -> None:
    for step, score in ((1, 0.3), (2, 0.8), (3, 0.5)):
        writer = checkpoint.Writer(tmp_path, describe, best="grounding_accuracy")
        writer.save(step, *tensors(step), {}, {"grounding_accuracy": score})
    assert (tmp_path / "best").resolve().name == "step-00000002"


def test_what_is_written_beside_the_steps_is_the_same(tmp_path: Path, describe: checkpoint.Describe) -> None:
    writers = [checkpoint.Writer(tmp_path / name, describe, beside=name == "beside") for name in ("plain", "beside")]
    for writer in writers:
        for step in (1, 2):
            writer.save(step, *tensors(step), {})
        writer.wait()
    manifests = [(checkpoint.newest(writer.run_dir) / "manifest.json").read_bytes() for writer in writers]
    assert manifests[0] == manifests[1]


def test_an_adapter_that_learned_nothing_is_not_saved(tmp_path: Path, describe: checkpoint.Describe) -> None:
    weights, optimizer = tensors(1)
    weights[NAME.replace("lora_A", "lora_B")].zero_()
    with pytest.raises(UserError, match="every lora_B is zero"):
        checkpoint.Writer(tmp_path, describe).save(1, weights, optimizer, {})
    assert checkpoint.newest(tmp_path) is None


class Killed:
    """Kills this process at its n-th touch of a file, as seen by the interpreter."""

    EVENTS = ("open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")

    def __init__(self, at: int) -> None:
        self.left = at
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.EVENTS:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)


def test_kill_at_every_write_leaves_a_loadable_run(tmp_path: Path, describe: checkpoint.Describe) -> None:
    """Every touch of a file while step 3 is saved: 2, or 3 if it is there, can be read, and `last` is one of them."""
    seen = []
    for at in range(1000):
        run_dir = tmp_path / str(at)
        save(run_dir, 1, describe, score=2.0, keep=1)
        save(run_dir, 2, describe, keep=1)
        child = os.fork()
        if child == 0:
            Killed(at)
            save(run_dir, 3, describe, score=1.0, keep=1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        newest = checkpoint.newest(run_dir)
        seen.append(checkpoint.read(newest).step)
        assert checkpoint.read((run_dir / "last").resolve()).step in (2, seen[-1])
        assert checkpoint.read((run_dir / "best").resolve()).step in (1, 3)
        save(run_dir, 4, describe, score=0.0, keep=1)  # the next start goes on, and clears away what was left
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000004"]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert seen == sorted(seen) and {2, 3} == set(seen) and len(seen) > 20


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, describe: checkpoint.Describe) -> None:
    """A file size limit, in a child: the kernel refuses the write as it would on a full disk."""
    save(tmp_path, 1, describe)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        try:
            save(tmp_path, 2, describe)
        except UserError as error:
            said = str(error)
            os._exit(0 if "step-00000002: cannot be written" in said and "make room" in said else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert checkpoint.read((tmp_path / "last").resolve()).step == 1


def test_other_parameters_are_refused_by_name(tmp_path: Path, describe: checkpoint.Describe) -> None:
    folder = save(tmp_path, 1, describe)
    with pytest.raises(UserError, match="lora_A"):
        checkpoint.check_names(checkpoint.read(folder), ["dense.tower.weight"], folder)


def test_files_can_be_read_by_others(tmp_path: Path, describe: checkpoint.Describe) -> None:
    folder = save(tmp_path, 1, describe)
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert all((folder / name).stat().st_mode & 0o044 for name in manifest)
