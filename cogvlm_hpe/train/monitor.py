"""What a run says of itself: log.txt, metrics.jsonl and TensorBoard, written by rank 0 alone."""

import contextlib
import json
import logging
import math
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from launcher.comm import Comm
from launcher.files import write_json_atomic, write_text_atomic
from launcher.world import World

_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "webdataset", "numpy")


class Monitor:
    """Scalars of a step go everywhere at once; `first_step` cuts off what a resumed run will write again.

    held: the lock on the folder, let go at the end.
    """

    def __init__(self, run_dir: Path, comm: Comm, first_step: int, held: IO[str] | None = None) -> None:
        self.active, self._held = comm.rank == 0, held
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops what it has from the purged step on; the point at first_step itself stays.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self._metrics = run_dir / "metrics.jsonl"
        _cut_after(self._metrics, first_step)
        self._file = self._metrics.open("a", encoding="utf-8")
        self.log = _logger(run_dir / "log.txt")

    def scalars(self, global_step: int, values: dict[str, float]) -> None:
        """Record `room/name: value` after `global_step` steps; values that are not finite are left out."""
        if not self.active:
            return
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        for key, value in finite.items():
            self._writer.add_scalar(key, value, global_step)
        rounded = {key: float(f"{value:.7g}") for key, value in finite.items()}
        self._file.write(json.dumps({"global_step": global_step, **rounded}) + "\n")
        self._file.flush()

    def at_start(self, name: str) -> float | None:
        """What this run has recorded under `name` before its first step; None where nothing, and on ranks above 0."""
        lines = _read(self._metrics) if self.active else []
        return next((values[name] for values in lines if values["global_step"] == 0 and name in values), None)

    def judged(self, global_step: int) -> bool:
        """Whether this run has recorded scores after so many steps; False on ranks above 0."""
        lines = _read(self._metrics) if self.active else []
        lines = [values for values in lines if values["global_step"] == global_step]
        return any(name.startswith("evaluate/") for values in lines for name in values)

    def image(self, global_step: int, tag: str, pixels: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 for TensorBoard."""
        if self.active:
            self._writer.add_image(tag, pixels, global_step, dataformats="HWC")

    def histogram(self, global_step: int, tag: str, values: list[float]) -> None:
        """A distribution for TensorBoard."""
        if self.active:
            self._writer.add_histogram(tag, np.array(values), global_step)

    def hparams(self, chosen: dict[str, Any], reached: dict[str, float]) -> None:
        """What was chosen and what came of it, for TensorBoard's table of runs."""
        if self.active:
            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in chosen.items()}
            self._writer.add_hparams(plain, reached, run_name=".")

    def text(self, tag: str, text: str) -> None:
        """A text for TensorBoard, such as the config."""
        if self.active:
            self._writer.add_text(tag, text)

    def say(self, message: str) -> None:
        """A line for log.txt."""
        if self.active:
            self.log.info(message)

    def close(self) -> None:
        """Flush and close the files; another run may write there from now on."""
        if self.active:
            self._writer.close()
            self._file.close()
            for handler in list(self.log.handlers):
                handler.close()
                self.log.removeHandler(handler)
        if self._held is not None:
            self._held.close()


def replay(metrics: Path, tensorboard: Path) -> None:
    """Write the curves of a run's metrics.jsonl as TensorBoard reads them."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tensorboard)) as writer:
        for values in _read(metrics):
            global_step = values.pop("global_step")
            for key, value in values.items():
                writer.add_scalar(key, value, global_step)


def write_run_json(
    run_dir: Path, world: World, hosts: list[str], threads: int, start_s: float, first_step: int
) -> None:
    """Where and with what a run was made, `hosts` by rank; a start adds a line to `starts`."""
    path = run_dir / "run.json"
    run = json.loads(path.read_text()) if path.is_file() else {"starts": []}
    versions = {name: metadata.version(name) for name in _PACKAGES}
    start = {
        "host": hosts[0],
        "hosts": list(dict.fromkeys(hosts)),
        "python": platform.python_version(),
        "versions": versions,
        "ranks": world.size,
        "threads_per_rank": threads,
        "started_by": world.kind,
        "argv": sys.argv[1:],
        "start_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start_s)),
        "first_step": first_step,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    run["starts"] = [s for s in run["starts"] if s["start_time"] != start["start_time"]] + [start]
    write_json_atomic(path, run)


def _cut_after(path: Path, first_step: int) -> None:
    if path.is_file():
        kept = [values for values in _read(path) if values["global_step"] <= first_step]
        write_text_atomic(path, "".join(json.dumps(values) + "\n" for values in kept))


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a dying machine has left unfinished or full of NULs counts for nothing."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            found += [json.loads(line)] if line.endswith("}\n") else []
    return found


def _logger(path: Path) -> logging.Logger:
    log = logging.getLogger(f"cogvlm_hpe.train.{path}")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s train: %(message)s"))
    log.addHandler(handler)
    return log
