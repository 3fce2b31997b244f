"""`cogvlm-hpe plan`: memory, FLOPs, speed and sizes of a run, before a GPU is asked for."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError

if TYPE_CHECKING:
    from cogvlm_hpe.config import RunConfig
    from cogvlm_hpe.model.configuration import CogVLMConfig
    from cogvlm_hpe.train.plan import Plan, Trace

HELP = "what a run will need: memory of a GPU, FLOPs, speed, checkpoint sizes"
_EPILOG = """Any key of the config may follow, as for train: --train.micro_batch 4 --adapter.scope all

Memory is counted by tracing the model in its true shapes; activations are those kept for the backward pass of one
micro-batch. Weights, gradients, optimizer and what DeepSpeed adds (buckets, gathered layers) follow its settings in
train.deepspeed; what its step needs for a moment is left out. 3 GB are set aside for the CUDA context and
fragmentation: an assumption, as are --mfu and --image-kb."""


def main(argv: list[str]) -> int:
    """Print the plan. Exit code 1 where no number of GPUs asked for has enough memory."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)

    from cogvlm_hpe.train.command import parse

    config, _ = parse(["--config", str(args.config), *rest])
    model_config = find_config(config.model.base)

    from cogvlm_hpe.train.plan import plan, trace

    questions = args.questions or config.shards.questions
    traced = trace(config, model_config, questions, args.text_tokens)
    plans = [plan(config, traced, gpus) for gpus in args.gpus]
    columns = [describe(config, traced, one, args) for one in plans]
    if args.json:
        print(json.dumps(columns, indent=1))
    else:
        _show(config, questions, args, columns)
    return 0 if any(column["fits"] for column in columns) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cogvlm-hpe plan", description=HELP, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="training config")
    add("--gpus", type=_counts, default=[8], metavar="N[,N…]", help="numbers of GPUs, one column each (default: 8)")
    add("--gpu-memory", type=float, default=80.0, metavar="GB", help="of one GPU, 10^9 bytes (default: %(default)s)")
    add("--mfu", type=float, default=0.4, help="share of the peak that useful FLOPs reach (default: %(default)s)")
    add("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of a GPU; an H100's is %(default)s")
    add("--questions", type=int, metavar="K", help="questions asked of an image (default: shards.questions)")
    add("--text-tokens", type=int, default=76, metavar="L", help="of a question with its answer (default: %(default)s)")
    add("--image-kb", type=float, default=300.0, metavar="KB", help="an encoded image on disk (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")
    return parser


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least one GPU each")
    return counts


def find_config(base: str) -> "CogVLMConfig":
    """Configuration of a base folder, or of a published base by its folder's name, which need not be there.

    Raises UsageError where neither is known.
    """
    from cogvlm_hpe.model.configuration import PUBLISHED, CogVLMConfig
    from cogvlm_hpe.model.folders import resolve_base
    from cogvlm_hpe.model.weights import read_config
    from launcher.errors import UserError

    try:
        return read_config(resolve_base(base))
    except UserError:
        name = next((name for name in PUBLISHED if Path(base).name.startswith(name)), None)
        if name is None:
            raise UsageError(
                f"model.base {base}: no such folder, and not named like one of {', '.join(PUBLISHED)}; name either"
            ) from None
        return CogVLMConfig.named(name)


def describe(config: "RunConfig", traced: "Trace", one: "Plan", args: argparse.Namespace) -> dict[str, Any]:
    """One column: memory in GB by part, and what follows from FLOPs and peak."""
    rate = args.mfu * args.peak_tflops * 1e12 * one.gpus
    # MFU counts useful work only, so recomputing costs time at the same use of the hardware.
    step_s = one.step_flops / rate
    images_per_s = config.shards.batch / step_s
    return {
        "gpus": one.gpus,
        "memory_gb": _gb(one.memory),
        "offloaded_gb": _gb(one.offloaded),
        "total_gb": round(one.total / 1e9, 2),
        "fits": one.total <= args.gpu_memory * 1e9,
        "trained_parameters": traced.trained,
        "step_pflop": round(one.step_flops / 1e15, 3),
        "step_s": round(step_s, 3),
        "images_per_s": round(images_per_s, 2),
        "run_hours": round(config.train.max_steps * step_s / 3600, 2),
        "loader_mb_per_s": round(images_per_s * args.image_kb / 1e3, 2),
        "adapter_mb": round(traced.adapter_bytes / 1e6, 1),
        "checkpoint_mb": round(traced.checkpoint_bytes / 1e6, 1),
        "refused": _refusal(config, one.gpus),
    }


def _gb(parts: dict[str, float]) -> dict[str, float]:
    return {part: round(size / 1e9, 2) for part, size in parts.items()}


def _refusal(config: "RunConfig", gpus: int) -> str:
    """Why `train` would not start on so many ranks, or nothing."""
    from cogvlm_hpe.config import check_world

    try:
        check_world(config, gpus)
    except UsageError as error:
        return str(error)
    return ""


def _show(config: "RunConfig", questions: int, args: argparse.Namespace, columns: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    train = config.train
    asked = f"{questions} questions of {args.text_tokens} tokens an image, batch {config.shards.batch}"
    table = Table(title=f"{config.model.base}: ZeRO-{train.zero_stage}, micro-batch {train.micro_batch}, {asked}")
    table.add_column("")
    for column in columns:
        table.add_column(f"{column['gpus']} GPUs", justify="right")
    for part in columns[0]["memory_gb"]:
        table.add_row(f"{part}, GB", *(f"{column['memory_gb'][part]:.2f}" for column in columns))
    limit = args.gpu_memory
    table.add_row(
        f"all of {limit:g} GB", *(f"{c['total_gb']:.1f} {'fits' if c['fits'] else 'TOO MUCH'}" for c in columns)
    )
    for part in columns[0]["offloaded_gb"]:
        table.add_row(f"{part}, not on the GPU, GB", *(f"{column['offloaded_gb'][part]:.2f}" for column in columns))
    table.add_section()
    rows = {
        "trained parameters": ("trained_parameters", ",d"),
        "a step, PFLOP": ("step_pflop", ".2f"),
        f"a step at MFU {args.mfu:g}, s": ("step_s", ".2f"),
        "images/s": ("images_per_s", ".1f"),
        f"{train.max_steps} steps, h": ("run_hours", ".1f"),
        "loader, MB/s": ("loader_mb_per_s", ".1f"),
        "adapter, MB": ("adapter_mb", ".0f"),
        "checkpoint, MB": ("checkpoint_mb", ".0f"),
    }
    for label, (key, form) in rows.items():
        table.add_row(label, *(format(column[key], form) for column in columns))
    console = Console()
    console.print(table)
    for column in columns:
        if column["refused"]:
            console.print(f"{column['gpus']} GPUs: {column['refused']}", highlight=False)
