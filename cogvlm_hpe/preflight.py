"""`cogvlm-hpe preflight`: what can be checked before a GPU-hour is spent, on the ranks that would train."""

import argparse
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.checks import Line, Table, attempt, merge
from launcher.errors import UsageError, UserError

if TYPE_CHECKING:
    from cogvlm_hpe.config import EvaluateConfig, RunConfig
    from cogvlm_hpe.train.command import Flags
    from launcher.comm import Comm
    from launcher.world import World

HELP = "whether a run would go well: files, disk, memory, network, clocks, time limit; --deep: two real steps"
_EPILOG = """Any key of the config may follow, and --resume, as for train. On all the ranks that would train:
  hpe-launch preflight FILE --nproc 8        or, in a job,        hpe-launch preflight FILE
exit code 0: all is well, 1: a line has a ✗, 2: the config cannot be meant"""
_MEET_S = 300.0
_TEXT_TOKENS = 76  # of a question and its answer
_SAME_EVERYWHERE = frozenset({"shards", "base", "tokenizer"})  # not the interface: nodes name theirs differently


@dataclass(frozen=True)
class Needs:
    """What the planner says of one rank of this world: bytes by part, trained parameters, bytes of their gradients."""

    memory: dict[str, float]
    trained: int
    gradient_bytes: int


def main(argv: list[str]) -> int:
    """Check, print the table on rank 0; the same exit code on every rank."""
    args, rest = _parser().parse_known_args(argv)

    from cogvlm_hpe.train.command import parse, patience_s

    config, flags = parse(["--config", str(args.config), *rest])

    from launcher.comm import from_torch
    from launcher.world import discover

    world, start_s = discover(), time.monotonic()
    table = Table(from_torch(world, patience_s(config) if args.deep else _MEET_S))
    met = f"{world.size} ranks at {world.master_addr}:{world.master_port} in {time.monotonic() - start_s:.1f} s"
    table.add([Line("ranks meet", True, met)])
    check_all(table, config, flags, world, args.gpu_memory, args.deep)
    return table.exit_code


def check_start(config: "RunConfig", flags: "Flags", world: "World", comm: "Comm") -> None:
    """All ranks. What takes seconds, before a run begins. Raises UserError with a line for each ✗."""
    table = Table(comm)
    check_all(table, config, flags, world)
    if table.wrong:
        kind = UsageError if table.exit_code == UsageError.exit_code else UserError
        raise kind("\n".join(dict.fromkeys(line.said for line in table.wrong)))


def check_all(
    table: Table,
    config: "RunConfig",
    flags: "Flags",
    world: "World",
    gpu_memory_gb: float | None = None,
    deep: bool = False,
) -> None:
    """All ranks. Fill the table."""
    comm = table.comm
    table.add(merge(comm.gather(check_host(config, flags, world, gpus_here(comm))), _SAME_EVERYWHERE))
    needs = None
    if not table.wrong:
        free_gb = free_memory_gb(comm) if gpu_memory_gb is None else gpu_memory_gb
        needs = read_needs(config, comm, free_gb is not None)
        table.add(check_needs(config, needs, free_gb))
    table.add(check_network(needs, world, comm))
    step_s = None
    if deep and not table.wrong:
        line, step_s = one_step(config, world, comm)
        table.add([line])
    table.add([attempt("wall time", lambda: check_wall_time(config, step_s))] if comm.rank == 0 else [])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cogvlm-hpe preflight",
        description=HELP,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="training config")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one GPU, 10^9 bytes (default: what is free)")
    parser.add_argument("--deep", action="store_true", help="two real steps and a checkpoint beside run_dir, removed")
    return parser


def gpus_here(comm: "Comm") -> list[str]:
    """All ranks. The GPU that each rank of this host works on, by UUID; empty where there are none.

    Counting them would not do: a task that Slurm binds to a GPU sees only that one.
    """
    import torch

    own = None
    if torch.cuda.is_available():
        own = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    host = socket.gethostname()
    return [gpu for where, gpu in comm.broadcast(comm.gather((host, own))) or [] if where == host and gpu]


