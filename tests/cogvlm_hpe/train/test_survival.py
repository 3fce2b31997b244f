"""Long runs: judged on the way, disturbed, poisoned. Real ranks."""

import dataclasses
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forked import Ranks, train
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_model import write_tiny_model
from tiny_source import TinySource

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import chaos

from cogvlm_hpe.model.tokenizer import load_tokenizer
from cogvlm_hpe.model.weights import read_config
from cogvlm_hpe.train import checkpoint
from cogvlm_hpe.train.command import parse
from cogvlm_hpe.train.evaluation import Verdict
from cogvlm_hpe.train.loop import Run, Tally, next_batches, run_loop, train_step
from cogvlm_hpe.train.setup import make_asker, make_stream, setup
from launcher.comm import from_torch, single
from launcher.errors import UserError
from launcher.status import read_status
from launcher.supervise import STOP_SIGNALS, StopFlag
from launcher.world import discover
from shards.index import open_set
from shards.record import Object
from shards.write import Sample, build

LONG = 30  # steps: many more than the disturbances can use up
pytestmark = pytest.mark.slow


class OneOdd(TinySource):
    """One image of another object than all the others."""

    def sample(self, i: int) -> Sample:
        sample = super().sample(i)
        if i == 10:
            objects = [Object("QQQQ", thing.bbox) for thing in sample.record.objects]
            sample = dataclasses.replace(sample, record=dataclasses.replace(sample.record, objects=objects))
        return sample


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shard sets, a base that answers in format now and then, and a config."""
    folder = tmp_path_factory.mktemp("survival")
    build(OneOdd(samples=24), folder / "set", single(), 8)
    build(TinySource(samples=7, split="val"), folder / "val", single(), 8)
    write_tiny_model(folder / "base", folder / "set", steps=60)
    config = {
        "run_dir": str(folder / "unset"),
        "model": {"base": str(folder / "base"), "dtype": "fp32"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["language.attention"], "scope": "text"},
        "shards": {
            "train": [{"path": str(folder / "set"), "ask": ["pose", "where"]}],
            "val": [{"path": str(folder / "val"), "ask": ["pose", "where"]}],
            "batch": 8,
        },
        "train": {
            "max_steps": 3, "lr": 0.01, "warmup_steps": 1, "micro_batch": 2, "zero_stage": 3,
            "save_every": 1, "log_every": 1, "async_save": True,
        },
        "evaluate": {"batch": 2, "questions": 3, "limit": 5, "max_new_tokens": 18},
    }  # fmt: skip
    (folder / "lora.yaml").write_text(yaml.safe_dump(config))
    return folder


def words_of(place: Path, run: str, *more: str) -> list[str]:
    return ["--config", str(place / "lora.yaml"), "--run_dir", str(place / run), *more]


def scores(place: Path, run: str) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (place / run / "metrics.jsonl").read_text().splitlines())
    return {v.pop("global_step"): v for v in lines if any(name.startswith("evaluate/") for name in v)}


def test_a_run_is_judged_alike_on_any_ranks_and_stage(place: Path) -> None:
    """Two ranks under ZeRO-3, where ranks have unequal shares, and one rank without."""
    how = ("--train.evaluate_every", "2")
    for run, ranks, stage in (("one", 1, "1"), ("split", 2, "3")):
        done = train(words_of(place, run, *how, "--train.zero_stage", stage), ranks, place / f"{run}.txt")
        assert done.wait() == 0, done.said
    one, split = scores(place, "one"), scores(place, "split")
    assert list(one) == [0, 2, 3] and one[0] == split[0]
    assert one[0]["evaluate/grounding_lost"] == 0.0
    assert {"evaluate/geodesic_deg", "evaluate/pose_valid", "evaluate/grounding_accuracy"} <= one[3].keys()
    assert one[0] != one[3], "the model has moved"
    for run in ("one", "split"):
        judged = {step: values["evaluate/geodesic_deg"] for step, values in scores(place, run).items() if step}
        best = json.loads((place / run / "best" / "hpe.json").read_text())["scores"]["geodesic_deg"]
        assert best == pytest.approx(min(judged.values()), rel=1e-6)
    events = EventAccumulator(str(place / "split" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"evaluate/by_yaw", "evaluate/worst"} <= set(tags["images"])
    assert {"evaluate/geodesic_deg", "adapter/norm_language.attention", "train/tokens_per_s"} <= set(tags["scalars"])


def stopped_while_judging(out: Path, words: list[str]) -> None:
    """All ranks. A request to stop reaches one of them in the middle of the first judgement, and later of the last."""
    world, seen = discover(), []
    comm = from_torch(world)
    for turn in (0, 1):
        flag, asked = StopFlag(), []
        run = setup(parse(words)[0], world, comm, resume=turn > 0, allow_change=False)
        run.judge = disturbed(run, flag, asked, turn)  # type: ignore[assignment]
        code, newest = run_loop(run, flag), checkpoint.newest(Path(run.config.run_dir))
        run.monitor.close()
        seen.append({"code": code, "batches": len(asked), "newest": newest and newest.name})
        comm.barrier()
    out.with_suffix(f".{world.rank}").write_text(json.dumps(seen))


def disturbed(run: Run, flag: StopFlag, asked: list[int], turn: int) -> Callable[[Callable[[], bool]], Verdict | None]:
    """The run's judge, in whose judgement `turn`, from 0, rank 1 is asked to stop; `asked` grows by its batches."""
    judge, turns = run.judge, itertools.count()
    assert judge is not None

    def judged(go_on: Callable[[], bool]) -> Verdict | None:
        hit = next(turns) == turn

        def heard() -> bool:
            asked.extend([1] * hit)
            flag.raised |= hit and run.comm.rank == 1
            return go_on()

        return judge(heard)

    return judged


