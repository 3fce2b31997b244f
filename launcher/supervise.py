"""Signals, on both sides: `run` passes them on to every rank and leaves none behind, `StopFlag` hears them."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from launcher.command import Command
from launcher.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USAGE

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_GRACE_S = 5.0
_SAVE_S = 30.0
_PR_SET_CHILD_SUBREAPER = 36


class StopFlag:
    """What a rank knows of requests to stop. Made first of all in a program, before its slow imports.

    Ranks hear of a request at different times, so they agree on it (`Comm.agree`) at a step's border.
    """

    def __init__(self) -> None:
        self.raised = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._raise)

    def _raise(self, _number: int, _frame: FrameType | None) -> None:
        self.raised = True

    def leave(self) -> None:
        """All is saved: from here to the end of the process a request changes nothing, not even the exit code."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def run(command: Command, *, graceful: bool) -> int:
    """Run `command` to its end; the exit code: 0, 1, 2, or 85 where the ranks stopped on request.

    Any of STOP_SIGNALS reaches all ranks. With `graceful` it arrives there as SIGUSR1, which asks a training run to
    save and leave; a second one is SIGTERM, a third SIGKILL. Without, it is passed on as it is.
    """
    started = _Ranks(command, graceful)
    before = {number: signal.signal(number, started.stop) for number in STOP_SIGNALS}
    try:
        code = started.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    left_over = started.end_all()
    if code == 0 and left_over:
        # DeepSpeed's outer launcher returns 0 when its inner one was killed.
        _say("the launcher ended before its ranks, which were ended too: the run is not complete")
        return EXIT_FAILURE
    if code in (0, EXIT_FAILURE, EXIT_USAGE, EXIT_STOPPED):
        return code
    _say(f"the ranks ended with {describe(code)}; see the messages above and the run's log")
    return EXIT_FAILURE


def describe(code: int) -> str:
    """An exit code in words: -9, 137 and 247 are all a process killed by signal 9."""
    for number in (-code, code - 128, 256 - code):
        if 0 < number <= 31:
            return f"exit code {code} (killed by {signal.Signals(number).name})"
    return f"exit code {code}"


class _Ranks:
    """The launcher and all it starts: one process group, so that one call reaches all."""

    def __init__(self, command: Command, graceful: bool) -> None:
        self._graceful = graceful
        self._requests = 0

        def before_exec() -> None:
            if command.ignores_usr1:
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)

        # Orphans become our children, so that dead ones can be reaped and told from living ones.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._launcher = subprocess.Popen(
            command.argv,
            env=os.environ | command.env,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=before_exec,
        )

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: pass the request on."""
        self._requests += 1
        if not self._graceful:
            self._signal(number)
            return
        self._signal((signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL)[min(self._requests, 3) - 1])
        if self._requests == 1:
            _say(f"{signal.Signals(number).name}: asking the ranks to save and stop; once more to end them now")

    def wait(self) -> int:
        return self._launcher.wait()

    def end_all(self) -> bool:
        """End what is left of the group; whether there was something that did not leave by itself."""
        if self._gone_within(_GRACE_S):
            return False
        self._signal(signal.SIGTERM)
        if not self._gone_within(_SAVE_S):
            self._signal(signal.SIGKILL)
        return True

    def _gone_within(self, seconds: float) -> bool:
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-self._launcher.pid, os.WNOHANG)[0]:
                    pass
            if not self._signal(0):
                return True
            time.sleep(0.1)
        return False

    def _signal(self, number: int) -> bool:
        try:
            os.killpg(self._launcher.pid, number)
        except ProcessLookupError:
            return False
        return True


def _say(message: str) -> None:
    print(f"hpe-launch: {message}", file=sys.stderr, flush=True)
