"""What is found before a run starts: each check on what it must refuse, and the whole table on real ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ports import next_port
from tiny_source import TinySource

from cogvlm_hpe import preflight
from cogvlm_hpe.config import RunConfig
from cogvlm_hpe.train.command import Flags, parse
from launcher.checks import Line, Table, attempt, merge
from launcher.comm import single
from launcher.errors import UsageError, UserError
from launcher.world import World, discover
from shards.write import build

NEW = Flags(resume=False, allow_change=False, check=False, print_trainable=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shard set and a config of the packaged base."""
    folder = tmp_path_factory.mktemp("preflight")
    build(TinySource(samples=16), folder / "set", single(), 8)
    config = {
        "run_dir": str(folder / "run"),
        "model": {"base": "tiny", "dtype": "fp32"},
        "adapter": {"rank": 4, "alpha": 8, "scope": "text"},
        "shards": {"train": [{"path": str(folder / "set")}], "batch": 4},
        "train": {"max_steps": 100, "warmup_steps": 1, "micro_batch": 1},
    }
    (folder / "lora.yaml").write_text(yaml.safe_dump(config))
    return folder


def config_of(place: Path, *more: str) -> RunConfig:
    return parse(["--config", str(place / "lora.yaml"), *more])[0]


def test_a_good_host_passes(place: Path) -> None:
    config = config_of(place)
    lines = [attempt(f.__name__, lambda f=f: f(config)) for f in (preflight.check_base, preflight.check_tokenizer)]
    lines += [attempt("shards", lambda: preflight.check_shards(config))]
    lines += [attempt("run_dir", lambda: preflight.check_run_dir(config, NEW))]
    assert all(line.ok for line in lines), lines
    assert "16 images" in lines[2].said and "a new run" in lines[3].said


def test_a_shard_that_is_missing_or_cut_is_named(place: Path, tmp_path: Path) -> None:
    build(TinySource(samples=16), tmp_path / "set", single(), 8)
    config = config_of(place, "--shards.train", json.dumps([{"path": str(tmp_path / "set")}]))
    first, second = sorted((tmp_path / "set").glob("*.tar"))
    os.truncate(second, 100)
    with pytest.raises(UserError, match=rf"{second}: 100 bytes of \d+; copy the set again"):
        preflight.check_shards(config)
    first.unlink()
    with pytest.raises(UserError, match=f"{first}: missing"):
        preflight.check_shards(config)


def test_an_adapter_of_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    config = config_of(place, "--adapter.init", str(tmp_path))
    with pytest.raises(UserError, match="no adapter there"):
        preflight.check_init(config)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "hpe.json").write_text('{"base_fingerprint": "another"}')
    with pytest.raises(UserError, match="made on another base"):
        preflight.check_init(config)


def test_a_run_that_is_there_already_wants_resume(place: Path, tmp_path: Path) -> None:
    config = config_of(place, "--run_dir", str(tmp_path))
    saved = tmp_path / "checkpoints" / "step-00000008"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="--resume"):
        preflight.check_run_dir(config, NEW)
    resumed = Flags(resume=True, allow_change=False, check=False, print_trainable=False)
    assert "goes on from step-00000008" in preflight.check_run_dir(config, resumed)


@pytest.mark.parametrize("below", ["file", "file/run", "link"])
def test_a_run_dir_that_no_folder_can_be_is_refused(place: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"not a folder, so .* cannot be made; choose another run_dir"):
        preflight.check_run_dir(config_of(place, "--run_dir", str(tmp_path / below)), NEW)


def test_gpus_are_told_apart_by_their_names(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "H100")
    two = World(0, 0, 2, 2, "", 1, "slurm")
    assert "2 a host (a GPU each, H100)" in preflight.check_ranks(config_of(place), two, ["a", "b"])
    with pytest.raises(UserError, match=r"2 ranks on a host share 1 GPUs; start one a GPU"):
        preflight.check_ranks(config_of(place), two, ["a", "a"])


def test_ranks_that_would_not_judge_are_told(place: Path) -> None:
    val = ["--shards.val", json.dumps([{"path": str(place / "set")}]), "--shards.batch", "64"]
    many = World(0, 0, 64, 1, "", 1, "slurm")
    said = preflight.check_ranks(config_of(place, *val, "--train.evaluate_every", "9"), many, [])
    assert said.endswith("; 8 of them judge, with evaluate.batch 2 64 would")
    for more in (["--train.evaluate_every", "0"], ["--train.evaluate_every", "9", "--evaluate.batch", "2"]):
        assert preflight.check_ranks(config_of(place, *val, *more), many, []).endswith("micro-batches a step each")


def test_nodes_may_name_their_interfaces_differently() -> None:
    both = [[Line("interface", True, name, host)] for name, host in (("ib0", "n1"), ("ib1", "n2"))]
    (line,) = merge(both, preflight._SAME_EVERYWHERE)
    assert line.ok and line.said == "ib0"


def test_disk_and_memory_are_compared_with_what_is_free(tmp_path: Path) -> None:
    assert "5 checkpoints of 12 MB" in preflight.check_disk(tmp_path / "deep" / "run", 10**6, keep=3)
    with pytest.raises(UserError, match="make room"):
        preflight.check_disk(tmp_path, 10**18, keep=3)
    memory = {"weights": 35e9, "reserved": 3e9}
    assert "38.0 GB by plan, most of it weights (35.0), 80.0 free" in preflight.check_memory(memory, 80.0)
    with pytest.raises(UserError, match="lower train.micro_batch"):
        preflight.check_memory(memory, 24.0)


def test_a_doomed_run_is_refused_with_the_remedy(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--run_dir", str(place / "doomed"), "--shards.train", json.dumps([{"path": str(place / "none")}])]
    table = Table(single())
    preflight.check_all(table, config_of(place, *words), NEW, discover({}))
    said = capsys.readouterr().out
    assert table.exit_code == 1
    assert "✗ shards" in said and "→ build a set" in said and "✓ base" in said and "✓ wall time" in said
    assert not (place / "doomed").exists()


def test_a_start_is_refused_with_a_line_for_each_mistake(place: Path) -> None:
    words = ["--model.base", str(place / "no-base"), "--shards.train", json.dumps([{"path": str(place / "none")}])]
    with pytest.raises(UserError) as refused:
        preflight.check_start(config_of(place, *words), NEW, discover({}), single())
    lines = str(refused.value).splitlines()
    assert len(lines) == 2 and "build a set" in lines[0] and "no-base" in lines[1], "base and tokenizer say the same"
    with pytest.raises(UsageError, match="multiple of the 2 ranks"):
        preflight.check_start(config_of(place, "--shards.batch", "5"), NEW, World(0, 0, 2, 2, "", 1, "env"), single())


@pytest.mark.slow
def test_two_ranks_take_two_real_steps_and_leave_nothing(place: Path) -> None:
    words = ["--config", str(place / "lora.yaml"), "--run_dir", str(place / "new" / "run"), "--deep"]
    program = [sys.executable, "-m", "cogvlm_hpe", "preflight", *words, "--gpu-memory", "80"]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next_port()), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=os.environ | world | {"RANK": rank})
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=300)[0] for rank in both]
    assert [rank.returncode for rank in both] == [0, 0], said
    for check in ("ranks", "base", "disk", "GPU memory", "all-reduce", "clocks", "two steps", "wall time"):
        assert f"✓ {check} " in said[0], said[0]
    assert "✗" not in said[0] and "✓" not in said[1]
    assert list((place / "new").iterdir()) == []
