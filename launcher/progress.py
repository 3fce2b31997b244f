"""Progress of long work: a bar on a terminal, else a plain line now and then; only rank 0 shows anything."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from launcher.comm import Comm

T = TypeVar("T")
_LINE_EVERY_S = 10.0


def track(iterable: Iterable[T], description: str, total: int | None = None, comm: "Comm | None" = None) -> Iterator[T]:
    """Yield from `iterable` and show how far it is. `total` defaults to its length, if it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(comm).bar(description, total) as bar:
        for item in iterable:
            yield item
            bar.advance()


class Bar:
    """One piece of work under way; this base class shows nothing (ranks above 0)."""

    def advance(self, count: int = 1) -> None:
        """`count` more items are done."""

    def update(self, text: str) -> None:
        """Show `text` (a loss, a rate, …) beside the bar."""

    def close(self) -> None:
        """The work has ended, well or badly."""


class Progress:
    """Makes bars for one rank: `with Progress(comm).bar("build", total=1000) as bar: bar.advance()`."""

    def __init__(self, comm: "Comm | None" = None, stream: TextIO | None = None) -> None:
        self._shows = comm is None or comm.rank == 0
        self._stream = stream or sys.stderr

    @contextmanager
    def bar(self, description: str, total: int | None = None) -> Iterator[Bar]:
        """A bar that counts to `total` (None: unknown) and is closed at the end of the block."""
        bar: Bar
        if not self._shows:
            bar = Bar()
        elif self._stream.isatty():
            bar = _RichBar(description, total, self._stream)
        else:
            bar = _LineBar(description, total, self._stream)
        try:
            yield bar
        finally:
            bar.close()


class _LineBar(Bar):
    """For logs: a line every ten seconds, and one at the end if there was any before it."""

    def __init__(self, description: str, total: int | None, stream: TextIO) -> None:
        self._description, self._total, self._stream = description, total, stream
        self._done, self._shown, self._text = 0, 0, ""
        self._start_s = self._shown_s = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() - self._shown_s >= _LINE_EVERY_S:
            self._show()

    def update(self, text: str) -> None:
        self._text = text

    def close(self) -> None:
        if self._shown not in (0, self._done):
            self._show()

    def _show(self) -> None:
        self._shown_s, self._shown = time.monotonic(), self._done
        elapsed_s = max(self._shown_s - self._start_s, 1e-9)
        print(line(self._description, self._done, self._total, elapsed_s, self._text), file=self._stream, flush=True)


class _RichBar(Bar):
    def __init__(self, description: str, total: int | None, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._rich = Progress(*columns, console=Console(file=stream))
        self._task = self._rich.add_task(description, total=total, text="")
        self._rich.start()

    def advance(self, count: int = 1) -> None:
        self._rich.advance(self._task, count)

    def update(self, text: str) -> None:
        self._rich.update(self._task, text=text)

    def close(self) -> None:
        self._rich.stop()


def line(description: str, done: int, total: int | None, elapsed_s: float, text: str = "") -> str:
    """One line of a log: `build: 120/1000 (12 %), 11.8/s, 1:14 left, loss 0.3`."""
    rate_per_s = done / elapsed_s
    parts = [f"{done}/{total} ({100 * done // total} %)" if total else str(done), f"{rate_per_s:.1f}/s"]
    if total and done >= total:
        parts.append(f"done in {clock(elapsed_s)}")
    elif total and done:
        parts.append(f"{clock((total - done) / rate_per_s)} left")
    return f"{description}: " + ", ".join([*parts, text] if text else parts)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
