"""How a base gets from disk to its place: memory and seconds of ours beside two other ways, in one run.

  ours           parameters are views of the mapped files; `ours, float32` converts them tensor by tensor
  transformers   from_pretrained, as this project did before
  naive          a model with memory of its own (not even initialised), torch.load of one pickled file, load_state_dict
  ZeRO-2         two ranks and DeepSpeed's engine for a LoRA; ours keeps it from sending the frozen weights around
  ZeRO-3         two ranks; ours reads each rank its pieces, `transformers` splits the whole base that each rank has

python benchmarks/load.py [--layers 9] [--folder DIR]
Writes a CogVLM of 1.2 B random weights in bf16 to a temporary folder (two forms, 5 GB). The files are in the page
cache, as on the second start on a machine. Anonymous memory is what a process cannot share: the largest sum over the
processes while they load, above what they had before. PSS, at the end, counts shared pages once. `used` is the time
until every page has been looked at.
"""

import argparse
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils import logging

from cogvlm_hpe.config import AdapterConfig, ModelConfig, RunConfig, ShardsConfig, TrainConfig
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.convert import Source, write_hf
from cogvlm_hpe.model.load import empty_model, load_base
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.weights import AnyWeights, open_weights
from launcher.world import World, free_port

GB = 1e9
PAGE_ELEMENTS = 2048  # of bf16 in a page of memory
PICKLED = "pickled.pt"


class RandomWeights(AnyWeights):
    """Weights that exist only when they are read."""

    def __init__(self, folder: Path, config: CogVLMConfig) -> None:
        self.folder, self.architecture = folder, config
        self._like = dict(empty_model(config, torch.bfloat16).named_parameters())
        self._some = torch.empty(2**22, dtype=torch.bfloat16).uniform_(-0.04, 0.04)

    def names(self) -> list[str]:
        return sorted(self._like)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._like[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str) -> Tensor:
        count = math.prod(self.shape(name))
        return self._some.repeat(count // len(self._some) + 1)[:count].view(self.shape(name))

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name).flatten()[start:stop]

    def forget(self, name: str) -> None:
        pass


def make_base(folder: Path, layers: int) -> int:
    """Write the base in both forms; its bytes."""
    vision = {"hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 4096}
    config = CogVLMConfig(hidden_size=2048, intermediate_size=5504, num_hidden_layers=layers, vision_config=vision)
    weights = RandomWeights(folder, config)
    size = sum(2 * math.prod(weights.shape(name)) for name in weights.names())
    if shutil.disk_usage(folder).free < 3 * size:
        sys.exit(f"{folder}: {3 * size / GB:.1f} GB of free disk are needed; name another place with --folder")
    write_hf(Source(weights), folder / "base", 2**29, 1.0)
    written = open_weights(folder / "base")
    torch.save({name: written.read(name) for name in written.names()}, folder / PICKLED)
    return size


def ours(folder: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return load_base(folder / "base", dtype)


def ours_float32(folder: Path) -> nn.Module:
    return ours(folder, torch.float32)


def transformers(folder: Path) -> nn.Module:
    return CogVLMForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)


def naive(folder: Path) -> nn.Module:
    model = empty_model(open_weights(folder / "base").config, torch.bfloat16).to_empty(device="cpu")
    model.load_state_dict(torch.load(folder / PICKLED, weights_only=True))
    return model


def engine_ours(folder: Path) -> nn.Module:
    from cogvlm_hpe.train.engine import Engine
    from launcher.comm import single

    model = with_lora(ours(folder))
    # The engine takes the ranks from torch; `comm` is only used by what is not called here.
    return Engine(model, run_config(folder), single(), 1).engine


def engine_transformers(folder: Path) -> nn.Module:
    import deepspeed

    from cogvlm_hpe.train.engine import deepspeed_config

    model = with_lora(transformers(folder))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(run_config(folder), 1))[0]


def with_lora(model: nn.Module) -> nn.Module:
    from cogvlm_hpe.train.adapter import add_lora

    add_lora(model, AdapterConfig(), "unused")
    return model


def run_config(folder: Path, stage: Literal[2, 3] = 2) -> RunConfig:
    train = TrainConfig(zero_stage=stage)
    return RunConfig("unused", ModelConfig(str(folder)), ShardsConfig([]), AdapterConfig(), train)


def split_ours(folder: Path) -> nn.Module:
    from cogvlm_hpe.train.engine import deepspeed_config
    from cogvlm_hpe.train.partition import load_partitioned

    return load_partitioned(open_weights(folder / "base"), torch.bfloat16, deepspeed_config(run_config(folder, 3), 1))


