"""A rank that has gone silent is named, and nobody waits for ever."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import next_port

from launcher.comm import Comm
from launcher.watchdog import Watchdog

WATCHED = Path(__file__).with_name("watched.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("silent", "how", "said"),
    [(1, "asleep", r"rank 1 is at .*watched\.py:15 \(fall_asleep\);"), (0, "stopped", "rank 0 does not answer;")],
)
def test_hung_rank_is_named(tmp_path: Path, silent: int, how: str, said: str) -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WATCHED), str(tmp_path), str(silent), how],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        waiting = ranks[1 - silent]
        heard = waiting.communicate(timeout=180)[1]
        heard += ranks[silent].communicate(timeout=60)[1] if how == "asleep" else ""
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert waiting.returncode == 1
    lines = [line for line in heard.splitlines() if line.startswith("no step for 2 s")]
    assert len(lines) == 1 and re.search(said, lines[0]) and f"rank {1 - silent} " not in lines[0]
    assert "launcher/comm.py" in (tmp_path / f"stacks-rank-{1 - silent}.txt").read_text()


class Notes(Comm):
    """Rank `rank` of four; `notes` are what ranks have posted, `reads` which of them were asked for."""

    def __init__(self, rank: int, notes: dict[str, str]) -> None:
        self.rank, self.size, self.notes, self.reads = rank, 4, notes, 0

    def post(self, key: str, text: str) -> None:
        self.notes[key] = text

    def posted(self, key: str) -> str | None:
        self.reads += 1
        return self.notes.get(key)


@pytest.mark.parametrize(("silent", "speaker"), [(3, 0), (0, 1)])
def test_two_ranks_read_the_notes_and_one_speaks(
    silent: int, speaker: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = {f"watchdog/{rank}": "waits for other ranks" for rank in range(4) if rank != silent}
    comms = [Notes(rank, notes) for rank in range(4) if rank != silent]
    for comm in comms:
        Watchdog(comm, 2.0, tmp_path, aside_s=0.0)._name_silent()
        notes[f"watchdog/{comm.rank}"] = "waits for other ranks"
        assert ("does not answer" in capsys.readouterr().err) == (comm.rank == speaker)
    assert [comm.reads for comm in comms if comm.rank > 1] == [0] * sum(comm.rank > 1 for comm in comms)


SUSPENDED = """
import sys, time
from pathlib import Path
from launcher.comm import single
from launcher.watchdog import Watchdog
with Watchdog(single(), 3.0, Path(sys.argv[1])):
    print("begun", flush=True)
    for _ in range(10):
        time.sleep(0.1)
print("through")
"""


def test_a_suspended_job_was_not_silent(tmp_path: Path) -> None:
    """As `scontrol suspend` does: stopped for longer than the timeout, then continued."""
    process = subprocess.Popen([sys.executable, "-c", SUSPENDED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "through\n"
    assert process.returncode == 0 and not list(tmp_path.iterdir())
