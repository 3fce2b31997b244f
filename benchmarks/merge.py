"""The merge job beside mergekit and peft, on one checkpoint of random weights: wall, CPU seconds, peak memory.

python benchmarks/merge.py [--layers 8] [--folder DIR] [--mergekit DIR] [--only linear --checkpoint DIR]

Writes a CogVLM of about 1 B weights in bf16 (8 layers), two LoRA (r 16, every linear layer of both experts) and, for
mergekit, both tuned models as dense weights (9 GB of disk; removed again, unless --checkpoint names where). Every row
is a process of its own; `start` is one that only imports. Files are in the page cache except where it says cold. Peak
is the kernel's largest resident set, mapped files and all. Ours makes its files durable before it ends, the others
leave them to the kernel. mergekit works in float32 as we do and is given the baked models; the time to bake them is
not counted.
It is not among this project's requirements: pip install --no-deps --target DIR mergekit==0.1.5 immutables
Ours says beforehand how much memory it will need at most beside the program itself, and what it needed; shown below.
OMP_NUM_THREADS, the threads of every process, is the number of cores unless it is set. What runs is said on stderr.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CORES = len(os.sched_getaffinity(0))
THREADS = os.environ.setdefault("OMP_NUM_THREADS", str(CORES))
BEGAN_S = time.monotonic()
SHARD_GB = 0.3
MERGEKIT_SHARD = "150M"  # parameters: as many bytes
DENSITY = 0.2
PASS_AIM = 1.3  # times the larger of a cold read of the base and one float64 pass over it
MERGEKIT_AIM = 2.0  # times our wall time and our memory


METHODS = ("linear", "task_arithmetic", "ties")
ROWS = ("pass", "layerwise", "peft", *METHODS)


@dataclass(frozen=True)
class Used:
    """What one process used, what it said of its memory, and whether it was ended by the time limit."""

    wall_s: float
    cpu_s: float
    peak_gb: float
    memory: list[str]
    ended: bool = False


def say(what: str) -> None:
    """What runs now."""
    print(f"[{time.monotonic() - BEGAN_S:4.0f} s] {what} …", file=sys.stderr, flush=True)


def measure(command: list[str], paths: list[str] | None = None, timeout_s: float | None = None) -> Used:
    """Run one process, to its end or to the limit. This one stays small: a child's peak begins with its parent's."""
    os.sync()  # what others wrote is not to be waited for in this one's time
    log, log_name = tempfile.mkstemp()
    os.unlink(log_name)
    environment = os.environ | {"PYTHONPATH": ":".join([*(paths or []), os.getcwd()])}
    start_s = time.perf_counter()
    child = os.posix_spawn(
        command[0], command, environment,
        file_actions=[(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)],
    )  # fmt: skip
    limit = threading.Timer(timeout_s or 0.0, os.kill, (child, signal.SIGKILL))
    if timeout_s:
        limit.start()
    _, status, usage = os.wait4(child, 0)
    limit.cancel()
    wall_s = time.perf_counter() - start_s
    said = os.pread(log, 10**6, 0).decode(errors="replace")
    os.close(log)
    ended = bool(timeout_s) and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if status and not ended:
        sys.exit(f"{' '.join(command)}\n{said[-3000:]}")
    memory = [line for line in said.splitlines() if line.startswith("memory:")]
    return Used(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9, memory, ended)


def python(code: str, *words: str, paths: list[str] | None = None, timeout_s: float | None = None) -> Used:
    """Run a piece of Python."""
    return measure([sys.executable, "-c", code, *words], paths, timeout_s)


MAKE = """
import sys, json, torch
from pathlib import Path
from safetensors.torch import save_file
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.load import empty_model
from cogvlm_hpe.train.adapter import TARGETS, target_modules
folder, layers = Path(sys.argv[1]), int(sys.argv[2])
vision = {"hidden_size": 1024, "num_hidden_layers": 2, "intermediate_size": 4096}
config = CogVLMConfig(hidden_size=2048, intermediate_size=5504, num_hidden_layers=layers, vision_config=vision)
model = empty_model(config, torch.bfloat16)
generator = torch.Generator().manual_seed(0)
make = lambda *shape: torch.randn(*shape, generator=generator)
named = {name: tuple(p.shape) for name, p in model.state_dict().items() if "inv_freq" not in name}
(folder / "base").mkdir()
tensors = {name: make(*shape).mul_(0.02).bfloat16() for name, shape in named.items()}
save_file(tensors, folder / "base/model.safetensors")
config.architectures = ["CogVLMForCausalLM"]
config.save_pretrained(folder / "base")
targets = target_modules(model, ["language.attention", "language.mlp", "vision.attention", "vision.mlp"])
for n in (0, 1):
    tensors = {}
    for name in targets:
        n_out, n_in = named[name + ".weight"]
        tensors[f"base_model.model.{name}.lora_A.weight"] = make(16, n_in) * 0.02
        tensors[f"base_model.model.{name}.lora_B.weight"] = make(n_out, 16) * 0.02
    where = folder / f"lora-{n}"
    where.mkdir()
    save_file(tensors, where / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "task_type": None, "r": 16, "lora_alpha": 16, "target_modules": targets,
            "base_model_name_or_path": str(folder / "base"), "inference_mode": True}
    (where / "adapter_config.json").write_text(json.dumps(said))