def split_transformers(folder: Path) -> nn.Module:
    import deepspeed

    from cogvlm_hpe.train.engine import deepspeed_config

    model = transformers(folder)
    deepspeed.zero.Init(module=model, config_dict_or_path=deepspeed_config(run_config(folder, 3), 1))
    return model


Way = Callable[[Path], nn.Module]


def work(way: Way, folder: Path, world: World | None, pipe: Connection) -> None:
    """One process: get ready, wait for the word, load, look at every page, tell."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if world is not None:
        join(world)
    pipe.send(memory_kb(os.getpid())["RssAnon"])
    pipe.recv()
    start_s = time.perf_counter()
    model = way(folder)
    load_s = time.perf_counter() - start_s
    for parameter in model.parameters():
        tensor = getattr(parameter, "ds_tensor", parameter).detach()
        tensor.flatten()[::PAGE_ELEMENTS].sum()
    used_s = time.perf_counter() - start_s
    pipe.send({"load_s": load_s, "used_s": used_s, "pss_kb": pss_kb(), "peak_kb": memory_kb(os.getpid())["VmHWM"]})
    pipe.recv()  # the others' pages count until all have told


def join(world: World) -> None:
    """Meet the other rank, before anything is measured."""
    from cogvlm_hpe.train.engine import prepare_deepspeed
    from launcher.comm import from_torch

    prepare_deepspeed()
    from_torch(world)
    import deepspeed

    deepspeed.init_distributed()


def memory_kb(pid: int) -> dict[str, int]:
    """Lines of /proc/PID/status that count kilobytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1] == "kB"}


def pss_kb() -> int:
    """This process's proportional share of resident memory."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == "Pss:")


def measure(context: Any, way: Way, folder: Path, processes: int, zero: bool) -> dict[str, float]:
    """Sums over `processes` that load at the same time, and the slowest one's seconds."""
    port = free_port()
    worlds = [World(rank, rank, processes, processes, "127.0.0.1", port, "env") for rank in range(processes)]
    pipes, children = [], []
    for world in worlds:
        here, there = context.Pipe()
        children.append(context.Process(target=work, args=(way, folder, world if zero else None, there)))
        children[-1].start()
        pipes.append(here)
    before_kb = sum(pipe.recv() for pipe in pipes)
    for pipe in pipes:
        pipe.send("go")
    anonymous_kb = 0
    while not all(pipe.poll() for pipe in pipes):
        anonymous_kb = max(anonymous_kb, sum(memory_kb(child.pid)["RssAnon"] for child in children) - before_kb)
        time.sleep(0.01)
    told = [pipe.recv() for pipe in pipes]
    for pipe, child in zip(pipes, children, strict=True):
        pipe.send("leave")
        child.join()
    slowest = {key: max(one[key] for one in told) for key in ("load_s", "used_s")}
    totals = {key: sum(one[key] for one in told) * 1024 / GB for key in ("pss_kb", "peak_kb")}
    return {"anonymous": anonymous_kb * 1024 / GB, "pss": totals["pss_kb"], "peak": totals["peak_kb"], **slowest}


RUNS: list[tuple[str, Way, int, bool]] = [
    ("ours", ours, 1, False),
    ("transformers", transformers, 1, False),
    ("naive", naive, 1, False),
    ("ours", ours, 2, False),
    ("transformers", transformers, 2, False),
    ("naive", naive, 2, False),
    ("ours, float32", ours_float32, 1, False),
    ("ZeRO-2, ours", engine_ours, 2, True),
    ("ZeRO-2, transformers", engine_transformers, 2, True),
    ("ZeRO-3, ours", split_ours, 2, True),
    ("ZeRO-3, transformers", split_transformers, 2, True),
]


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9, help="decoder layers; 9 make 1.2 B weights")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder in it is removed")
    args = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "peft", "cogvlm_hpe.model.convert"])
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        size = make_base(Path(name), args.layers) / GB
        print(f"base: {size:.2f} GB in bf16; memory in GB, summed over processes; (×) relative to the base")
        print(f"{'way':<21} {'processes':>9} {'anonymous':>15} {'PSS':>6} {'peak RSS':>9} {'load s':>7} {'used s':>7}")
        for label, way, processes, zero in RUNS:
            found = measure(context, way, Path(name), processes, zero)
            anonymous = f"{found['anonymous']:.2f} ({found['anonymous'] / size:.2f}×)"
            memory = f"{anonymous:>15} {found['pss']:>6.2f} {found['peak']:>9.2f}"
            print(f"{label:<21} {processes:>9} {memory} {found['load_s']:>7.1f} {found['used_s']:>7.1f}", flush=True)


if __name__ == "__main__":
    main()
