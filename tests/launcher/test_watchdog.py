"""A rank that has gone silent is named, and nobody waits for ever."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.world import free_port

WATCHED = Path(__file__).with_name("watched.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("silent", "how", "said"),
    [(1, "asleep", r"rank 1 is at .*watched\.py:15 \(fall_asleep\);"), (0, "stopped", "rank 0 does not answer;")],
)
def test_hung_rank_is_named(tmp_path: Path, silent: int, how: str, said: str) -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
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