adapted = sum(named[name + ".weight"][0] * named[name + ".weight"][1] for name in targets)
total = sum(torch.Size(shape).numel() for shape in named.values())
(folder / "sizes.json").write_text(json.dumps({"total": total, "adapted": adapted}))
"""

PASS = """
import json, os, sys, time, torch
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
from cogvlm_hpe.merge.base import Base
from cogvlm_hpe.merge.factors import read_adapter
from cogvlm_hpe.merge import products
folder = Path(sys.argv[1])
base, adapter = Base(folder / "base"), read_adapter(folder / "lora-0")
file = folder / "base/model.safetensors"
def drop():
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)  # pages not yet on disk would stay
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
def read():
    block = bytearray(2**24)
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(block):
            pass
def squares(rows):
    wide = torch.empty(256, rows.shape[1], dtype=torch.float64)
    for start in range(0, len(rows), 256):
        part = rows[start:start + 256]
        flat = wide[:len(part)].copy_(part).view(-1)
        torch.dot(flat, flat)
def float64_pass():
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(squares, [base.weights.read(f"{name}.weight") for name in sorted(adapter.factors)]))
def layerwise():
    products.base_and_tuned(base, adapter.factors)
def bytes_read():
    with open("/proc/self/io") as said:
        return int(next(line for line in said if line.startswith("read_bytes")).split()[1])
def timed(job):
    before, start_s, cpu_s = bytes_read(), time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - start_s, time.process_time() - cpu_s, (bytes_read() - before) / 1e9
out = {"cold read": [], "float64 pass": [], "layerwise, warm": [], "layerwise, cold": []}
for _ in range(3):
    drop()
    out["cold read"].append(timed(read))
    out["float64 pass"].append(timed(float64_pass))
    out["layerwise, warm"].append(timed(layerwise))
    drop()
    out["layerwise, cold"].append(timed(layerwise))
(folder / "pass.json").write_text(json.dumps(out))
"""

PEFT = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
folder = Path(sys.argv[1])
model = CogVLMForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, folder / "lora-0").merge_and_unload()
model.save_pretrained(folder / "out", max_shard_size="300MB")
"""

MERGEKIT = "import sys; from mergekit.scripts.merge_raw_pytorch import main; main(sys.argv[1:])"
START = "import cogvlm_hpe.merge.writer, matplotlib.figure"


def ours(folder: Path, adapters: int, *flags: str) -> Used:
    """Our command, output removed again."""
    words = [word for n in range(adapters) for word in ("--adapter", str(folder / f"lora-{n}"))]
    base = ["-m", "cogvlm_hpe", "merge", "--base", str(folder / "base"), "--out", str(folder / "out")]
    used = measure([sys.executable, *base, *words, *flags])
    shutil.rmtree(folder / "out")
    return used


