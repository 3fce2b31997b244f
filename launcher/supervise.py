"""Signals, on both sides: `Supervisor` passes them on to every rank and leaves none behind, `StopFlag` hears them.

A crashed training run is started again from its last checkpoint, unless it crashes in a loop.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from launcher.command import Command
from launcher.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USAGE

if TYPE_CHECKING:
    from launcher.status import Progress

STOP_SIGNALS = tuple(
    number
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    # Under nohup SIGHUP is ignored when a program starts, so that its work goes on after a logout.
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
)
_GRACE_S = 5.0
_SAVE_S = 30.0
_AGAIN_S = 1.0
_LOOP = 2  # starts in a row that crash without a new checkpoint
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


class Supervisor:
    """Starts ranks, and passes on to them whatever of STOP_SIGNALS arrives; one that comes while there are none counts.

    Use it as a context. With `graceful` a request arrives at the ranks as SIGUSR1, which asks a training run to save
    and leave; a second one is SIGTERM, a third SIGKILL. Without, it is passed on as it is.
    """

    def __init__(self, *, graceful: bool) -> None:
        self._graceful = graceful
        self._requests: list[int] = []
        self._ranks: _Ranks | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Supervisor":
        self._before = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether there has been a request to stop."""
        return bool(self._requests)

    def run(self, command: Command) -> int:
        """Run `command` to its end; the exit code: 0, 1, 2, or 85 where the ranks stopped on request."""
        if self._graceful and self.asked:
            return EXIT_STOPPED
        self._ranks = _Ranks(command)
        if self.asked:  # since the line above
            self._pass_on()
        code = self._wait(self._ranks)
        left_over = self._ranks.end_all()
        self._ranks = None
        if code == 0 and left_over:
            # DeepSpeed's outer launcher returns 0 when its inner one was killed.
            _say("the launcher ended before its ranks, which were ended too: the run is not complete")
            return EXIT_FAILURE
        if code in (0, EXIT_FAILURE, EXIT_USAGE, EXIT_STOPPED):
            return code
        _say(f"the ranks ended with {describe(code)}; see the messages above and the run's log")
        return EXIT_FAILURE

    def _wait(self, ranks: "_Ranks") -> int:
        """The launcher's exit code. A request is said again: ranks that are starting do not listen yet."""
        while (code := ranks.wait(_AGAIN_S)) is None:
            if ranks.ignore_usr1 and self._graceful and len(self._requests) == 1:
                self._pass_on()
        return code

    def run_again(self, start: Callable[[bool], Command], progress: "Callable[[], Progress]", bound: int) -> int:
        """Run start(False), and as long as crashes are bad luck start(True), which resumes; the last one's exit code.

        At most `bound` times again. progress() tells how far the run is.
        """
        restarts = in_vain = 0
        now = progress()
        while True:
            code = self.run(start(restarts > 0))
            if code != EXIT_FAILURE or self.asked:
                return code
            before, now = now, progress()
            in_vain = 0 if now.saved > before.saved else in_vain + 1
            stepped = now.starts > before.starts and now.made > now.saved
            reason = why_not_again(restarts, in_vain, stepped, now.saved, bound)
            if reason is not None:
                if restarts:
                    _say(f"not started again: {reason}; `hpe-launch train … --resume` goes on after step {now.saved}")
                return code
            restarts += 1
            _say(f"the run crashed after step {now.made}: start {restarts + 1}, from step {now.saved}")

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._requests.append(number)
        if self._ranks is not None:
            self._pass_on()
        if self._graceful and len(self._requests) == 1:
            _say(f"{signal.Signals(number).name}: asking the ranks to save and stop; once more to end them now")

    def _pass_on(self) -> None:
        assert self._ranks is not None
        harder = (signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL)
        self._ranks.signal(harder[min(len(self._requests), 3) - 1] if self._graceful else self._requests[-1])


def run(command: Command, *, graceful: bool) -> int:
    """Run `command` to its end under a Supervisor; the exit code."""
    with Supervisor(graceful=graceful) as supervisor:
        return supervisor.run(command)


def why_not_again(restarts: int, in_vain: int, stepped: bool, saved: int, bound: int) -> str | None:
    """Why a crashed run is not started again; None where it is.

    `in_vain`: starts in a row that crashed without a new checkpoint, the last of which has `stepped` or not. Once may
    be chance, if the run ever makes a step; twice is not.
    """
    if in_vain >= _LOOP:
        return f"{in_vain} starts in a row crashed before a checkpoint after step {saved}, which is no bad luck"
    if restarts >= bound:
        return f"it has been {restarts} times already (--max-restarts)"
    if in_vain and not restarts and not stepped:
        return "it made no step"
    return None


def describe(code: int) -> str:
    """An exit code in words: -9, 137 and 247 are all a process killed by signal 9, but 255 is what many end with."""
    for number in (-code, code - 128, 256 - code):
        if 0 < number <= 31 and code != 255:
            return f"exit code {code} (killed by {signal.Signals(number).name})"
    return f"exit code {code}"


class _Ranks:
    """The launcher and all it starts: one process group, so that one call reaches all."""

    def __init__(self, command: Command) -> None:
        def before_exec() -> None:
            if command.ignores_usr1:
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)

        self.ignore_usr1 = command.ignores_usr1  # until they listen
        # Orphans become our children, so that dead ones can be reaped and told from living ones.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._launcher = subprocess.Popen(
            command.argv,
            env=os.environ | command.env,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=before_exec,
        )
        self._guard = _guard(self._launcher.pid)

    def wait(self, timeout_s: float) -> int | None:
        """The exit code; None where it has not ended by then."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._launcher.wait(timeout_s)
        return None

    def end_all(self) -> bool:
        """End what is left of the group; whether there was something that did not leave by itself."""
        alone = self._gone_within(_GRACE_S)
        if not alone:
            self.signal(signal.SIGTERM)
            if not self._gone_within(_SAVE_S):
                self.signal(signal.SIGKILL)
        self._guard.kill()
        self._guard.communicate()
        return not alone

    def _gone_within(self, seconds: float) -> bool:
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-self._launcher.pid, os.WNOHANG)[0]:
                    pass
            if not self.signal(0):
                return True
            time.sleep(0.1)
        return False

    def signal(self, number: int) -> bool:
        """Signal the whole group; whether there is any of it."""
        try:
            os.killpg(self._launcher.pid, number)
        except ProcessLookupError:
            return False
        return True


def _guard(group: int) -> "subprocess.Popen[bytes]":
    """A process that ends `group` once we are dead, however we died: the pipe to it breaks then."""
    wait = f"for i in $(seq {_SAVE_S:.0f}); do kill -s 0 -- -{group} || exit; sleep 1; done"
    words = ["sh", "-c", f"read _; kill -s TERM -- -{group}; {wait}; kill -s KILL -- -{group}"]
    null = subprocess.DEVNULL
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=null, stderr=null, process_group=0)


def _say(message: str) -> None:
    print(f"hpe-launch: {message}", file=sys.stderr, flush=True)
