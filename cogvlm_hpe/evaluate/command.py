"""`cogvlm-hpe evaluate`: a model, its adapters and a shard set in; answers and scores out, the same for any ranks."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError, UserError

if TYPE_CHECKING:
    from cogvlm_hpe.evaluate.answer import Decoding
    from cogvlm_hpe.evaluate.baselines.judged import CropJudged
    from cogvlm_hpe.model.load import Loaded
    from launcher.comm import Comm
    from shards.index import ShardSet

HELP = "judge a model on a shard set: pose, grounding and answer formats"
EPILOG = """starting it
  cogvlm-hpe evaluate --model DIR --shards DIR --out DIR                 one rank
  mpirun -np 8 cogvlm-hpe evaluate --model DIR --shards DIR --out DIR    eight; the same bytes in OUT
  hpe-launch evaluate …   finds the way itself;   sbatch slurm/evaluate.sh …   as a job
then `cogvlm-hpe report OUT…` compares. docs/evaluation.md says more."""
TASKS = ("pose", "where", "what", "facing", "tags")
_SAID_OF_MODELS = ("scope", "answer_format", "prompts", "base_fingerprint", "merge")
DTYPES, DTYPES_HELP = ("auto", "fp32", "bf16"), "auto: bf16 on a GPU, else fp32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the judge."""
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="DIR",
        help="base, adapter (it names its base), merged model, crop network (train-cnn) or 6DRepNet's weights file",
    )
    add(
        "--adapter", type=Path, action="append", default=[], metavar="DIR",
        help="adapter to put on --model; several give one result folder each",
    )  # fmt: skip
    add("--with-base", action="store_true", help="judge --model without an adapter in the same pass, too")
    add("--shards", type=Path, required=True, metavar="DIR", help="shard set to judge on, or its address")
    add("--limit", type=positive, metavar="N", help="judge only the first N images in key order")
    add("--batch", type=positive, default=16, metavar="N", help="images in one batch (default: %(default)s)")
    add(
        "--questions", type=positive, default=64, metavar="N",
        help="questions decoded at once: bounds memory (default: %(default)s)",
    )  # fmt: skip
    add("--max-new-tokens", type=positive, default=48, metavar="N", help="end of an answer (default: %(default)s)")
    add(
        "--decode", choices=("greedy", "expectation"), default="greedy",
        help="expectation: a valid pose is the mean over the distribution of its digits (default: %(default)s)",
    )  # fmt: skip
    add("--tasks", type=_tasks, default=list(TASKS), metavar="A,B", help=f"of {','.join(TASKS)} (default: all)")
    add("--workers", type=int, default=0, metavar="N", help="reader processes per rank (default: %(default)s)")
    add("--threads", type=positive, default=1, metavar="N", help="of a rank; sums depend on it (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU per rank if there is one")
    add("--dtype", choices=DTYPES, default="auto", help=DTYPES_HELP)
    add("--tokenizer", type=Path, metavar="DIR", help="where neither the base nor the adapter knows it")
    add(
        "--resume", action="store_true",
        help="go on with an evaluation that was cut off: only what is left is judged, on any number of ranks",
    )  # fmt: skip
    add(
        "--rank-timeout", type=positive, default=1800, metavar="S",
        help="end, and name the rank that all wait for, when none has moved for so long (default: %(default)s s)",
    )  # fmt: skip
    add(
        "--name", action="append", default=[],
        help="name of the system in reports (default: the folder's name); once a system, --model first if --with-base; "
        "`X, seed 1`, `X, seed 2`, … are runs of one system X",
    )  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="result folder to make; must not exist")