def dense(folder: Path, adapters: int, *flags: str) -> Used:
    """Our command with whole weights as output."""
    return ours(folder, adapters, *flags, "--output", "hf", "--max-shard-gb", str(SHARD_GB))


def bake(folder: Path) -> None:
    """The tuned models as mergekit wants them: one file each."""
    for n in (0, 1):
        if (folder / f"tuned-{n}").exists():
            continue
        words = ["--adapter", str(folder / f"lora-{n}"), "--base", str(folder / "base"), "--method", "cat"]
        words += ["--output", "hf", "--max-shard-gb", "99", "--out", str(folder / f"tuned-{n}")]
        measure([sys.executable, "-m", "cogvlm_hpe", "merge", *words])
        drop_rotary(folder / f"tuned-{n}")


def drop_rotary(folder: Path) -> None:
    """mergekit wants the same tensors in every model; the base here has no rotary tables."""
    python(
        "import sys; from safetensors.torch import load_file, save_file; p = sys.argv[1]; "
        "save_file({k: v for k, v in load_file(p).items() if 'inv_freq' not in k}, p + '.new')",
        str(folder / "model.safetensors"),
    )
    os.replace(folder / "model.safetensors.new", folder / "model.safetensors")


def mergekit(folder: Path, method: str, where: list[str], timeout_s: float | None) -> Used:
    """mergekit on the same tensors; output removed again."""
    said = {"density": DENSITY} if method == "ties" else {}
    models = [
        {"model": str(folder / f"tuned-{n}/model.safetensors"), "parameters": {"weight": 0.5} | said} for n in (0, 1)
    ]
    config = {"merge_method": method, "models": models, "dtype": "float32", "out_dtype": "bfloat16"}
    if method != "linear":
        config["base_model"] = str(folder / "base/model.safetensors")
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    words = [str(folder / "config.yaml"), str(folder / "out"), "--out-shard-size", MERGEKIT_SHARD]
    used = python(MERGEKIT, *words, paths=where, timeout_s=timeout_s)
    shutil.rmtree(folder / "out", ignore_errors=True)  # one that was ended early has none
    return used


def row(name: str, used: Used, peer: Used | None = None, aims: bool = False) -> None:
    """One line; with a peer, how many times as much as ours it took, and whether that is what we aim at."""
    said = f"{name:<34}{used.wall_s:8.1f} s{used.cpu_s:9.1f} s{used.peak_gb:8.2f} GB"
    if peer is not None:
        wall, cpu, peak = used.wall_s / peer.wall_s, used.cpu_s / peer.cpu_s, used.peak_gb / peer.peak_gb
        said += f"   {wall:5.1f}x {cpu:5.1f}x {peak:5.1f}x"
        if used.ended:
            said += "   and more: ended by --timeout-s"
        if aims:
            said += f"   aim: wall and peak >= {MERGEKIT_AIM:g}x: {verdict(min(wall, peak) >= MERGEKIT_AIM)}"
    print("\n".join([said, *(f"  {line}" for line in used.memory)]), flush=True)


def verdict(reached: bool) -> str:
    """In a word."""
    return "reached" if reached else "MISSED"


def show_pass(folder: Path, adapted: int, total: int) -> None:
    """The layer-based merge's one pass over the base, against the two floors; best of three."""
    say("similarities, three times")
    python(PASS, str(folder))
    found = {name: min(times) for name, times in json.loads((folder / "pass.json").read_text()).items()}
    print(
        f"similarities of {adapted / 1e9:.2f} B adapted weights of {total / 1e9:.2f} B, best of three, in one process"
    )
    for name, (wall_s, cpu_s, read_gb) in found.items():
        print(f"  {name:<34}{wall_s:7.2f} s wall {cpu_s:7.2f} s CPU {read_gb:6.2f} GB from disk")
    ours_s, pass_s = found["layerwise, cold"][0], found["float64 pass"][0]
    for what, share in (("the base", 1.0), ("its adapted part", adapted / total)):
        ratio = ours_s / max(found["cold read"][0] * share, pass_s)
        aim = f"   aim: <= {PASS_AIM:g}: {verdict(ratio <= PASS_AIM)}" if share == 1.0 else ""
        print(f"  cold / larger of (read of {what}, float64 pass) = {ratio:.2f}{aim}", flush=True)


