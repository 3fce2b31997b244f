"""One run at a time writes into a run folder."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogvlm_hpe.train import hold as holding
from cogvlm_hpe.train.hold import hold
from launcher.comm import single
from launcher.errors import UserError

HOLDS = """
import os, subprocess, sys, time
from pathlib import Path
from cogvlm_hpe.train.hold import hold
from launcher.comm import single
held = hold(Path(sys.argv[1]), single())
heir = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, close_fds=False)
print(os.getpid(), heir.pid, flush=True)
time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """Gone by kill -9, while a program that it has started lives on."""
    job = os.environ | {"SLURM_JOB_ID": "77"}
    words = [sys.executable, "-c", HOLDS, tmp_path / "run"]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, env=job, text=True)
    assert first.stdout is not None
    pid, heir = map(int, first.stdout.readline().split())
    try:
        with pytest.raises(UserError, match=f"run: another run writes there .*process {pid}, Slurm job 77"):
            hold(tmp_path / "run", single(), patience_s=0.3)
        first.kill()
        held = hold(tmp_path / "run", single())
        assert held is not None and f"process {os.getpid()}" in (tmp_path / "run" / holding.FILE).read_text()
        held.close()
        second = hold(tmp_path / "run", single(), patience_s=0.0)
        assert second is not None
        second.close()
    finally:
        first.kill()
        first.communicate()
        os.kill(heir, 9)


def test_a_run_that_is_just_going_is_waited_for(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    heir = int(first.stdout.readline().split()[1])
    end = subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -9 {first.pid}"])
    start_s = time.monotonic()
    held = hold(tmp_path / "run", single())
    assert held is not None and time.monotonic() - start_s > 0.3
    held.close()
    for process in (end, first):
        process.communicate()
    os.kill(heir, 9)


def test_a_file_system_without_locks_lets_everybody_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for _ in range(2):
        held = hold(tmp_path, single())
        assert held is not None
        held.close()
