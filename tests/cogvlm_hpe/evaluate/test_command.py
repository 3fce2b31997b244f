"""The judge as users start it: real ranks, real model folders, result folders byte for byte."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from cogvlm_hpe.evaluate import command, reduce
from launcher.comm import Comm, single
from launcher.errors import UsageError

_MPIRUN = Path(sys.executable).with_name("mpirun")
SAME = ("predictions.jsonl", "metrics.json")


def evaluate(ranks: int, *flags: object) -> subprocess.CompletedProcess[str]:
    start = [str(_MPIRUN), "-np", str(ranks)] if ranks > 1 else []
    words = [*start, sys.executable, "-m", "cogvlm_hpe", "evaluate", *map(str, flags)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


@pytest.fixture
def judged(tmp_path: Path, tiny_set: Callable[..., Path]) -> tuple[Path, Path]:
    """(model folder, shard set of 13 images)."""
    shard_set = tiny_set(samples=13)
    return write_tiny_model(tmp_path / "base", shard_set), shard_set


@pytest.mark.slow
def test_one_two_and_three_ranks_write_the_same_bytes(tmp_path: Path, judged: tuple[Path, Path]) -> None:
    model, shard_set = judged
    flags = ["--model", model, "--shards", shard_set, "--batch", 3]
    for ranks in (1, 2, 3):
        done = evaluate(ranks, *flags, "--out", tmp_path / str(ranks))
        assert done.returncode == 0, done.stderr
    for name in SAME:
        first = (tmp_path / "1" / name).read_bytes()
        assert first == (tmp_path / "2" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name
    run = json.loads((tmp_path / "2" / "run.json").read_text())
    assert run["ranks"] == 2 and run["threads_per_rank"] == 1
    metrics = json.loads((tmp_path / "1" / "metrics.json").read_text())
    assert metrics["tasks"]["pose"]["n"] == 19 and metrics["tasks"]["where"]["n"] == 13
    # The model was taught the first eight images: what it learned must come through the whole chain.
    assert metrics["tasks"]["where"]["accuracy"]["mean"] > 0.9
    assert (
        metrics["tasks"]["pose"]["valid"]["geodesic"]["median"]
        < metrics["tasks"]["pose"]["constant_pose"]["geodesic"]["median"]
    )


@pytest.mark.slow
def test_limit_workers_and_several_adapters(tmp_path: Path, judged: tuple[Path, Path]) -> None:
    model, shard_set = judged
    adapters = [_empty_adapter(model, tmp_path / run / "last") for run in ("lora", "merged")]
    flags = [
        "--model",
        model,
        "--shards",
        shard_set,
        "--batch",
        4,
        "--limit",
        6,
        "--workers",
        1,
        "--tasks",
        "where,pose",
    ]
    named = [word for adapter in adapters for word in ("--adapter", adapter)]
    done = evaluate(2, *flags, *named, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["lora-last", "merged-last"]
    alone = evaluate(1, *flags, "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    # An adapter that adds nothing answers as its base does.
    lines = (tmp_path / "alone" / "predictions.jsonl").read_bytes()
    assert lines == (tmp_path / "out" / "lora-last" / "predictions.jsonl").read_bytes()
    keys = {json.loads(line)["key"] for line in lines.splitlines()}
    assert keys == {f"tiny-train-{i:06d}" for i in range(6)}


@pytest.mark.slow
def test_mistakes_end_with_one_line_and_leave_no_result(tmp_path: Path, judged: tuple[Path, Path]) -> None:
    model, shard_set = judged
    for flags, code, said in [
        (["--model", model, "--shards", tmp_path / "none"], 1, "no such folder"),
        (["--model", tmp_path / "none", "--shards", shard_set], 1, "no base model there"),
        (["--model", model, "--shards", shard_set, "--tasks", "pose,nose"], 2, "'nose': not one of"),
    ]:
        done = evaluate(1, *flags, "--out", tmp_path / "out")
        assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()


def _empty_adapter(model: Path, folder: Path) -> Path:
    import peft

    from cogvlm_hpe.model.load import load

    target = "model.layers.0.self_attn.language_expert_dense"
    lora = peft.LoraConfig(r=2, target_modules=[target], base_model_name_or_path=str(model))
    peft.get_peft_model(load(model).model, lora).save_pretrained(folder)
    (folder / "hpe.json").write_text(json.dumps({"scope": "text"}))
    return folder


def test_short_names_tell_folders_apart() -> None:
    assert command.short_names([Path("runs/lora/last"), Path("runs/merged")]) == ["last", "merged"]
    assert command.short_names([Path("/r/a/last"), Path("/r/b/last")]) == ["a-last", "b-last"]
    with pytest.raises(UsageError, match="given twice"):
        command.short_names([Path("a"), Path("a")])


def test_an_existing_result_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}")
    parser = ArgumentParser()
    command.add_arguments(parser)
    words = ["--model", "m", "--shards", "s", "--out", str(tmp_path / "out")]
    with pytest.raises(UsageError, match="exists already"):
        command.run(parser.parse_args(words))


class _Gathered(Comm):
    """Rank 0 of two, whose other rank has said `other`."""

    size = 2

    def __init__(self, other: list) -> None:
        self._other = other

    def gather(self, value: list) -> list:
        """Both ranks' values."""
        return [value, self._other]


def test_rows_come_in_batch_order_whoever_made_them() -> None:
    rows = reduce.collect([(0, [{"id": "a"}]), (2, [{"id": "c"}])], 3, _Gathered([(1, [{"id": "b"}])]))
    assert [row["id"] for row in rows] == ["a", "b", "c"]


@pytest.mark.parametrize("other", [[], [(0, [])], [(1, []), (1, [])]])
def test_a_batch_that_is_missing_or_comes_twice_is_a_defect(other: list) -> None:
    with pytest.raises(RuntimeError, match="were dealt"):
        reduce.collect([(0, [])], 2, _Gathered(other))


def test_a_result_folder_is_complete_and_free_of_times(tmp_path: Path) -> None:
    row = {"id": "k/object-0", "key": "k", "task": "what", "kind": "other", "errors": {"exact": True}}
    facts = reduce.run_facts(single(), 1, 0.0)
    reduce.write_result(tmp_path / "out", [row], {"system": "s"}, facts)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "metrics.json",
        "predictions.jsonl",
        "run.json",
        "tensorboard",
    ]
    text = (tmp_path / "out" / "metrics.json").read_text()
    assert not any(word in text for word in ("time", "host", "ranks", str(tmp_path)))
