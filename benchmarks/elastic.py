"""Saved at any ZeRO stage and number of ranks, gone on with at any other: are the next losses the undisturbed run's?

    python benchmarks/elastic.py [--dir DIR]

Every stage 0-3 on 1 to 3 ranks trains LoRA on a small random CogVLM, saves in the middle and trains on; then
every stage and number of ranks goes on from every such checkpoint. The table has a row for each writer and a column
for each reader, and says how far the worst loss lies from that of stage 0 on one rank, relatively. Below it the same
for DeepSpeed's universal checkpoints, which are converted by a program of their own and know no stage 0; a reader goes
on from its own stage. Exit code 0 where all of ours lie within 1e-5.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from cogvlm_hpe.config import AdapterConfig, ModelConfig, RunConfig, SetConfig, ShardsConfig, TrainConfig
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.train import checkpoint
from cogvlm_hpe.train.adapter import add_lora
from cogvlm_hpe.train.batch import Batch
from cogvlm_hpe.train.engine import Engine, prepare_deepspeed
from cogvlm_hpe.train.module import TrainedModule
from cogvlm_hpe.train.setup import take_weights
from launcher.comm import Comm, from_torch
from launcher.world import World, discover, export, free_port

STAGES = (0, 1, 2, 3)
IMAGES, BEFORE, AFTER, LR = 6, 2, 2, 0.01
MICRO = {1: 3, 2: 3, 3: 2}
"""Images of a micro-batch, by the number of ranks; one rank accumulates."""
AIM = 1e-5
CLIP = 0.1  # below every gradient's norm here, so that each step clips


def run_config(stage: int, **deepspeed: object) -> RunConfig:
    """LoRA beside language and vision, on every token."""
    return RunConfig(
        run_dir="unused",
        model=ModelConfig("unused", dtype="fp32"),
        shards=ShardsConfig([SetConfig("unused")]),
        adapter=AdapterConfig(rank=2, alpha=4, targets=["language.attention", "vision.mlp"], scope="all"),
        train=TrainConfig(lr=LR, micro_batch=1, zero_stage=stage, clip=CLIP, deepspeed=deepspeed),  # type: ignore[arg-type]
    )


def model_config() -> CogVLMConfig:
    """Some 60,000 weights; odd sizes, so that pieces of them need padding."""
    vision = {
        "hidden_size": 25, "num_hidden_layers": 1, "num_heads": 1, "intermediate_size": 35, "image_size": 28,
        "patch_size": 14, "num_positions": 5,
    }  # fmt: skip
    return CogVLMConfig(
        vocab_size=41, hidden_size=32, intermediate_size=45, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1, vision_config=vision,
    )  # fmt: skip


def images(step: int, places: range) -> Batch:
    """Images with two questions each; every one a function of the step and its place in the global batch."""
    generators = [torch.Generator().manual_seed(100 * step + place) for place in places]
    ids = torch.cat([torch.randint(4, 41, (2, 6), generator=generator) for generator in generators])
    return Batch(
        images=torch.cat([torch.randint(0, 256, (1, 3, 28, 28), generator=g, dtype=torch.uint8) for g in generators]),
        image_index=torch.arange(len(places)).repeat_interleave(2),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.where(torch.arange(6) < 3, -100, ids),
        boxes=torch.zeros(len(ids), 4),
        tasks=["pose"] * len(ids),
        records=[None] * len(places),
        keys=[str(place) for place in places],
    )


def make(config: RunConfig, comm: Comm, folder: Path | None) -> tuple[Engine, checkpoint.Describe]:
    """A fresh run, or one that goes on from a checkpoint, in the order of `setup`."""
    assert config.adapter is not None
    torch.manual_seed(0)
    model = CogVLMForCausalLM(model_config()).train()
    describe = checkpoint.Describe({}, add_lora(model, config.adapter, "unused"), None, None)
    module = TrainedModule(model, None)
    saved = take_weights(module, folder, describe)
    engine = Engine(module, config, comm, IMAGES // comm.size // MICRO[comm.size])
    if saved is not None:
        engine.set_lr(0.0)
        step(engine, 0)
        engine.load(saved.weights, saved.optimizer)
    engine.set_lr(LR)
    return engine, describe


def step(engine: Engine, number: int) -> float:
    """One global step on the ranks' shares of IMAGES images; its loss."""
    comm = engine.comm
    total, each = 0.0, IMAGES // comm.size
    for place in range(comm.rank * each, (comm.rank + 1) * each, MICRO[comm.size]):
        loss, _, _ = engine.engine(images(number, range(place, place + MICRO[comm.size])))
        total += float(loss.detach()) / (2 * IMAGES)
        engine.backward(loss * (comm.size / (2 * IMAGES)))
        engine.step()
    return comm.sum(total)


def after(engine: Engine) -> list[float]:
    """Losses of the steps after a checkpoint."""
    return [step(engine, number) for number in range(BEFORE, BEFORE + AFTER)]


