"""A run in which a rank has gone silent does not wait for ever: it ends, and says which rank and where each one is."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

from launcher.comm import Comm
from launcher.errors import EXIT_FAILURE

_WAITING = "waits for other ranks"
_SPEAKERS = (0, 1)  # 1 where 0 is silent; if all read all notes, the store would need half a minute for 512 ranks
_COLLECTIVES = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}", f"launcher{os.sep}comm.py")


class Watchdog:
    """A thread of each rank: where its own `beat` stays out for `timeout_s` seconds, it names the silent ranks.

    A rank is silent that is neither waiting for others nor answering. The stacks of all threads go to
    `folder`/stacks-rank-N.txt, and the process ends with exit code 1. Use it as a context around the work.
    aside_s: for the other ranks' notes to arrive, and again for one to speak before all end.
    """

    def __init__(self, comm: Comm, timeout_s: float, folder: Path, aside_s: float = 4.0) -> None:
        self._comm, self._timeout_s, self._folder, self._aside_s = comm, timeout_s, folder, aside_s
        self._main = threading.main_thread().ident
        self._done = threading.Event()
        self._silent_s = 0.0

    def __enter__(self) -> "Watchdog":
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()

    def beat(self) -> None:
        """This rank gets on."""
        self._silent_s = 0.0

    def _watch(self) -> None:
        tick_s = min(1.0, self._timeout_s / 4)
        while not self._done.wait(tick_s):
            # Not by the clock: a job that `scontrol suspend` or a shell has stopped was not silent, it was not there.
            self._silent_s += tick_s
            if self._silent_s > self._timeout_s:
                self._end()

    def _end(self) -> None:
        path = self._folder / f"stacks-rank-{self._comm.rank}.txt"
        with contextlib.suppress(OSError), path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        # The notes lie with rank 0: asking for them may hang as well.
        asking = threading.Thread(target=self._name_silent, daemon=True)
        asking.start()
        asking.join(3 * self._aside_s)
        if asking.is_alive() and self._comm.rank in _SPEAKERS:
            self._say({0: "does not answer"})
        os._exit(EXIT_FAILURE)

    def _name_silent(self) -> None:
        rank, size = self._comm.rank, self._comm.size
        self._comm.post(f"watchdog/{rank}", self._whereabouts())
        time.sleep(self._aside_s)
        if rank in _SPEAKERS:
            notes = {r: self._comm.posted(f"watchdog/{r}") for r in range(size)}
            if size == 1:
                notes[0] = self._whereabouts()
            if rank == 0 or notes[0] is None:
                self._say({r: note or "does not answer" for r, note in notes.items() if note != _WAITING})
        time.sleep(self._aside_s)

    def _whereabouts(self) -> str:
        frames = traceback.extract_stack(sys._current_frames()[self._main or 0])
        if any(part in frame.filename for frame in frames for part in _COLLECTIVES):
            return _WAITING
        return f"is at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].name})"

    def _say(self, silent: dict[int, str]) -> None:
        who = "; ".join(f"rank {rank} {where}" for rank, where in silent.items()) or "all ranks wait for each other"
        print(
            f"no step for {self._timeout_s:g} s: {who}; stacks are in {self._folder}/stacks-rank-*.txt",
            file=sys.stderr,
            flush=True,
        )