def check_host(config: "RunConfig", flags: "Flags", world: "World", gpus: list[str]) -> list[Line]:
    """What the first rank of each host can see, whose ranks work on `gpus`; nothing on the others."""
    if world.local_rank:
        return []
    from launcher.machine import interface

    checks: dict[str, Callable[[], str]] = {
        "ranks": lambda: check_ranks(config, world, gpus),
        "shards": lambda: check_shards(config),
        "base": lambda: check_base(config),
        "tokenizer": lambda: check_tokenizer(config),
        "interface": interface,
    }
    if config.adapter and (config.adapter.stack or config.adapter.init and not _goes_on(config, flags)):
        checks["adapter"] = lambda: check_init(config)
    if world.rank == 0:
        checks["run_dir"] = lambda: check_run_dir(config, flags)
    return [attempt(name, work) for name, work in checks.items()]


def check_ranks(config: "RunConfig", world: "World", gpus: list[str]) -> str:
    """Whether batch, ranks and GPUs go together; `gpus` are those of this host's ranks."""
    import torch

    from cogvlm_hpe.config import check_world

    accumulation = check_world(config, world.size)
    if len({*gpus}) < len(gpus):
        raise UserError(
            f"{len(gpus)} ranks on a host share {len({*gpus})} GPUs; start one a GPU (--nproc, or sbatch's "
            "--ntasks-per-node)"
        )
    devices = f"a GPU each, {torch.cuda.get_device_name()}" if gpus else "no GPU, gloo on the CPU"
    said = f"{world.size}, {world.local_size} a host ({devices}); {accumulation} micro-batches a step each"
    return said + (_judging_ranks(config.evaluate, world.size) if config.train.evaluate_every else "")