def write(stage: int, comm: Comm, folder: Path, universal: bool) -> list[float]:
    """Train, save in the middle, and train on; all losses."""
    engine, describe = make(run_config(stage), comm, None)
    losses = [step(engine, number) for number in range(BEFORE)]
    weights, optimizer = engine.weights(), engine.optimizer_state()
    name = f"{stage}-{comm.size}"
    if comm.rank == 0:
        checkpoint.Writer(folder / name, describe).save(BEFORE, weights, optimizer, {})
    if universal and stage:
        engine.engine.save_checkpoint(str(folder / "deepspeed" / name), tag="plain", exclude_frozen_parameters=True)
    return losses + after(engine)


def go_on(stage: int, comm: Comm, folder: Path) -> list[float]:
    """The losses after one of our checkpoints."""
    return after(make(run_config(stage), comm, checkpoint.newest(folder))[0])


def go_on_universal(stage: int, comm: Comm, folder: Path) -> list[float]:
    """The losses after a universal checkpoint."""
    engine, _ = make(run_config(stage, checkpoint={"load_universal": True}), comm, None)
    engine.engine.load_checkpoint(str(folder), tag="universal", load_module_strict=False)
    engine.set_lr(LR)
    return after(engine)


def work(way: str, folder: Path, jobs: list[str]) -> None:
    """All ranks. `write` at some STAGEs, or `read` as STAGE:NAME (NAME is the writer's stage-ranks); rising stages.

    Rising, because ZeRO-3 replaces torch's linear function for good. Rank 0 writes what was seen to WAY-RANKS.json.
    """
    torch.set_num_threads(1)
    prepare_deepspeed()
    comm, seen = from_torch(discover()), {}
    for job in sorted(jobs):
        stage, _, name = job.partition(":")
        if way.startswith("write"):
            seen[job] = write(int(stage), comm, folder, universal=way == "write-both")
        elif way == "universal":
            seen[job] = go_on_universal(int(stage), comm, folder / "deepspeed" / name)
        else:
            seen[job] = go_on(int(stage), comm, folder / name)
    if comm.rank == 0:
        (folder / f"{way}-{comm.size}.json").write_text(json.dumps(seen))


def results(folder: Path, way: str, ranks: int) -> dict[str, list[float]]:
    """What those ranks have seen, by job."""
    found: dict[str, list[float]] = json.loads((folder / f"{way}-{ranks}.json").read_text())
    return found


def gap(losses: Iterable[float], expected: Iterable[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


def start(ranks: int, way: str, folder: Path, jobs: list[str]) -> None:
    """New processes for every start. Raises SystemExit where one fails."""
    worlds = [World(rank, rank, ranks, ranks, "127.0.0.1", free_port(), "env") for rank in range(ranks)]
    worlds = [replace(world, master_port=worlds[0].master_port) for world in worlds]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(export(world), way, folder, jobs)) for world in worlds]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{way} on {ranks} ranks failed")


def _work(env: dict[str, str], way: str, folder: Path, jobs: list[str]) -> None:
    os.environ.update(env)
    work(way, folder, jobs)


def convert(folder: Path) -> None:
    """DeepSpeed's checkpoint to its universal one."""
    words = ["--input_folder", str(folder / "plain"), "--output_folder", str(folder / "universal")]
    program = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    subprocess.run([*program, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def matrix(folder: Path, way: str, expected: list[float]) -> float:
    """Print a table of all readers of all writers; the worst gap."""
    stages = [s for s in STAGES if s or way == "read"]
    names = [f"{stage}-{ranks}" for stage in stages for ranks in MICRO]
    print("saved \\ gone on with".ljust(22) + "".join(name.rjust(9) for name in names))
    found = {ranks: results(folder, way, ranks) for ranks in MICRO}
    gaps = []
    for name in names:
        row = []
        for stage, ranks in ((stage, ranks) for stage in stages for ranks in MICRO):
            losses = found[ranks].get(f"{stage}:{name}")
            row.append("-" if losses is None else f"{gap(losses, expected):.1e}")
            gaps += [] if losses is None else [gap(losses, expected)]
        print(f"ZeRO-{name[0]} on {name[2:]} ranks".ljust(22) + "".join(text.rjust(9) for text in row))
    print(f"{len(gaps)} ways, the worst {max(gaps):.1e}\n")
    return max(gaps)


def main() -> int:
    """Both tables; 0 where ours keeps within AIM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where checkpoints go (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dir or Path(temporary)
        for ranks in MICRO:
            start(ranks, "write-both", folder, [str(stage) for stage in STAGES])
        whole = {f"{s}-{n}": losses for n in MICRO for s, losses in results(folder, "write-both", n).items()}
        expected = whole["0-1"]
        curves = max(gap(losses, expected) for losses in whole.values())
        print(f"undisturbed, {len(whole)} stages and numbers of ranks: the worst loss {curves:.1e} from stage 0 on one")
        universal = [name for name in whole if name[0] != "0"]
        for name in universal:
            convert(folder / "deepspeed" / name)
        for ranks in MICRO:
            start(ranks, "read", folder, [f"{stage}:{name}" for stage in STAGES for name in whole])
            start(ranks, "universal", folder, [f"{name[0]}:{name}" for name in universal])
        print("ours")
        worst = matrix(folder, "read", expected[BEFORE:])
        print("DeepSpeed's universal checkpoint")
        matrix(folder, "universal", expected[BEFORE:])
    return 0 if worst <= AIM and curves <= AIM else 1


if __name__ == "__main__":
    sys.exit(main())
