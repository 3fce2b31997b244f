"""From the ranks' parts to one result folder whose bytes do not depend on how many ranks there were."""

import io
import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from cogvlm_hpe.evaluate.summary import Row, summarise
from launcher.comm import Comm
from launcher.files import atomic_folder, write_json_atomic

PREDICTIONS, METRICS, RUN = "predictions.jsonl", "metrics.json", "run.json"
_HEADS = 8
_PACKAGES = ("torch", "transformers", "peft", "numpy", "mpi4py")

T = TypeVar("T")


def collect(parts: Sequence[tuple[int, list[T]]], n_batches: int, comm: Comm) -> list[T] | None:
    """All ranks. `parts` are (number of a batch, its rows). On rank 0 the rows of all batches in order, else None.

    Raises RuntimeError unless every batch came exactly once: no image may be counted twice or left out.
    """
    gathered = comm.gather(list(parts))
    if gathered is None:
        return None
    ordered = sorted((part for rank in gathered for part in rank), key=lambda part: part[0])
    numbers = [number for number, _ in ordered]
    if numbers != list(range(n_batches)):
        raise RuntimeError(f"{len(numbers)} batches came back, {n_batches} were dealt: {numbers[:20]}")
    return [row for _, rows in ordered for row in rows]


def write_result(
    out: Path, rows: Sequence[Row], header: dict[str, Any], run: dict[str, Any], aflw2000: bool = False
) -> dict[str, Any]:
    """Write predictions.jsonl, metrics.json, run.json and a TensorBoard log as one finished folder; the metrics.

    `header` says what was judged (system, set, decoding) and goes into metrics.json: no times, hosts or ranks. Those
    belong into `run`; `aflw2000` as `summarise` has it. Raises UserError if `out` exists.
    """
    result = header | {"tasks": summarise(rows, aflw2000)}
    with atomic_folder(out) as folder:
        with (folder / PREDICTIONS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
        write_json_atomic(folder / METRICS, result)
        write_json_atomic(folder / RUN, run)
        _write_tensorboard(folder, result)
    return result


def run_facts(comm: Comm, threads: int, start_s: float, **more: Any) -> dict[str, Any]:
    """What run.json says: how, where and when the result was made."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": versions,
        "ranks": comm.size,
        "threads_per_rank": threads,
        "argv": sys.argv[1:],
        "start_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start_s)),
        "seconds": round(time.time() - start_s, 3),
        **more,
    }


def headline(tasks: dict[str, Any]) -> dict[str, float]:
    """The few numbers for a curve or a line on screen, by name; those without a value are left out."""
    numbers: dict[str, float | None] = {}
    if "pose" in tasks:
        pose = tasks["pose"]
        numbers["geodesic_deg"] = pose["all"]["geodesic"]["mean"]
        numbers["geodesic_median_deg"] = pose["all"]["geodesic"]["median"]
        numbers["mae_deg"] = pose["all"]["mae"]["mean"]
        numbers["constant_pose_deg"] = pose["constant_pose"]["geodesic"]["mean"]
        numbers["pose_valid"] = pose["n_valid"] / pose["n"]
        numbers["pose_blended"] = pose["format"]["blended"]
    if "where" in tasks:
        numbers["grounding_accuracy"] = tasks["where"]["accuracy"]["mean"]
        numbers["grounding_iou"] = tasks["where"]["iou"]["mean"]
        numbers["grounding_valid"] = tasks["where"]["n_valid"] / tasks["where"]["n"]
        numbers["grounding_blended"] = tasks["where"]["format"]["blended"]
    numbers |= {
        f"{task}_accuracy": tasks[task]["accuracy"]["mean"] for task in ("what", "facing", "tags") if task in tasks
    }
    return {name: value for name, value in numbers.items() if value is not None}


def _write_tensorboard(folder: Path, result: dict[str, Any]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    from cogvlm_hpe.evaluate.plots import head_sheet
    from cogvlm_hpe.evaluate.results import Result

    writer = SummaryWriter(str(folder / "tensorboard"))
    sheet = head_sheet([Result(folder, str(result.get("system")), result)], _HEADS) if "set" in result else None
    if sheet is not None:
        writer.add_image("evaluate/heads", np.array(Image.open(io.BytesIO(sheet))), 0, dataformats="HWC")
    for name, value in headline(result["tasks"]).items():
        writer.add_scalar(f"evaluate/{name}", value, 0)
    for edge in result["tasks"].get("pose", {}).get("by_yaw", []):
        if edge["n"]:
            writer.add_scalar("evaluate/geodesic_deg_by_yaw", edge["geodesic_mean"], int(edge["from"]))
    writer.add_text("evaluate/metrics", f"```\n{json.dumps(result, indent=1)}\n```")
    writer.close()