def _judging_ranks(evaluate: "EvaluateConfig", ranks: int) -> str:
    """A note where batches of a set are fewer than ranks while a run judges, so that some wait; else nothing."""
    busy, batch = math.ceil(evaluate.limit / evaluate.batch), max(1, evaluate.limit // ranks)
    if busy >= ranks or batch == evaluate.batch:
        return ""
    return f"; {busy} of them judge, with evaluate.batch {batch} {min(ranks, math.ceil(evaluate.limit / batch))} would"


def check_shards(config: "RunConfig") -> str:
    """Whether every set opens, has all of its tars in full size, and its first sample reads."""
    from shards.index import open_set

    samples = size = 0
    paths = [entry.path for entry in config.shards.train] + [entry.path for entry in config.shards.val]
    for path in dict.fromkeys(paths):
        opened = open_set(path)
        for number, entry in enumerate(opened.info["shards"]):
            tar = opened.tar(number)
            found = tar.stat().st_size if tar.is_file() else None
            if found != entry["bytes"] and opened.remote is None:
                said = "missing" if found is None else f"{found} bytes of {entry['bytes']}"
                raise UserError(f"{tar}: {said}; copy the set again, or remove and build it")
            size += entry["bytes"]
        if not len(opened):
            raise UserError(f"{path}: holds no sample; take it out of shards, or build it again")
        opened.record(0)
        samples += len(opened)
        opened.close()
    return f"{samples} images, {size / 1e9:.2f} GB"


def check_base(config: "RunConfig") -> str:
    """Whether the base has exactly its config's tensors; its fingerprint."""
    from cogvlm_hpe.model.fingerprint import fingerprint
    from cogvlm_hpe.model.folders import resolve_base
    from cogvlm_hpe.model.load import DTYPES, check_tensors, empty_model
    from cogvlm_hpe.model.weights import open_weights, read_config

    base = resolve_base(config.model.base)
    if config.model.random_init:
        read_config(base)
        return f"{base}: random weights"
    weights = open_weights(base)
    check_tensors(weights, empty_model(weights.config, DTYPES[config.model.dtype]))
    return f"{base}: fingerprint {fingerprint(base)[:16]}"


def check_tokenizer(config: "RunConfig") -> str:
    """Whether there is one, of no more tokens than the model has rows."""
    from cogvlm_hpe.model.folders import resolve_base
    from cogvlm_hpe.model.tokenizer import find_tokenizer, load_tokenizer, special_ids
    from cogvlm_hpe.model.weights import read_config

    base = resolve_base(config.model.base)
    folder, rows = config.model.tokenizer or base, read_config(base).vocab_size
    tokenizer = load_tokenizer(folder, rows)
    special_ids(tokenizer)
    return f"{find_tokenizer(folder)}: {tokenizer.get_vocab_size()} tokens for {rows} rows"


def _goes_on(config: "RunConfig", flags: "Flags") -> bool:
    from cogvlm_hpe.train.checkpoint import newest

    return flags.resume and newest(Path(config.run_dir)) is not None


def check_init(config: "RunConfig") -> str:
    """Whether the adapter that the run takes over is there, and was made on this base."""
    from cogvlm_hpe.model.fingerprint import fingerprint
    from cogvlm_hpe.model.folders import resolve_base
    from cogvlm_hpe.train.adapter import read_input

    given = read_input(config.adapter, fingerprint(resolve_base(config.model.base))) if config.adapter else None
    assert given is not None
    return f"{given.path}: {len(given.factors)} layers"


def check_run_dir(config: "RunConfig", flags: "Flags") -> str:
    """Whether a start with these flags may write there."""
    from cogvlm_hpe.train.setup import find_resume, refuse_changes
    from launcher.comm import single

    run_dir = Path(config.run_dir)
    found = find_resume(run_dir, single(), flags.resume)
    if found is not None and not flags.allow_change:
        refuse_changes(run_dir, config)
    there = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{there}: not a folder, so {run_dir} cannot be made; choose another run_dir")
    folder = existing_parent(run_dir)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another run_dir") from None
    return f"{run_dir}: {f'goes on from {found.name}' if found else 'a new run'}"


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def free_memory_gb(comm: "Comm") -> float | None:
    """All ranks. What the fullest GPU has free, 10^9 bytes; None where there is no GPU."""
    import torch

    free_gb = torch.cuda.mem_get_info()[0] / 1e9 if torch.cuda.is_available() else math.inf
    least_gb = -comm.max(-free_gb)
    return least_gb if least_gb < math.inf else None


def read_needs(config: "RunConfig", comm: "Comm", with_memory: bool) -> Needs:
    """All ranks. The planner's numbers for this world; memory, for which rank 0 traces the model, only if asked for."""
    if comm.rank:
        return comm.broadcast(Needs({}, 0, 0))
    from cogvlm_hpe.model.folders import resolve_base
    from cogvlm_hpe.model.load import DTYPES, empty_model
    from cogvlm_hpe.model.weights import read_config
    from cogvlm_hpe.train import adapter
    from cogvlm_hpe.train.plan import plan, trace

    model_config = read_config(resolve_base(config.model.base))
    if with_memory:
        traced = trace(config, model_config, config.shards.questions, _TEXT_TOKENS)
        trained, memory = traced.trained, plan(config, traced, comm.size).memory
    else:
        model = empty_model(model_config, DTYPES[config.model.dtype])
        if config.adapter:
            adapter.add_lora(model, replace(config.adapter, init=None), config.model.base)
        trained, memory = sum(p.numel() for p in adapter.trainable(model).values()), {}
    return comm.broadcast(Needs(memory, trained, (2 if config.model.dtype == "bf16" else 4) * trained))


def check_needs(config: "RunConfig", needs: Needs, free_gb: float | None) -> list[Line]:
    """Room on the disk for the checkpoints, and in the GPUs where their size is known."""
    lines = [attempt("disk", lambda: check_disk(Path(config.run_dir), needs.trained, config.train.keep))]
    if free_gb is not None:
        lines.append(attempt("GPU memory", lambda: check_memory(needs.memory, free_gb)))
    return lines


def check_disk(run_dir: Path, trained: int, keep: int) -> str:
    """Whether `keep` checkpoints, the best one and one being written have room: float32 weights and two moments."""
    need = (keep + 2) * 12 * trained
    free = shutil.disk_usage(existing_parent(run_dir)).free
    said = f"{run_dir}: {keep + 2} checkpoints of {12 * trained / 1e6:.0f} MB"
    if need > free:
        raise UserError(f"{said} and {free / 1e9:.1f} GB free; make room, lower train.keep, or choose another run_dir")
    return f"{said}, {free / 1e9:.1f} GB free"


def check_memory(memory: dict[str, float], free_gb: float) -> str:
    """Whether the planned memory of a rank, bytes by part, is free."""
    need_gb = sum(memory.values()) / 1e9
    largest = max(memory, key=lambda part: memory[part])
    said = f"{need_gb:.1f} GB by plan, most of it {largest} ({memory[largest] / 1e9:.1f}), {free_gb:.1f} free"
    if need_gb > free_gb:
        raise UserError(
            f"{said}; lower train.micro_batch, set train.gradient_checkpointing, or take train.zero_stage 3"
        )
    return said


def check_network(needs: Needs | None, world: "World", comm: "Comm") -> list[Line]:
    """All ranks. A timed sum over ranks, the slowest pair of hosts, and how far the clocks are apart."""
    if comm.size == 1:
        return []
    from launcher import network

    rate = network.PROBE_BYTES / comm.time_sum(network.PROBE_BYTES)
    said = f"{network.PROBE_BYTES >> 20} MiB over {comm.size} ranks at {rate / 1e9:.2f} GB/s"
    if needs is not None:
        said += f": a step's gradients ({needs.gradient_bytes / 1e6:.0f} MB) take {needs.gradient_bytes / rate:.2g} s"
    pairs, skew_s = network.time_pairs(comm, world), network.clock_skew_s(comm)
    lines = [Line("all-reduce", True, said)]
    lines += [attempt("pairs of hosts", lambda: network.judge_pairs(pairs))] if pairs else []
    return [*lines, attempt("clocks", lambda: network.judge_clocks(skew_s))]


def one_step(config: "RunConfig", world: "World", comm: "Comm") -> tuple[Line, float]:
    """All ranks. Two real steps and their checkpoint beside run_dir, removed again; seconds of the second step.

    Raises UserError for what would end the real run too.
    """
    from cogvlm_hpe.train.loop import run_loop
    from cogvlm_hpe.train.setup import setup
    from launcher.supervise import StopFlag

    run_dir = Path(config.run_dir).absolute()
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = comm.broadcast(Path(f"{run_dir.parent}/.{run_dir.name}.preflight-{time.time_ns():x}"))
    short = replace(
        config.train, max_steps=2, warmup_steps=1, stop_after=None, evaluate_every=0, log_every=1, profile=False
    )
    try:
        run = setup(replace(config, run_dir=str(folder), train=short), world, comm, resume=False, allow_change=False)
        if run_loop(run, StopFlag()):
            raise UserError("stopped on request before the two steps were done; run preflight again")
        run.monitor.close()
        values: dict[str, Any] = comm.broadcast(_last_metrics(folder) if comm.rank == 0 else {})
    finally:
        if comm.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    step_s = config.shards.batch / values["train/images_per_s"]
    said = f"2 steps and a checkpoint: loss {values['train/loss']:.4f}, {step_s:.2f} s a step"
    return Line("two steps", True, f"{said}, {values['train/memory_gb']:.1f} GB a rank"), step_s


def _last_metrics(folder: Path) -> dict[str, Any]:
    import json

    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [values for values in lines if "train/loss" in values][-1]


def check_wall_time(config: "RunConfig", step_s: float | None) -> str:
    """Whether the job's time is enough for a checkpoint, and how many such jobs the run takes."""
    from cogvlm_hpe.train.checkpoint import newest
    from launcher.machine import judge_wall_time, wall_time_left_s

    found = newest(Path(config.run_dir))
    done = int(found.name.removeprefix("step-")) if found else 0
    return judge_wall_time(wall_time_left_s(), config.train.max_steps - done, config.train.save_every, step_s)
