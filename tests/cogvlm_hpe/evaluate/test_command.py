"""The judge as users start it: real ranks, real model folders, result folders byte for byte."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from tiny_model import write_tiny_model

from cogvlm_hpe import cli
from cogvlm_hpe.evaluate import command, decode, reduce, unfinished
from cogvlm_hpe.evaluate.answer import Decoding
from cogvlm_hpe.model.load import load, load_several
from launcher.comm import Comm, single
from launcher.errors import UsageError
from shards.index import open_set
from shards.stream import read_all

_MPIRUN = Path(sys.executable).with_name("mpirun")
SAME = ("predictions.jsonl", "metrics.json")


def evaluate(ranks: int, *flags: object) -> subprocess.CompletedProcess[str]:
    start = [str(_MPIRUN), "-np", str(ranks)] if ranks > 1 else []
    words = [*start, sys.executable, "-m", "cogvlm_hpe", "evaluate", *map(str, flags)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


@pytest.fixture
def judged(tmp_path: Path, tiny_set: Callable[..., Path]) -> tuple[Path, Path]:
    """(model folder, shard set of 21 images)."""
    shard_set = tiny_set(samples=21)
    return write_tiny_model(tmp_path / "base", shard_set), shard_set


@pytest.mark.slow
def test_one_two_and_four_ranks_write_the_same_bytes(tmp_path: Path, judged: tuple[Path, Path]) -> None:
    model, shard_set = judged
    flags = ["--model", model, "--shards", shard_set, "--batch", 3]
    for ranks in (1, 2, 4):
        done = evaluate(ranks, *flags, "--out", tmp_path / str(ranks))
        assert done.returncode == 0, done.stderr
    for name in SAME:
        first = (tmp_path / "1" / name).read_bytes()
        assert first == (tmp_path / "2" / name).read_bytes() == (tmp_path / "4" / name).read_bytes(), name
    run = json.loads((tmp_path / "2" / "run.json").read_text())
    assert run["ranks"] == 2 and run["threads_per_rank"] == 1
    metrics = json.loads((tmp_path / "1" / "metrics.json").read_text())
    asked = [json.loads(line)["id"] + json.loads(line)["task"] for line in (tmp_path / "4" / SAME[0]).open()]
    images = {name.partition("/")[0] for name in asked}
    stored = open_set(shard_set)
    assert len(asked) == len(set(asked)) and images == {stored.key(i) for i in range(21)} and len(images) == 21
    assert metrics["tasks"]["pose"]["n"] == sum(len(stored.record(i).heads) for i in range(21))
    assert metrics["tasks"]["where"]["n"] == sum(len(stored.record(i).objects) for i in range(21))
    # The model was taught the first eight images: what it learned must come through the whole chain.
    assert metrics["tasks"]["where"]["accuracy"]["mean"] > 0.9
    assert (
        metrics["tasks"]["pose"]["valid"]["geodesic"]["median"]
        < metrics["tasks"]["pose"]["constant_pose"]["geodesic"]["median"]
    )


@pytest.mark.slow
def test_several_adapters_in_one_pass_answer_as_each_alone(tmp_path: Path, judged: tuple[Path, Path]) -> None:
    model, shard_set = judged
    adapters = [_adapter(model, tmp_path / run / "last", seed) for seed, run in enumerate(("lora", "merged"))]
    flags = ["--model", model, "--shards", shard_set, "--batch", 4, "--limit", 6, "--tasks", "where,pose"]
    named = [word for adapter in adapters for word in ("--adapter", adapter)]
    done = evaluate(2, *flags, "--workers", 1, *named, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["lora-last", "merged-last"]
    lines = []
    for adapter in adapters:
        alone = tmp_path / f"alone-{adapter.parent.name}"
        assert cli.main(["evaluate", *map(str, [*flags, "--adapter", adapter, "--out", alone])]) == 0
        lines.append((alone / "predictions.jsonl").read_bytes())
        assert lines[-1] == (tmp_path / "out" / f"{adapter.parent.name}-last" / "predictions.jsonl").read_bytes()
    assert lines[0] != lines[1], "two adapters that answer alike cannot show whose answers these are"
    keys = {json.loads(line)["key"] for line in lines[0].splitlines()}
    assert keys == {f"tiny-train-{i:06d}" for i in range(6)}


def test_adapters_of_scope_text_share_the_work_on_images(judged: tuple[Path, Path], tmp_path: Path) -> None:
    model, shard_set = judged
    systems = load_several(model, [_adapter(model, tmp_path / str(seed), seed) for seed in range(3)])
    assert len({next(system.model.parameters()).data_ptr() for system in systems}) == 1
    seen = []
    for system in systems:
        tower = system.model.model.vision
        tower.register_forward_hook(lambda *_: seen.append(1))
    [(_, items)] = read_all(open_set(shard_set), 0, 1, 4, 28, limit=4)
    together = decode.decode_systems(systems, items, ["pose"], Decoding())
    assert len(seen) == 1
    assert together == [decode.decode_batch(system, items, ["pose"], Decoding()) for system in systems]
    assert len(seen) == 4


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_and_its_share_judged_by_resume(tmp_path: Path, tiny_set) -> None:
    shard_set = tiny_set(samples=60)
    model = write_tiny_model(tmp_path / "base", shard_set)
    out, unfinished = tmp_path / "out", tmp_path / "out.unfinished"
    flags = ["--model", model, "--shards", shard_set, "--batch", 1, "--out", out]
    words = [_MPIRUN, "-np", 2, sys.executable, "-m", "cogvlm_hpe", "evaluate", *flags, "--rank-timeout", 2]
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True)
    state = unfinished / "rank-0001.json"
    while process.poll() is None and not (state.is_file() and list(unfinished.glob("batch-*.json"))):
        time.sleep(0.002)
    stopped = json.loads(state.read_text())["pid"]
    os.kill(stopped, signal.SIGSTOP)
    try:
        said = process.communicate(timeout=120)[1]
    finally:
        _end(stopped)
    assert process.returncode != 0 and f"last was rank 1 (host {platform.node()}, pid {stopped})" in said, said
    assert "--resume judges only what is left" in said and not out.exists()
    kept = {path.name: path.read_bytes() for path in unfinished.glob("batch-*.json")}
    assert 0 < len(kept) < 60
    assert cli.main(["evaluate", *map(str, flags)]) == 2  # what is there is neither overwritten nor mixed up
    assert cli.main(["evaluate", *map(str, flags), "--resume", "--limit", "3"]) == 2
    again = evaluate(1, *flags, "--resume")
    assert again.returncode == 0 and f"resumed: {len(kept)} batches were judged before" in again.stdout, again.stderr
    assert not unfinished.exists()
    assert cli.main(["evaluate", *map(str, flags[:-1]), str(tmp_path / "whole")]) == 0
    for name in SAME:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert cli.main(["evaluate", *map(str, flags), "--resume"]) == 0  # nothing is left to do


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


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


def _adapter(model: Path, folder: Path, seed: int) -> Path:
    """An adapter of scope `text` that changes answers, another way for each seed."""
    target = "model.layers.0.self_attn.language_expert_dense"
    lora = peft.LoraConfig(r=2, target_modules=[target], base_model_name_or_path=str(model))
    tuned = peft.get_peft_model(load(model).model, lora)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tuned.named_parameters():
        if "lora_" in name:
            tensor.data = torch.randn(tensor.shape, generator=generator)
    tuned.save_pretrained(folder)
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


def test_the_ranks_that_all_wait_for_are_named() -> None:
    states = {rank: {"rounds": 5, "host": f"n{rank // 2}", "pid": 100 + rank, "ranks": 4} for rank in range(4)}
    assert "all 4 ranks had done 5 rounds" in unfinished.late(states, 4, 60)
    states[3]["rounds"] = 4
    assert "last was rank 3 (host n1, pid 103) after 4 rounds, the others had done 5" in unfinished.late(states, 4, 60)
    del states[2]
    assert "no rank has moved for 60 s; rank 2, not started" in unfinished.late(states, 4, 60)
    assert "ranks 4, 5, 6, 7, 8, 9, 10, 11 and 4 more, not started" in unfinished.late(states | {2: states[3]}, 16, 1)
