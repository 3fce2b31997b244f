"""A run folder belongs to one run at a time: a job back from the queue may meet a run that was started by hand."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from launcher.comm import Comm
from launcher.errors import UserError

FILE = ".held"
_PATIENCE_S = 5.0  # a rank that was killed just now lets go when the system has cleaned up after it
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


def hold(run_dir: Path, comm: Comm, patience_s: float = _PATIENCE_S) -> IO[str] | None:
    """All ranks. Rank 0's lock on the folder, until it is closed or its process ends; None on the other ranks.

    Raises UserError where another run has it. File systems without locks let everybody through.
    """
    held, taken = _take(run_dir, patience_s) if comm.rank == 0 else (None, "")
    taken = comm.broadcast(taken)
    if taken:
        raise UserError(
            f"{run_dir}: another run writes there ({taken}); wait for its end, end it, or choose another run_dir"
        )
    return held


def _take(run_dir: Path, patience_s: float) -> tuple[IO[str] | None, str]:
    """The lock, or who has it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / FILE).open("a+", encoding="utf-8")  # Python's files are not passed on to other programs
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _TAKEN:
                return file, ""
            if time.monotonic() < deadline_s:
                time.sleep(0.2)
                continue
            with file:
                file.seek(0)
                return None, file.read().strip() or "who, is not known"
        file.truncate(0)
        job = os.environ.get("SLURM_JOB_ID", "none")
        print(f"host {socket.gethostname()}, process {os.getpid()}, Slurm job {job}", file=file, flush=True)
        return file, ""
