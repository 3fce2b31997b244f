"""Checkpoints: complete or not there, and checked when read."""

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig

from cogvlm_hpe.train import checkpoint
from launcher.errors import UserError

NAME = "cogvlm.model.layers.0.self_attn.language_expert_dense.lora_A.default.weight"


def described_run() -> checkpoint.Describe:
    layer = "model.layers.0.self_attn.language_expert_dense"
    lora = LoraConfig(r=2, target_modules=[layer], base_model_name_or_path="some/base")
    return checkpoint.Describe({"scope": "text"}, lora, None, None)


@pytest.fixture
def describe() -> checkpoint.Describe:
    return described_run()


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
    assert [folder.name for folder in checkpoint.torn(tmp_path)] == ["step-00000002"]


def test_a_copy_beside_the_checkpoints_is_none_and_stays(tmp_path: Path, describe: checkpoint.Describe) -> None:
    copy = save(tmp_path, 1, describe).with_name("step-00000001.keep")
    checkpoint.folder_of(tmp_path, 1).rename(copy)
    assert checkpoint.newest(tmp_path) is None
    for step in (2, 3, 4):
        save(tmp_path, step, describe)
    assert (copy / "manifest.json").is_file()
    (copy / "manifest.json").unlink()
    assert checkpoint.torn(tmp_path) == []


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


def test_scores_that_come_later_go_into_the_checkpoint(tmp_path: Path, describe: checkpoint.Describe) -> None:
    folder = save(tmp_path, 1, describe)
    before = sorted(path.name for path in folder.iterdir())
    for score in (7.0, None):
        save(tmp_path, 1, describe, score)
        assert json.loads((folder / "hpe.json").read_text())["scores"] == {"geodesic_deg": 7.0}
        assert (tmp_path / "best").resolve() == folder
        assert checkpoint.read(folder).step == 1
    assert sorted(path.name for path in folder.iterdir()) == before
    assert list(json.loads((folder / "manifest.json").read_text())["files"]) == [n for n in before if n[0] != "m"]


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


def test_what_fails_beside_the_steps_is_said_at_the_next_look(tmp_path: Path, describe: checkpoint.Describe) -> None:
    writer = checkpoint.Writer(tmp_path, describe, beside=True)
    writer.look()
    (tmp_path / "checkpoints").write_text("in the way of the folder")
    writer.save(1, *tensors(1), {})
    with pytest.raises(UserError, match="step-00000001: cannot be written"):
        until(writer.look)


def until(look: Callable[[], None]) -> None:
    """Look for as long as a slow machine may take."""
    for _ in range(1000):
        look()
        time.sleep(0.01)


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


class Seen(NamedTuple):
    """What can be read after a kill: steps of the newest checkpoint and of those that `last` and `best` point to."""

    newest: int | None
    last: int | None
    best: int | None
    left_after_next: list[str]


def step_at(folder: Path | None) -> int | None:
    try:
        return None if folder is None else checkpoint.read(folder.resolve()).step
    except (OSError, UserError):
        return None


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """A kill at every touch of a file while step 3, the best so far, is saved; the last one comes too late."""
    folder, described, seen = tmp_path_factory.mktemp("killed"), described_run(), []
    save(folder / "before", 1, described, score=2.0, keep=1)
    save(folder / "before", 2, described, keep=1)
    status = None
    while status != 0:
        run_dir = folder / str(len(seen))
        shutil.copytree(folder / "before", run_dir, symlinks=True)
        child = os.fork()
        if child == 0:
            try:
                Killed(len(seen))
                save(run_dir, 3, described, score=1.0, keep=1)
                os._exit(0)
            except BaseException:  # a child never goes on with what pytest does
                os._exit(5)
        status = os.waitpid(child, 0)[1]
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
        steps = [step_at(path) for path in (checkpoint.newest(run_dir), run_dir / "last", run_dir / "best")]
        save(run_dir, 4, described, score=0.0, keep=1)  # the next start goes on, and clears away what was left
        seen.append(Seen(*steps, [path.name for path in (run_dir / "checkpoints").iterdir()]))
        shutil.rmtree(run_dir)
    return seen


def test_kill_at_every_write_leaves_a_loadable_run(killed: list[Seen]) -> None:
    newest = [seen.newest for seen in killed]
    assert newest == sorted(newest, key=str) and {2, 3} == set(newest) and len(newest) > 20
    assert all(seen.left_after_next == ["step-00000004"] for seen in killed)


def test_latest_never_points_at_a_torn_checkpoint(killed: list[Seen]) -> None:
    """Nor does `best`; both move after what they point to is there, and before the old one goes."""
    assert all(seen.last in (2, seen.newest) and seen.best in (1, 3) for seen in killed)
    assert {seen.last for seen in killed} == {2, 3} and {seen.best for seen in killed} == {1, 3}


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
        except BaseException:
            os._exit(5)
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
