"""An evaluation that outlives its ranks: finished batches on disk, and a watch that names the rank the others wait for.

`OUT.unfinished/` lies beside the result and goes when that is complete: `job.json` says what is judged,
`batch-NNNNNNNN.json` holds a batch's rows of each system, `rank-NNNN.json` how far a rank has come.

A rank that is killed takes all others with it at once (MPICH sends SIGKILL, which nobody can answer), so who is who and
how to go on is said before: MPICH then names host and process, Open MPI and srun the rank too.
"""

import json
import os
import platform
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cogvlm_hpe.evaluate.summary import Row
from launcher import errors
from launcher.comm import Comm
from launcher.errors import UsageError, UserError
from launcher.files import write_json_atomic

SUFFIX = ".unfinished"
_JOB = "job.json"
_POLLS_PER_TIMEOUT = 20
_NAMED = 8
_say = partial(print, flush=True)  # what waits in a buffer is lost when the rank is killed


class Unfinished:
    """The folder of one job. Made by `begin`; all ranks see the same folder."""

    def __init__(self, folder: Path, comm: Comm, done: Sequence[int]) -> None:
        self.folder, self.done = folder, sorted(done)
        self._comm, self._rounds = comm, 0

    def keep(self, batch: int, rows: Sequence[Sequence[Row]]) -> None:
        """A batch of this rank is judged: its rows, one list a system."""
        write_json_atomic(self.folder / f"batch-{batch:08d}.json", rows)

    def read(self, batch: int) -> list[list[Row]]:
        """What was kept of a batch. Raises UserError where it is damaged."""
        path = self.folder / f"batch-{batch:08d}.json"
        try:
            rows: list[list[Row]] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); remove it, and --resume judges that batch anew"
            ) from None
        return rows

    def arrive(self, rounds: int) -> None:
        """This rank has done its part of so many rounds."""
        state = {"rounds": rounds, **_here(), "ranks": self._comm.size}
        write_json_atomic(self.folder / f"rank-{self._comm.rank:04d}.json", state)

    def remove(self) -> None:
        """The result is complete; called on rank 0."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def watch(self, timeout_s: float) -> Iterator[None]:
        """All ranks. Say which process each of several is; end the job when no rank has moved for `timeout_s`, and say
        whom it waited for.
        """
        if self._comm.size == 1:
            yield
            return
        over = threading.Event()
        if self._comm.rank == 0:
            threading.Thread(target=self._watch, args=(timeout_s, over), daemon=True).start()
        try:
            self._introduce()
            yield
        finally:
            over.set()

    def _introduce(self) -> None:
        everyone = self._comm.gather(_here())
        if everyone is not None:
            _say(f"judged by {processes(dict(enumerate(everyone)))}")
            how = "should a rank die, the same command with --resume judges only what is left"
            _say(f"batches are kept in {self.folder}; {how}")

    def _watch(self, timeout_s: float, over: threading.Event) -> None:
        seen, polls = "", 0  # not by the clock: a job that was suspended has not stood still
        while not over.wait(timeout_s / _POLLS_PER_TIMEOUT):
            states, polls = _states(self.folder), polls + 1
            now = repr(states)
            if now != seen:
                seen, polls = now, 0
            elif polls > _POLLS_PER_TIMEOUT:
                errors.leave(late(states, self._comm.size, timeout_s), errors.EXIT_FAILURE)
                return


def begin(out: Path, job: dict[str, Any], resume: bool, comm: Comm) -> Unfinished:
    """All ranks. A new folder for `job`, or with `resume` the one that is there, with the batches done in it.

    Raises UsageError where there is one and `resume` is not given, or where it is of another job.
    """
    folder = out.with_name(out.name + SUFFIX)
    done: list[int] = []
    if comm.rank == 0:
        _check(folder, job, resume)
        done = [int(path.stem.partition("-")[2]) for path in folder.glob("batch-*.json")]
        if done:
            states = _states(folder)
            before = f" by {processes(states)}" if states else ""
            _say(f"resumed: {len(done)} batches were judged before{before}; {behind(states)}")
        for path in folder.glob("rank-*.json"):
            path.unlink()
    unfinished = Unfinished(folder, comm, comm.broadcast(done))
    unfinished.arrive(0)
    return unfinished


def _here() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid()}


def _check(folder: Path, job: dict[str, Any], resume: bool) -> None:
    path = folder / _JOB
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, job)
        return
    if not resume:
        raise UsageError(f"{folder}: an unfinished evaluation; go on with it by --resume, or remove the folder")
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in job if before.get(key) != json.loads(json.dumps(job[key]))]
    if changed:
        raise UsageError(f"--resume: {', '.join(changed)} changed since {folder} was begun; set it back, or remove it")


def _states(folder: Path) -> dict[int, dict[str, Any]]:
    states = {}
    for path in sorted(folder.glob("rank-*.json")):
        try:
            states[int(path.stem.partition("-")[2])] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # being replaced just now, on a file system whose rename is not atomic everywhere
    return states


def late(states: dict[int, dict[str, Any]], ranks: int, timeout_s: float) -> str:
    """One line that names the ranks which all others wait for."""
    missing = [rank for rank in range(ranks) if rank not in states]
    who = f"{_counted(missing)}, not started" if missing else behind(states)
    return f"no rank has moved for {timeout_s:g} s; {who}; the same command with --resume judges only what is left"


def processes(states: dict[int, dict[str, Any]]) -> str:
    """Which process each rank is, as launchers name them: `rank 0 (host n2, pid 71), rank 1 (host n2, pid 72)`."""
    named = [f"rank {rank} (host {state['host']}, pid {state['pid']})" for rank, state in states.items()]
    more = f" and {len(named) - _NAMED} more (rank-NNNN.json)" if len(named) > _NAMED else ""
    return ", ".join(named[:_NAMED]) + more


def behind(states: dict[int, dict[str, Any]]) -> str:
    """Which ranks have come least far: `last was rank 3 (host n2, pid 71) after 4 rounds, others had done up to 9`."""
    if not states:
        return "no rank had begun its share"
    rounds = {rank: state["rounds"] for rank, state in states.items()}
    least, most = min(rounds.values()), max(rounds.values())
    if least == most:
        return f"all {len(states)} ranks had done {least} rounds"
    slow = [rank for rank, count in rounds.items() if count == least]
    first = states[slow[0]]
    more = "" if len(slow) == 1 else f", then {_counted(slow[1:])}"
    place = f"host {first['host']}, pid {first['pid']}"
    return f"last was rank {slow[0]} ({place}{more}) after {least} rounds, others had done up to {most}"


def _counted(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:_NAMED]))
    rest = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{rest}"
