"""Signals reach every rank, and none outlives the run: with plain processes, and with DeepSpeed's real launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import command, supervise, world
from launcher.command import Command

HERE = Path(__file__).parent
STOPPABLE = HERE / "stoppable.py"
SUPERVISOR = """
import json, sys
from launcher import supervise
from launcher.command import Command
argv, env, ignores, graceful = json.loads(sys.argv[1])
sys.exit(supervise.run(Command(argv, env, ignores), graceful=graceful))
"""


def start(made: Command, graceful: bool = True) -> "subprocess.Popen[str]":
    import json

    what = json.dumps([made.argv, made.env, made.ignores_usr1, graceful])
    return subprocess.Popen([sys.executable, "-c", SUPERVISOR, what], stderr=subprocess.PIPE, text=True)


def wait_for(out: Path, names: set[str]) -> None:
    deadline_s = time.monotonic() + 90
    while not names <= {path.name for path in out.iterdir()}:
        assert time.monotonic() < deadline_s, f"no {names} in {out}"
        time.sleep(0.1)


def alive(out: Path) -> list[int]:
    pids = [int(path.read_text()) for path in out.glob("*.pid")]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def rank(out: Path, way: str) -> Command:
    return Command([sys.executable, str(STOPPABLE), str(out), way])


def deepspeed(out: Path, way: str) -> Command:
    env = command.accelerator_env() | {"PYTHONPATH": str(HERE)}
    program = command.find_program("deepspeed", "")
    port = world.free_port()
    return command.deepspeed("stoppable", [str(out), way], ranks=2, port=port, threads=1, env=env, program=program)


@pytest.mark.parametrize(("code", "passed_on"), [(0, 0), (1, 1), (2, 2), (85, 85), (3, 1), (247, 1)])
def test_exit_codes(code: int, passed_on: int, tmp_path: Path) -> None:
    assert supervise.run(rank(tmp_path, f"exit-{code}"), graceful=True) == passed_on


@pytest.mark.parametrize("code", [-9, 137, 247])
def test_killed_is_said_in_words(code: int) -> None:
    assert "SIGKILL" in supervise.describe(code)


@pytest.mark.parametrize("number", supervise.STOP_SIGNALS)
def test_every_stop_signal_asks_the_ranks_to_save(number: signal.Signals, tmp_path: Path) -> None:
    run = start(rank(tmp_path, "work"))
    wait_for(tmp_path, {"0.pid"})
    run.send_signal(number)
    assert run.wait(timeout=30) == 85
    assert (tmp_path / "0.saved").exists()


def test_a_second_request_after_the_save_does_not_spoil_it(tmp_path: Path) -> None:
    run = start(rank(tmp_path, "linger"))
    wait_for(tmp_path, {"0.pid"})
    run.send_signal(signal.SIGUSR1)
    wait_for(tmp_path, {"0.saved"})
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=30) == 85


def test_ranks_that_do_not_listen_end_at_the_second_request(tmp_path: Path) -> None:
    made = Command(["bash", "-c", f"trap '' USR1; exec {sys.executable} {STOPPABLE} {tmp_path} deaf"])
    run = start(made)
    wait_for(tmp_path, {"0.pid"})
    run.send_signal(signal.SIGINT)
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=30) == 1
    assert alive(tmp_path) == []


def test_without_grace_the_signal_itself_is_passed_on(tmp_path: Path) -> None:
    run = start(rank(tmp_path, "deaf"), graceful=False)
    wait_for(tmp_path, {"0.pid"})
    run.terminate()
    assert run.wait(timeout=30) == 1
    assert run.stderr is not None and "SIGTERM" in run.stderr.read()


def test_a_launcher_that_leaves_its_ranks_behind_has_failed(tmp_path: Path) -> None:
    run = start(Command(["bash", "-c", f"{sys.executable} {STOPPABLE} {tmp_path} work & sleep 1"]))
    assert run.wait(timeout=60) == 1
    assert alive(tmp_path) == []
    assert run.stderr is not None and "ended before its ranks" in run.stderr.read()


@pytest.mark.slow
def test_deepspeed_stops_on_request_with_85(tmp_path: Path) -> None:
    run = start(deepspeed(tmp_path, "work"))
    wait_for(tmp_path, {"0.pid", "1.pid"})
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 85
    assert (tmp_path / "0.saved").exists() and (tmp_path / "1.saved").exists()
    assert alive(tmp_path) == []


@pytest.mark.slow
def test_deepspeed_with_a_killed_rank_fails_and_leaves_nobody(tmp_path: Path) -> None:
    run = start(deepspeed(tmp_path, "work"))
    wait_for(tmp_path, {"0.pid", "1.pid"})
    os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
    assert run.wait(timeout=60) == 1
    assert alive(tmp_path) == []
    assert run.stderr is not None and "SIGKILL" in run.stderr.read()


@pytest.mark.slow
def test_deepspeed_inner_launcher_killed_is_no_success(tmp_path: Path) -> None:
    run = start(deepspeed(tmp_path, "work"))
    wait_for(tmp_path, {"0.pid", "1.pid"})
    pid = int((tmp_path / "0.pid").read_text())
    inner = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(inner, signal.SIGKILL)
    assert run.wait(timeout=60) == 1
    assert alive(tmp_path) == []
