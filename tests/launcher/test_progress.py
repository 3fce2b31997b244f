"""What a log shows of long work, and what a terminal shows."""

import io
import subprocess
import sys
from dataclasses import dataclass

import pytest

from launcher import progress
from launcher.comm import Comm
from launcher.progress import Progress, line, track


@dataclass
class Rank(Comm):
    rank: int = 0
    size: int = 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("done", "total", "elapsed_s", "text", "said"),
    [
        (120, 1000, 10.0, "loss 0.3", "build: 120/1000 (12 %), 12.0/s, 1:13 left, loss 0.3"),
        (0, 1000, 10.0, "", "build: 0/1000 (0 %), 0.0/s"),
        (7, None, 2.0, "", "build: 7, 3.5/s"),
        (10, 10, 7200.0, "", "build: 10/10 (100 %), 0.0/s, done in 2:00:00"),
    ],
)
def test_line(done: int, total: int | None, elapsed_s: float, text: str, said: str) -> None:
    assert line("build", done, total, elapsed_s, text) == said


def test_log_lines_come_seldom_and_the_last_one_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = iter(range(0, 10_000, 3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock_s)))
    stream = io.StringIO()
    with Progress(Rank(0), stream).bar("read", 100) as bar:
        for _ in range(100):
            bar.advance()
    lines = stream.getvalue().splitlines()
    assert 10 < len(lines) < 50
    assert lines[-1].startswith("read: 100/100 (100 %)")
    assert len(set(lines)) == len(lines)


def test_short_work_and_other_ranks_say_nothing() -> None:
    stream = io.StringIO()
    for rank in (0, 1):
        with Progress(Rank(rank), stream).bar("read", 2) as bar:
            bar.advance(2)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress(stream=stream).bar("read", 2) as bar:
        bar.update("loss 0.25")
        bar.advance(2)
    assert "2/2" in stream.getvalue() and "loss 0.25" in stream.getvalue()


def test_track_yields_everything_in_order() -> None:
    assert list(track(iter("abc"), "letters")) == ["a", "b", "c"]


def test_logs_need_no_rich() -> None:
    code = "import sys; from launcher.progress import track; list(track([1], 'x')); sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE).returncode == 0