@contextmanager
def place(args: argparse.Namespace) -> Iterator[Path]:
    """The folder that holds base and adapters, made if they are not there: a kept one or a temporary one."""
    if args.checkpoint is not None:
        args.checkpoint.mkdir(parents=True, exist_ok=True)
        yield made(args.checkpoint, args.layers)
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="merge-benchmark-") as name:
        yield made(Path(name), args.layers)


def made(folder: Path, layers: int) -> Path:
    """The folder, with a base and two adapters in it."""
    if not (folder / "sizes.json").exists():
        if shutil.disk_usage(folder).free < 12e9:
            sys.exit(f"{folder}: 12 GB of free disk are needed; name another place with --folder or --checkpoint")
        say("writing a base and two adapters")
        python(MAKE, str(folder), str(layers))
    return folder


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--checkpoint", type=Path, help="a folder for base and adapters, used again if they are there")
    parser.add_argument("--only", action="append", choices=ROWS, help="measure this alone; may be given several times")
    parser.add_argument("--mergekit", action="append", default=[], metavar="DIR", help="where mergekit is installed")
    parser.add_argument("--timeout-s", type=float, metavar="S", help="end a run of mergekit after so long (no limit)")
    args = parser.parse_args()
    wanted = args.only or ROWS
    with place(args) as folder:
        print(f"{CORES} cores, {THREADS} threads a process")
        if "pass" in wanted:
            sizes = json.loads((folder / "sizes.json").read_text())
            show_pass(folder, sizes["adapted"], sizes["total"])
        print(f"\n{'':<34}{'wall':>10}{'CPU':>11}{'peak':>11}   times ours: wall, CPU, peak")
        if "layerwise" in wanted:
            lean(folder)
        if "peft" in wanted:
            baked_in(folder)
        methods = [method for method in METHODS if method in wanted]
        if methods and not args.mergekit and importlib.util.find_spec("mergekit") is None:
            return print("no mergekit: name where it is with --mergekit (--help says how to install it)")
        compare(folder, methods, args)


def lean(folder: Path) -> None:
    """What a start alone takes, and the layer-based merge to an adapter."""
    say("start, layerwise, sweep")
    start = python(START)
    row("start", start)
    chosen = ours(folder, 1)
    row("ours, layerwise to adapter", chosen)
    base_gb = (folder / "base/model.safetensors").stat().st_size / 1e9
    print(f"  of a base of {base_gb:.2f} GB it held {chosen.peak_gb - start.peak_gb:.2f} GB more than a mere start")
    row("ours, layerwise, sweep of 5", ours(folder, 1, "--sweep", "0.1,0.3,0.5,0.7,0.9"))


def baked_in(folder: Path) -> None:
    """One adapter baked into the weights, ours and peft's."""
    say("one adapter baked in, ours and peft's")
    one = dense(folder, 1, "--method", "cat")
    row("ours, one adapter baked in", one)
    baked = python(PEFT, str(folder))
    shutil.rmtree(folder / "out")
    row("peft merge_and_unload, save", baked, one)


def compare(folder: Path, methods: list[str], args: argparse.Namespace) -> None:
    """Ours and mergekit on the same methods."""
    if methods:
        say("baking both adapters for mergekit")
        bake(folder)
    weights = ("--weight", "0.5", "--weight", "0.5")
    for method in methods:
        flags = ("--density", str(DENSITY)) if method == "ties" else ()
        say(f"{method}, ours")
        used = dense(folder, 2, "--method", method.replace("_", "-"), *weights, *flags)
        row(f"ours, {method}", used)
        say(f"{method}, mergekit")
        row(f"mergekit, {method}", mergekit(folder, method, args.mergekit, args.timeout_s), used, aims=True)


if __name__ == "__main__":
    main()
