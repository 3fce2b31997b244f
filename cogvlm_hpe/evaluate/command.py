"""`cogvlm-hpe evaluate`: a model, its adapters and a shard set in; answers and scores out, the same for any ranks."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError, UserError

if TYPE_CHECKING:
    from launcher.comm import Comm
    from shards.index import ShardSet

HELP = "judge a model on a shard set: pose, grounding and answer formats"
TASKS = ("pose", "where", "what", "facing", "tags")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the judge."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="base folder, adapter folder (it names its base) or merged model")
    add(
        "--adapter", type=Path, action="append", default=[], metavar="DIR",
        help="adapter to put on --model; several give one result folder each",
    )  # fmt: skip
    add("--shards", type=Path, required=True, metavar="DIR", help="shard set to judge on")
    add("--limit", type=_positive, metavar="N", help="judge only the first N images in key order")
    add("--batch", type=_positive, default=16, metavar="N", help="images in one batch (default: %(default)s)")
    add(
        "--questions", type=_positive, default=64, metavar="N",
        help="questions decoded at once: bounds memory (default: %(default)s)",
    )  # fmt: skip
    add("--max-new-tokens", type=_positive, default=48, metavar="N", help="end of an answer (default: %(default)s)")
    add(
        "--decode", choices=("greedy", "expectation"), default="greedy",
        help="expectation: a valid pose is the mean over the distribution of its digits (default: %(default)s)",
    )  # fmt: skip
    add("--tasks", type=_tasks, default=list(TASKS), metavar="A,B", help=f"of {','.join(TASKS)} (default: all)")
    add("--workers", type=int, default=0, metavar="N", help="reader processes per rank (default: %(default)s)")
    add(
        "--threads", type=_positive, default=1, metavar="N",
        help="threads per rank; sums depend on it, so it is fixed (default: %(default)s)",
    )  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU per rank if there is one")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU, else fp32")
    add("--name", help="name of the system in reports (default: the folder's name)")
    add("--out", type=Path, required=True, metavar="DIR", help="result folder to make; must not exist")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _tasks(text: str) -> list[str]:
    chosen = text.split(",")
    wrong = [task for task in chosen if task not in TASKS]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r}: not one of {', '.join(TASKS)}")
    return [task for task in TASKS if task in chosen]


def run(args: argparse.Namespace) -> int:
    """All ranks. Judge each adapter, or the model alone. Raises UserError or UsageError for the user's mistakes."""
    jobs = plan_jobs(args)
    import torch

    from launcher import comm as comms
    from shards.index import open_set

    comm = comms.mpi()
    torch.set_num_threads(args.threads)
    shard_set = open_set(args.shards)
    for adapter, out, name in jobs:
        _judge_one(args, adapter, out, name, shard_set, comm)
    return 0


def plan_jobs(args: argparse.Namespace) -> list[tuple[Path | None, Path, str]]:
    """(adapter, result folder, system's name) of each job. Raises UsageError where a result exists already."""
    alone = len(args.adapter) <= 1
    names = short_names(args.adapter or [Path(args.model)])
    if args.name and not alone:
        raise UsageError("--name names one system; leave it out with several --adapter")
    adapters: Sequence[Path | None] = args.adapter or [None]
    jobs = [
        (adapter, args.out if alone else args.out / name, args.name or name)
        for adapter, name in zip(adapters, names, strict=True)
    ]
    for _, out, _ in jobs:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"--out {out}: exists already; choose another folder or remove it")
    return jobs


def short_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: the shortest tail of its path that no other one shares, joined by `-`."""
    parts = [folder.absolute().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UsageError("--adapter: the same folder is given twice; leave one out")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-depth:]).strip("/-") for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i}-{name}" for i, name in enumerate(names)]


def _judge_one(
    args: argparse.Namespace, adapter: Path | None, out: Path, name: str, shard_set: "ShardSet", comm: "Comm"
) -> None:
    """All ranks. One model on one set."""
    import torch

    from cogvlm_hpe.evaluate import reduce
    from cogvlm_hpe.evaluate.answer import Decoding
    from cogvlm_hpe.evaluate.decode import decode_set
    from cogvlm_hpe.model.load import load

    start_s = time.time()
    device, dtype = device_of(args.device), args.dtype
    if dtype == "auto":
        dtype = "fp32" if device == "cpu" else "bf16"
    loaded = load(args.model, adapter, device=device, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    decoding = Decoding(args.max_new_tokens, args.questions, args.decode)
    rows, n_images = decode_set(
        loaded, shard_set, comm, args.tasks, decoding,
        batch=args.batch, limit=args.limit, workers=args.workers, description=name,
    )  # fmt: skip
    if rows is None:
        return
    if not rows:
        raise UserError(f"{args.shards}: holds no head or object that --tasks {','.join(args.tasks)} could ask about")
    header = {
        "system": name,
        "set": {key: shard_set.info.get(key) for key in ("name", "source", "split")} | {"images": n_images},
        "model": {key: loaded.notes.get(key) for key in ("scope", "answer_format", "prompts", "base_fingerprint")},
        "decoding": {"dtype": dtype, "batch": args.batch, **vars(decoding)},
    }
    facts = reduce.run_facts(
        comm, args.threads, start_s, device=device, model=str(Path(args.model).absolute()),
        adapter=adapter and str(adapter.absolute()), shards=str(args.shards.absolute()),
    )  # fmt: skip
    result = reduce.write_result(out, rows, header, facts)
    show(result, out)


def device_of(wanted: str) -> str:
    """`cpu`, or the GPU of this rank. Raises UsageError where a GPU is asked for and there is none."""
    import torch

    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here; take --device cpu")
    from launcher.world import discover

    return f"cuda:{discover().local_rank % torch.cuda.device_count()}"


def show(result: dict[str, Any], out: Path) -> None:
    """The headline numbers on screen."""
    from rich.console import Console
    from rich.table import Table

    from cogvlm_hpe.evaluate.reduce import headline

    table = Table(title=f"{result['system']} on {result['set']['name']} ({result['set']['images']} images)")
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in headline(result["tasks"]).items():
        table.add_row(name, f"{value:.3f}")
    console = Console()
    console.print(table)
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)