def test_a_judgement_that_a_request_breaks_off_is_made_at_the_next_start(place: Path) -> None:
    """On all ranks, before the first step and after the last."""
    words = words_of(place, "hasty", "--train.evaluate_every", "3", "--evaluate.batch", "1")
    done = Ranks(2, stopped_while_judging, place / "hasty-seen", words, said=place / "hasty.txt")
    assert done.wait() == 0, done.said
    first, last = ({"code": 85, "batches": 1, "newest": newest} for newest in (None, "step-00000003"))
    assert [json.loads((place / f"hasty-seen.{rank}").read_text()) for rank in (0, 1)] == [[first, last]] * 2
    assert list(scores(place, "hasty")) == [0]
    assert (place / "hasty" / "log.txt").read_text().count("was not judged to the end") == 2
    assert read_status(place / "hasty").state == "stopped"
    again = train([*words, "--resume"], 2, place / "hasty-again.txt")
    assert again.wait() == 0, again.said
    assert list(scores(place, "hasty")) == [0, 3]
    judged = json.loads((place / "hasty" / "best" / "hpe.json").read_text())["scores"]
    assert judged["geodesic_deg"] == pytest.approx(scores(place, "hasty")[3]["evaluate/geodesic_deg"])
    assert read_status(place / "hasty").state == "finished"


@pytest.fixture(scope="module")
def codes(place: Path) -> list[int]:
    """An undisturbed run, `calm`, and one that a signal to one rank and a kill -9 hit; its exit codes."""
    more = ["--train.max_steps", str(LONG), "--train.save_every", "2"]
    calm = train(words_of(place, "calm", *more), 2, place / "calm.txt")
    assert calm.wait() == 0, calm.said

    def start() -> Ranks:
        return train(words_of(place, "storm", *more, "--resume"), 2, place / "storm.txt")

    return chaos.storm(start, place / "storm", LONG, random.Random(1), ["signal", "kill"])


