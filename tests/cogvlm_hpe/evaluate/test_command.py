"""The judge as users start it: real ranks, real model folders, result folders byte for byte."""

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_model import write_tiny_model
from tiny_source import TinySource

from cogvlm_hpe import cli
from cogvlm_hpe.evaluate import command, decode, gallery, repeats
from cogvlm_hpe.evaluate.answer import Decoding
from cogvlm_hpe.evaluate.card import write_card
from cogvlm_hpe.evaluate.results import load_results
from cogvlm_hpe.model.load import load, load_several
from launcher.comm import single
from launcher.errors import UsageError, UserError
from shards.cache import FOLDER_VARIABLE
from shards.index import open_set
from shards.stream import read_all
from shards.write import build

_MPIRUN = Path(sys.executable).with_name("mpirun")
RANKS = Path(__file__).with_name("judge_ranks.py")
SAME = ("predictions.jsonl", "metrics.json")


@dataclass(frozen=True)
class Judged:
    """A model, a set of 21 images, two adapters, and the results of several numbers of ranks below `out`."""

    model: Path
    shard_set: Path
    adapters: list[Path]
    out: Path


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    place = tmp_path_factory.mktemp("judged")
    build(TinySource(samples=21), place / "set", single(), 5)
    model = write_tiny_model(place / "base", place / "set")
    adapters = [_adapter(model, place / run / "last", seed) for seed, run in enumerate(("lora", "merged"))]
    return Judged(model, place / "set", adapters, place / "out")


def flags_of(judged: Judged, *more: object) -> list[str]:
    return [str(word) for word in ("--model", judged.model, "--shards", judged.shard_set, *more)]


def evaluate(*flags: object) -> int:
    return cli.main(["evaluate", *map(str, flags)])


BATCH = ("--batch", 3)
PART = ("--batch", 4, "--limit", 6, "--tasks", "where,pose")