def positive(text: str) -> int:
    """A flag's whole number of at least 1. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


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
    shard_set, finished = open_set(args.shards), [job for job in jobs if args.resume and _is_finished(job[1])]
    if comm.rank == 0:
        _check_finished(args, finished, shard_set)
    if len(finished) == len(jobs):
        if comm.rank == 0:
            print(f"{args.out}: finished before, kept")
        return 0
    _judge(args, jobs, shard_set, comm)
    return 0


def plan_jobs(args: argparse.Namespace) -> list[tuple[Path | None, Path, str]]:
    """(adapter, result folder, system's name) of each job. Raises UsageError where a result is, unless to resume."""
    adapters: Sequence[Path | None] = [None] * (args.with_base or not args.adapter) + args.adapter
    alone, names = len(adapters) == 1, args.name or short_names([a or Path(args.model) for a in adapters])
    if len(names) != len(adapters) or len(set(names)) < len(names):
        said = f"--name: {len(set(names))} different names for {len(adapters)} systems"
        raise UsageError(f"{said}; give each one its own, --model first if --with-base, or none at all")
    jobs = [
        (adapter, args.out if alone else args.out / name, name) for adapter, name in zip(adapters, names, strict=True)
    ]
    for _, out, _ in jobs:
        if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (args.resume and _is_finished(out)):
            raise UsageError(f"--out {out}: exists already; choose another folder or remove it")
    return jobs


def _is_finished(out: Path) -> bool:
    return (out / "metrics.json").is_file()


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


def _judge(
    args: argparse.Namespace, jobs: Sequence[tuple[Path | None, Path, str]], shard_set: "ShardSet", comm: "Comm"
) -> None:
    """All ranks. Every system of `jobs` on one set, in one pass over its images."""
    from cogvlm_hpe.evaluate import identity, reduce, unfinished
    from cogvlm_hpe.evaluate.decode import decode_all
    from cogvlm_hpe.evaluate.summary import is_aflw2000

    start_s = time.time()
    device = device_of(args.device)
    systems, dtype = _load(args, [adapter for adapter, _, _ in jobs], device)
    decoding = _decoding(args)
    inputs = [identity.inputs_of(args.model, adapter) for adapter, _, _ in jobs] if comm.rank == 0 else []
    settings = _settings(args, dtype, decoding, shard_set)
    whole = settings | {"--model, --adapter or --with-base": inputs, "--name": [name for _, _, name in jobs]}
    work = unfinished.begin(args.out, whole, args.resume, comm)
    names = [name for _, _, name in jobs]
    with work.watch(args.rank_timeout):
        rows, n_images = decode_all(
            systems, shard_set, comm, args.tasks, decoding, batch=args.batch, limit=args.limit, workers=args.workers,
            description=names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", unfinished=work,
        )  # fmt: skip
    if rows is None:
        return
    for (adapter, out, name), system, own, made_of in zip(jobs, systems, rows, inputs, strict=True):
        if _is_finished(out):
            continue
        if not own:
            work.remove()
            said = f"holds no head or object that --tasks {','.join(args.tasks)} could ask about"
            raise UserError(f"{args.shards}: {said}")
        header = {
            "system": name,
            "set": {key: shard_set.info.get(key) for key in ("name", "source", "split")}
            | {"images": n_images, "digest": shard_set.digest},
            "model": {key: system.notes.get(key) for key in _SAID_OF_MODELS},
            "inputs": made_of,
            "decoding": {"dtype": dtype, "batch": args.batch, **vars(decoding)},
        }
        facts = reduce.run_facts(comm, args.threads, start_s, device=device, **_paths(args, adapter, shard_set))
        run = identity.kept_job(settings | _own_job(name, made_of), facts)
        show(reduce.write_result(out, own, header, run, is_aflw2000(shard_set.info)), out)
    work.remove()


def _check_finished(
    args: argparse.Namespace, finished: Sequence[tuple[Path | None, Path, str]], shard_set: "ShardSet"
) -> None:
    """Raise UsageError where a result that is there already is not that of its job."""
    from cogvlm_hpe.evaluate import identity

    for adapter, out, name in finished:
        settings = _settings(args, _dtype(args, device_of(args.device)), _decoding(args), shard_set)
        job = settings | _own_job(name, identity.inputs_of(args.model, adapter))
        identity.check_finished(out, job)


def _settings(args: argparse.Namespace, dtype: str, decoding: "Decoding", shard_set: "ShardSet") -> dict[str, Any]:
    """What must not change between the parts of one evaluation, beside its models."""
    from cogvlm_hpe.model.tokenizer import find_tokenizer
    from launcher.files import sha256

    tokenizer = find_tokenizer(args.tokenizer) if args.tokenizer else None
    return {
        "--tokenizer": tokenizer and sha256(tokenizer),
        "--shards": shard_set.digest,
        "--tasks": args.tasks,
        "--limit": args.limit,
        "--batch": args.batch,
        "--dtype": dtype,
        "--threads": args.threads,
        "--max-new-tokens, --questions or --decode": list(vars(decoding).values()),
    }


def _own_job(name: str, inputs: dict[str, str]) -> dict[str, Any]:
    return {"--name": name, "--model or --adapter": inputs}


def _paths(args: argparse.Namespace, adapter: Path | None, shard_set: "ShardSet") -> dict[str, str | None]:
    place = str(args.shards.absolute()) if shard_set.remote is None else shard_set.place
    own = str(adapter.resolve()) if adapter else None
    return {"model": str(Path(args.model).resolve()), "shards": place, "adapter": own}


def _decoding(args: argparse.Namespace) -> "Decoding":
    from cogvlm_hpe.evaluate.answer import Decoding

    return Decoding(args.max_new_tokens, args.questions, args.decode)


def _dtype(args: argparse.Namespace, device: str) -> str:
    """The number format; of a crop network always fp32."""
    from cogvlm_hpe.evaluate.baselines import cnn, sixdrepnet

    if cnn.is_cnn(Path(args.model)) or sixdrepnet.is_sixdrepnet(Path(args.model)):
        return "fp32"
    return dtype_of(args.dtype, device)


def dtype_of(wanted: str, device: str) -> str:
    """`fp32` or `bf16`; of `auto` the one that suits the device."""
    return wanted if wanted != "auto" else "fp32" if device == "cpu" else "bf16"


def _load(
    args: argparse.Namespace, adapters: Sequence[Path | None], device: str
) -> "tuple[Sequence[Loaded | CropJudged], str]":
    """The systems to judge, and their number format."""
    from cogvlm_hpe.evaluate.baselines import cnn, sixdrepnet
    from cogvlm_hpe.model import load as loading

    for known, read in ((cnn.is_cnn, cnn.load_judged), (sixdrepnet.is_sixdrepnet, sixdrepnet.load_judged)):
        if known(Path(args.model)):
            if args.adapter:
                raise UsageError(f"--adapter {args.adapter[0]}: {args.model} is a crop network, which takes none")
            return [read(Path(args.model), device)], "fp32"
    dtype = _dtype(args, device)
    how: dict[str, Any] = {"device": device, "dtype": loading.DTYPES[dtype], "tokenizer": args.tokenizer}
    if len(adapters) < 2:
        return [loading.load(args.model, adapters[0], **how)], dtype
    return loading.load_several(args.model, adapters, **how), dtype


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