def stopped_five_times(out: Path, words: list[str]) -> None:
    """All ranks. Train until a signal to one of them, save and go on from there; then the next signal, to another."""
    world, seen = discover(), {}
    config, comm = parse(words)[0], from_torch(world)
    run = setup(config, world, comm, resume=False, allow_change=False)
    base, sets = Path(config.model.base), [open_set(config.shards.train[0].path)]
    asker = make_asker(config, load_tokenizer(base), read_config(base).eos_token_id)
    for turn, number in enumerate(STOP_SIGNALS):
        flag, start_s = StopFlag(), time.monotonic()
        if comm.rank == turn % comm.size:
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        code = run_loop(run, flag)
        newest = checkpoint.newest(Path(config.run_dir))
        seen[number.name] = {"code": code, "heard": flag.raised, "step": checkpoint.read(newest).step}
        seen[number.name] |= {"first": run.first_step, "seconds": time.monotonic() - start_s}
        first_step = seen[number.name]["step"]
        side = run.collator.image_size
        stream = make_stream(config.shards, sets, run.plan, comm, side, asker, first_step)
        run = dataclasses.replace(run, first_step=first_step, stream=stream)
    out.with_suffix(f".{world.rank}").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def stops(place: Path) -> list[dict]:
    """Per rank what it saw of five signals."""
    words = words_of(place, "stops", "--train.max_steps", "100000", "--train.save_every", "100000")
    done = Ranks(
        2, stopped_five_times, place / "stopped", [*words, "--train.zero_stage", "1"], said=place / "stops.txt"
    )
    assert done.wait() == 0, done.said
    return [json.loads((place / f"stopped.{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_one_rank_signalled_all_ranks_leave(stops: list[dict], number: signal.Signals) -> None:
    """All with 85, at one step, which a checkpoint is of; only one has heard the signal itself."""
    one, other = (of_rank[number.name] for of_rank in stops)
    assert one["code"] == other["code"] == 85
    assert sorted([one["heard"], other["heard"]]) == [False, True]
    assert one["step"] == other["step"] > one["first"] == other["first"]
    assert max(one["seconds"], other["seconds"]) < 30


def test_kills_and_signals_to_one_rank_change_nothing(place: Path, codes: list[int]) -> None:
    """The short version of benchmarks/chaos.py."""
    calm, storm = ((place / run / "last" / chaos.ADAPTER).read_bytes() for run in ("calm", "storm"))
    assert calm == storm
    assert codes == [85, -signal.SIGKILL, 0], "of processes that end, too"
    assert len(json.loads((place / "storm" / "run.json").read_text())["starts"]) == len(codes)


@pytest.fixture(scope="module")
def poisoned(place: Path) -> Path:
    """The base with an infinite embedding for a letter that one sample alone has."""
    folder = place / "poisoned"
    folder.mkdir()
    for path in (place / "base").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    tokenizer = load_tokenizer(folder, len(weights["model.embed_tokens.weight"]))
    letter = tokenizer.encode("Q", add_special_tokens=False).ids[-1]
    weights["model.embed_tokens.weight"][letter] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def until_refused(out: Path, words: list[str]) -> None:
    """All ranks. Steps until one is refused; what this rank saw."""
    world = discover()
    run = setup(parse(words)[0], world, from_torch(world), resume=False, allow_change=False)
    batches, said, step = iter(run.stream), "", 0
    run.engine.set_lr(0.01)
    while not said:
        before = run.engine.weights()
        micro_batches = next_batches(run, batches, Tally())
        n_global = run.comm.sum(np.array(sum(batch.n_answers for batch in micro_batches)))
        keys = [key for batch in micro_batches for key in batch.keys]
        try:
            train_step(run, step, micro_batches, int(n_global), Tally())
        except UserError as error:
            said = str(error)
        step += 1
    after = run.engine.weights()
    same = all(before[name].equal(after[name]) for name in before)
    out.with_suffix(f".{world.rank}").write_text(json.dumps({"said": said, "same": same, "keys": keys}))


def test_nonfinite_step_changes_nothing(place: Path, poisoned: Path) -> None:
    """At stage 0, where DeepSpeed itself would let it through."""
    words = words_of(place, "bad", "--train.zero_stage", "0", "--model.base", str(poisoned), "--train.micro_batch", "1")
    done = Ranks(2, until_refused, place / "seen", words, said=place / "bad.txt")
    assert done.wait() == 0, done.said
    seen = [json.loads((place / f"seen.{rank}").read_text()) for rank in (0, 1)]
    odd = "tiny-train-000010"
    assert sum(odd in of_rank["keys"] for of_rank in seen) == 1, "one rank has it"
    assert all(of_rank["same"] for of_rank in seen)
    assert all(f"among the samples {odd};" in of_rank["said"] for of_rank in seen)