@pytest.fixture(scope="module")
def by_ranks(judged: Judged) -> Judged:
    """`judged` with results of 1, 2, 3 and 4 ranks, and of base and adapters in one pass over two ranks, in `out`."""
    alone = {n: flags_of(judged, *BATCH, "--out", judged.out / str(n)) for n in range(1, 5)}
    named = [word for adapter in judged.adapters for word in ("--adapter", adapter)]
    both = flags_of(judged, *PART, "--workers", 1, "--with-base", *named, "--out", judged.out / "both")
    turns = judged.model.with_name("turns.json")
    turns.write_text(json.dumps([[(4, alone[4])], [(3, alone[3])], [(2, alone[2]), (2, both)]]))
    words = [str(_MPIRUN), "-np", "4", sys.executable, str(RANKS), str(turns)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert evaluate(*alone[1]) == 0
    return judged


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").open()]


@pytest.mark.slow
def test_metrics_equal_for_1_2_3_4_ranks(by_ranks: Judged) -> None:
    for name in SAME:
        assert len({(by_ranks.out / str(ranks) / name).read_bytes() for ranks in range(1, 5)}) == 1, name
    runs = [json.loads((by_ranks.out / str(ranks) / "run.json").read_text()) for ranks in range(1, 5)]
    assert [run["ranks"] for run in runs] == [1, 2, 3, 4] and {run["threads_per_rank"] for run in runs} == {1}


@pytest.mark.slow
def test_each_head_and_expression_of_21_images_over_4_ranks_once(by_ranks: Judged) -> None:
    asked = [row["id"] + row["task"] for row in rows_of(by_ranks.out / "4")]
    images = {name.partition("/")[0] for name in asked}
    stored = open_set(by_ranks.shard_set)
    assert len(asked) == len(set(asked)) and images == {stored.key(i) for i in range(21)} and len(images) == 21
    tasks = json.loads((by_ranks.out / "4" / "metrics.json").read_text())["tasks"]
    assert tasks["pose"]["n"] == sum(len(stored.record(i).heads) for i in range(21))
    assert tasks["where"]["n"] == sum(len(stored.record(i).objects) for i in range(21))
    # The model was taught the first eight images: what it learned must come through the whole chain.
    assert tasks["where"]["accuracy"]["mean"] > 0.9
    pose = tasks["pose"]
    assert pose["valid"]["geodesic"]["median"] < pose["constant_pose"]["geodesic"]["median"]


@pytest.mark.slow
def test_another_batch_size_changes_only_answers_whose_tokens_flip_and_they_are_counted(by_ranks: Judged) -> None:
    assert evaluate(*flags_of(by_ranks, "--batch", 5, "--out", by_ranks.out / "fives")) == 0
    threes, fives = load_results([by_ranks.out / "1", by_ranks.out / "fives"])
    found = repeats.flips(threes, fives)
    assert found is not None and found.asked == len(threes.rows)
    # Another batch size moves sums in their last bits: a token may flip where two were almost equally likely.
    assert found.texts == sum(a != b for a, b in zip(threes.rows, fives.rows, strict=True)) <= 1
    if not found.texts:
        assert threes.tasks == approx_in_depth(fives.tasks)
    _, [row] = repeats.table([threes, fives])
    assert row[3] == "batch 3 → 5" and row[4:6] == [str(found.asked), str(found.texts)]


def approx_in_depth(value: Any) -> Any:
    """`value` with every number in it to 1e-9."""
    if isinstance(value, dict):
        return {key: approx_in_depth(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [approx_in_depth(inner) for inner in value]
    return pytest.approx(value, rel=0, abs=1e-9) if isinstance(value, float) else value


@pytest.mark.slow
def test_several_adapters_in_one_pass_answer_as_each_alone(by_ranks: Judged, tmp_path: Path) -> None:
    assert [p.name for p in by_ranks.out.iterdir() if "both" in p.name] == ["both"]
    names = command.short_names([by_ranks.model, *by_ranks.adapters])
    assert names[1:] == ["lora-last", "merged-last"]
    assert sorted(p.name for p in (by_ranks.out / "both").iterdir()) == sorted(names)
    lines = []
    for name, adapter in zip(names, [None, *by_ranks.adapters], strict=True):
        more = [] if adapter is None else ["--adapter", adapter]
        assert evaluate(*flags_of(by_ranks, *PART, *more, "--out", tmp_path / name)) == 0
        lines.append((tmp_path / name / "predictions.jsonl").read_bytes())
        assert lines[-1] == (by_ranks.out / "both" / name / "predictions.jsonl").read_bytes()
    assert len(set(lines)) == 3, "systems that answer alike cannot show whose answers these are"
    keys = {json.loads(line)["key"] for line in lines[0].splitlines()}
    assert keys == {f"tiny-train-{i:06d}" for i in range(6)}


@pytest.mark.slow
def test_scores_go_into_the_card_that_peft_began(by_ranks: Judged) -> None:
    adapter = by_ranks.adapters[0]
    before = (adapter / "README.md").read_text()
    write_card(adapter, load_results([by_ranks.out]))
    after = (adapter / "README.md").read_text()
    assert "| lora-last |" in after and "| merged-last |" not in after and "model-index:" in after
    assert after.count("## Evaluation\n") == before.count("## Evaluation\n") == 1, "peft leaves room for it"
    rest = before.strip().partition("## Environmental Impact")[2]
    assert rest and after.endswith(f"## Environmental Impact{rest}\n")


def test_adapters_of_scope_text_share_the_work_on_images(judged: Judged, tmp_path: Path) -> None:
    systems = load_several(judged.model, [*judged.adapters, _adapter(judged.model, tmp_path / "third", 2)])
    assert len({next(system.model.parameters()).data_ptr() for system in systems}) == 1
    seen = []
    for system in systems:
        tower = system.model.model.vision
        tower.register_forward_hook(lambda *_: seen.append(1))
    [(_, items)] = read_all(open_set(judged.shard_set), 0, 1, 4, 28, limit=4)
    together = decode.decode_systems(systems, items, ["pose"], Decoding())
    assert len(seen) == 1
    assert together == [decode.decode_batch(system, items, ["pose"], Decoding()) for system in systems]
    assert len(seen) == 4


@pytest.fixture(scope="module")
def sixty(judged: Judged, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """A set of 60 images, and in `out` its result by one rank that nobody disturbed."""
    place = tmp_path_factory.mktemp("sixty")
    build(TinySource(samples=60), place / "set", single(), 20)
    flags = ["--model", judged.model, "--shards", place / "set", "--batch", 1]
    assert evaluate(*flags, "--out", place / "whole") == 0
    return Judged(judged.model, place / "set", [], place / "whole")


def harm_rank_1(flags: list[object], unfinished: Path, signal_number: int, timeout_s: int) -> tuple[int, int, str, str]:
    """Two ranks, of which one is sent a signal once it works: exit code, that rank's pid, stdout, stderr."""
    words = [_MPIRUN, "-np", 2, sys.executable, "-m", "cogvlm_hpe", "evaluate", *flags]
    words += ["--rank-timeout", timeout_s]
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    state = unfinished / "rank-0001.json"
    while process.poll() is None and not (state.is_file() and list(unfinished.glob("batch-*.json"))):
        time.sleep(0.002)
    harmed = json.loads(state.read_text())["pid"]
    os.kill(harmed, signal_number)
    try:
        out, error = process.communicate(timeout=120)
    finally:
        _end(harmed)
    return process.returncode, harmed, out, error


@pytest.mark.slow
def test_a_rank_that_dies_is_named_and_what_is_left_judged_by_resume(
    tmp_path: Path, sixty: Judged, capsys: pytest.CaptureFixture[str]
) -> None:
    out, unfinished = tmp_path / "out", tmp_path / "out.unfinished"
    flags = ["--model", sixty.model, "--shards", sixty.shard_set, "--batch", 1, "--out", out]
    code, killed, said, error = harm_rank_1(flags, unfinished, signal.SIGKILL, timeout_s=60)
    # MPICH's own words name the process, ours say which rank that is and how to go on.
    assert code != 0 and not out.exists() and re.search(rf"PID {killed} RUNNING AT \S+", said + error), error
    assert f"rank 1 (host {platform.node()}, pid {killed})" in said.splitlines()[0]
    assert f"batches are kept in {unfinished}" in said and "--resume judges only what is left" in said
    kept = len(list(unfinished.glob("batch-*.json")))
    assert 0 < kept < 60, "rank 0 was ended, too"
    capsys.readouterr()
    assert evaluate(*flags, "--resume") == 0
    again = capsys.readouterr().out
    assert (
        f"resumed: {kept} batches were judged before" in again
        and f"rank 1 (host {platform.node()}, pid {killed})" in again
    )
    for name in SAME:
        assert (out / name).read_bytes() == (sixty.out / name).read_bytes(), name


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_and_its_share_judged_by_resume(
    tmp_path: Path, sixty: Judged, capsys: pytest.CaptureFixture[str]
) -> None:
    out, unfinished = tmp_path / "out", tmp_path / "out.unfinished"
    flags = ["--model", sixty.model, "--shards", sixty.shard_set, "--batch", 1, "--out", out]
    code, stopped, _, said = harm_rank_1(flags, unfinished, signal.SIGSTOP, timeout_s=15)
    assert code != 0 and f"last was rank 1 (host {platform.node()}, pid {stopped})" in said, said
    assert "--resume judges only what is left" in said and not out.exists()
    kept = {path.name: path.read_bytes() for path in unfinished.glob("batch-*.json")}
    assert 30 <= len(kept) < 60, "rank 0 waits for nobody before it has judged its half"
    assert evaluate(*flags) == 2  # what is there is neither overwritten nor mixed up
    assert evaluate(*flags, "--resume", "--limit", 3) == 2
    capsys.readouterr()
    assert evaluate(*flags, "--resume") == 0
    again = capsys.readouterr().out
    assert f"resumed: {len(kept)} batches were judged before" in again and "; last was rank 1 (host" in again
    assert not unfinished.exists()
    for name in SAME:
        assert (out / name).read_bytes() == (sixty.out / name).read_bytes(), name
    assert evaluate(*flags, "--resume") == 0  # nothing is left to do


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_set_elsewhere_is_judged_and_its_report_can_still_show_heads(
    tmp_path: Path, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    address = judged.shard_set.as_uri()
    flags = ["--model", judged.model, "--tasks", "pose", "--limit", 3]
    assert evaluate(*flags, "--shards", address, "--out", tmp_path / "there") == 0
    assert evaluate(*flags, "--shards", judged.shard_set, "--out", tmp_path / "here") == 0
    there, here = load_results([tmp_path / "there", tmp_path / "here"])
    assert there.rows == here.rows and there.run["shards"] == address
    assert len(gallery.heads([there])) == len(there.rows)


def test_resume_keeps_what_is_finished_only_where_it_is_of_this_very_job(
    tmp_path: Path, judged: Judged, capsys: pytest.CaptureFixture[str]
) -> None:
    shard_set = Path(shutil.copytree(judged.shard_set, tmp_path / "set"))
    adapter = Path(shutil.copytree(judged.adapters[0], tmp_path / "adapter"))
    out, part = tmp_path / "out", ("--tasks", "pose", "--limit", 2)
    flags = ["--model", judged.model, "--adapter", adapter, "--shards", shard_set, "--out", out, "--resume"]

    def refused(*more: object) -> str:
        capsys.readouterr()
        assert evaluate(*flags, *(more or part)) == 2
        error = capsys.readouterr().err
        assert "set it back, or remove" in error
        return error

    assert evaluate(*flags, *part) == 0 == evaluate(*flags, *part)
    assert "finished before, kept" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["set"]["digest"] == open_set(shard_set).digest
    assert set(metrics["inputs"]) == {"base", "adapter_model.safetensors", "hpe.json"}
    assert "but --limit changed" in refused("--tasks", "pose", "--limit", 3)
    assert "but --tasks, --batch changed" in refused("--tasks", "where", "--limit", 2, "--batch", 1)

    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({key: value for key, value in run.items() if key != "job"}))
    assert evaluate(*flags, *part) == 1 and "not a whole result" in capsys.readouterr().err
    (out / "run.json").write_text(json.dumps(run))

    shutil.rmtree(shard_set)
    build(TinySource(samples=20), shard_set, single(), 5)
    assert "but --shards changed" in refused()
    shutil.rmtree(shard_set)
    shutil.copytree(judged.shard_set, shard_set)
    assert evaluate(*flags, *part) == 0, "a copy is the same set"
    (adapter / "hpe.json").write_text(json.dumps({"scope": "text", "scores": {"mae": 1.0}}))
    assert evaluate(*flags, *part) == 0, "training adds scores to a checkpoint"
    (adapter / "hpe.json").write_text(json.dumps({"scope": "text", "stage": "x"}))
    assert "but --model or --adapter changed" in refused()
    shutil.rmtree(adapter)
    _adapter(judged.model, adapter, 7)
    assert "but --model or --adapter changed" in refused()


def test_an_unfinished_evaluation_is_not_joined_by_another_adapter_of_the_same_name(
    tmp_path: Path, judged: Judged, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Path(shutil.copytree(judged.adapters[0], tmp_path / "adapter"))
    flags = flags_of(judged, "--adapter", adapter, "--tasks", "pose", "--limit", 2, "--out", tmp_path / "out")

    def cut(*_: object, **__: object) -> None:
        raise UserError("cut off")

    with monkeypatch.context() as place:
        place.setattr(decode, "decode_all", cut)
        assert evaluate(*flags) == 1
    shutil.rmtree(adapter)
    _adapter(judged.model, adapter, 7)
    assert evaluate(*flags, "--resume") == 2
    assert "--model, --adapter or --with-base changed" in capsys.readouterr().err
    shutil.rmtree(adapter)
    shutil.copytree(judged.adapters[0], adapter)
    assert evaluate(*flags, "--resume") == 0


def test_mistakes_end_with_one_line_and_leave_no_result(
    tmp_path: Path, judged: Judged, capsys: pytest.CaptureFixture[str]
) -> None:
    model, shard_set = judged.model, judged.shard_set
    for flags, code, said in [
        (["--model", model, "--shards", tmp_path / "none"], 1, "no such folder"),
        (["--model", tmp_path / "none", "--shards", shard_set], 1, "no base model there"),
        (["--model", model, "--shards", shard_set, "--tasks", "pose,nose"], 2, "'nose': not one of"),
        (["--model", model, "--shards", shard_set, "--batch", "many"], 2, "'many': must be a whole number"),
    ]:
        capsys.readouterr()
        try:
            found = evaluate(*flags, "--out", tmp_path / "out")
        except SystemExit as end:  # argparse's own way
            found = end.code
        error = capsys.readouterr().err
        assert found == code and said in error.splitlines()[-1], error
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


def test_each_system_has_a_name_of_its_own(tmp_path: Path) -> None:
    parser = ArgumentParser()
    command.add_arguments(parser)
    flags = ["--model", "base", "--with-base", "--adapter", "a/last", "--shards", "s", "--out", str(tmp_path / "out")]
    args = parser.parse_args([*flags, "--name", "plain", "--name", "tuned"])
    assert [(a, out.name, name) for a, out, name in command.plan_jobs(args)] == [
        (None, "plain", "plain"), (Path("a/last"), "tuned", "tuned"),
    ]  # fmt: skip
    for names in (["--name", "one"], ["--name", "same", "--name", "same"]):
        with pytest.raises(UsageError, match="different names for 2 systems"):
            command.plan_jobs(parser.parse_args([*flags, *names]))


def test_each_rank_of_a_machine_takes_the_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for rank, size in (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")):
        local = "MPI_LOCALRANKID" if rank == "PMI_RANK" else "OMPI_COMM_WORLD_LOCAL_RANK"
        ranks_here = "MPI_LOCALNRANKS" if rank == "PMI_RANK" else "OMPI_COMM_WORLD_LOCAL_SIZE"
        with monkeypatch.context() as place:
            for name, value in ((rank, 6), (size, 8), (local, 2), (ranks_here, 4)):
                place.setenv(name, str(value))
            assert command.device_of("auto") == command.device_of("cuda") == "cuda:2"
            assert command.device_of("cpu") == "cpu"


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
