"""Signals reach every rank, and none outlives the run: with plain processes, and with DeepSpeed's real launcher."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ports import next_port

from launcher import command, supervise
from launcher.command import Command
from launcher.status import Progress

HERE = Path(__file__).parent
STOPPABLE = HERE / "stoppable.py"
SUPERVISOR = """
import json, sys
from launcher import supervise
from launcher.command import Command
argv, env, ignores, graceful, restarts = json.loads(sys.argv[1])
from itertools import count
from launcher.status import Progress
starts = count()
with supervise.Supervisor(graceful=graceful) as supervisor:
    progress = lambda: Progress(next(starts), 0, 1)
    sys.exit(supervisor.run_again(lambda resume: Command(argv, env, ignores), progress, restarts))
"""


def start(made: Command, graceful: bool = True, restarts: int = 0) -> "subprocess.Popen[str]":
    what = json.dumps([made.argv, made.env, made.ignores_usr1, graceful, restarts])
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
    port, words = next_port(), [str(out), way]
    return command.deepspeed("stoppable", words, ranks=2, port=port, threads=1, env=env, program=program)


@pytest.mark.parametrize(("code", "passed_on"), [(0, 0), (1, 1), (2, 2), (85, 85), (3, 1), (247, 1)])
def test_exit_codes(code: int, passed_on: int, tmp_path: Path) -> None:
    assert supervise.run(rank(tmp_path, f"exit-{code}"), graceful=True) == passed_on


@pytest.mark.parametrize("code", [-9, 137, 247])
def test_killed_is_said_in_words(code: int) -> None:
    assert "SIGKILL" in supervise.describe(code)


def test_255_is_nobody_killed() -> None:
    assert supervise.describe(255) == "exit code 255"
    assert "SIGHUP" in supervise.describe(129)


@pytest.mark.parametrize("number", supervise.STOP_SIGNALS)
def test_every_stop_signal_asks_the_ranks_to_save(number: signal.Signals, tmp_path: Path) -> None:
    run = start(rank(tmp_path, "work"))
    wait_for(tmp_path, {"0.pid"})
    run.send_signal(number)
    assert run.wait(timeout=30) == 85
    assert (tmp_path / "0.saved").exists()


def test_under_nohup_a_logout_changes_nothing(tmp_path: Path) -> None:
    what = json.dumps([*dataclasses.astuple(rank(tmp_path, "work")), True, 0])
    words = ["bash", "-c", 'trap "" HUP; exec "$@"', "bash", sys.executable, "-c", SUPERVISOR, what]
    run = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path, {"0.pid"})
    for pid in (run.pid, *alive(tmp_path)):
        os.kill(pid, signal.SIGHUP)
    time.sleep(0.5)
    assert run.poll() is None and not (tmp_path / "0.saved").exists()
    run.terminate()
    assert run.wait(timeout=30) == 85


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
    assert run.stderr is not None and any("asking the ranks" in line for line in run.stderr)  # else the two are one
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


def test_a_killed_supervisor_leaves_nobody(tmp_path: Path) -> None:
    run = start(rank(tmp_path, "work"))
    wait_for(tmp_path, {"0.pid"})
    run.kill()
    run.wait()
    wait_for(tmp_path, {"0.saved"})
    deadline_s = time.monotonic() + 30
    while any(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in alive(tmp_path)):  # nobody may reap it
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_a_request_before_there_are_ranks_counts() -> None:
    with supervise.Supervisor(graceful=True) as supervisor:
        signal.raise_signal(signal.SIGTERM)
        assert supervisor.asked
        assert supervisor.run(Command(["false"])) == 85


class Starting:
    """Ranks that take minutes to listen: they leave when they have been asked three times."""

    ignore_usr1, asked = True, 0

    def wait(self, _: float) -> int | None:
        return 85 if self.asked == 3 else None

    def signal(self, _: int) -> None:
        self.asked += 1


def test_a_request_is_said_again_however_long_ranks_take_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", itertools.count(0.0, 100.0).__next__)
    with supervise.Supervisor(graceful=True) as supervisor:
        signal.raise_signal(signal.SIGTERM)
        supervisor._ranks = Starting()  # type: ignore[assignment]
        assert supervisor._wait(supervisor._ranks) == 85  # type: ignore[arg-type]


def crash(*crashes: tuple[int, int], bound: int = 3, code: int = 1, begins: bool = True) -> tuple[int, int]:
    """A run of 100 steps; each crash is (step saved, step made) by then. Exit code of the last start, and starts."""
    now, starts = Progress(0, 0, 0), 0

    def command(resume: bool) -> Command:
        nonlocal now, starts
        assert resume == (starts > 0)
        ends = starts >= len(crashes)
        saved, made = (100, 100) if ends else crashes[starts]
        starts += 1
        now = Progress(starts if begins else 0, saved, made)
        return Command(["bash", "-c", f"exit {0 if ends else code}"])

    with supervise.Supervisor(graceful=True) as supervisor:
        return supervisor.run_again(command, lambda: now, bound), starts


@pytest.mark.parametrize(
    ("crashes", "ends"),
    [
        ([], (0, 1)),
        ([(20, 25), (40, 47)], (0, 3)),
        ([(0, 7)], (0, 2)),  # nothing saved yet
        ([(20, 25), (20, 25)], (0, 3)),  # once without a new checkpoint may be chance
        ([(20, 25), (20, 25), (20, 27)], (1, 3)),  # twice is not
        ([(20, 25), (20, 20), (20, 20)], (1, 3)),
        ([(0, 0)], (1, 1)),  # it never made a step: a mistake
        ([(10, 10), (20, 20), (30, 30), (40, 40), (50, 50)], (1, 4)),
    ],
)
def test_a_crashed_run_is_started_again_unless_it_loops(crashes: list[tuple[int, int]], ends: tuple[int, int]) -> None:
    assert crash(*crashes) == ends


def test_a_run_is_not_started_again_where_nobody_wants_it() -> None:
    assert crash((20, 25), bound=0) == (1, 1)
    assert crash((0, 5), begins=False) == (1, 1), "refused, over a run that was there before"
    assert [crash((20, 25), code=code)[1] for code in (2, 85)] == [1, 1], "mistakes and stops are no crashes"
    with supervise.Supervisor(graceful=True) as supervisor:
        asked = Command(["bash", "-c", "trap 'exit 1' USR1; kill -TERM $PPID; while :; do sleep 0.1; done"])
        assert supervisor.run_again(lambda resume: asked, lambda: Progress(1, 20, 25), 3) == 1, (
            "asked, it crashed while saving"
        )


def test_why_it_is_not_started_again_is_said() -> None:
    why = supervise.why_not_again
    assert why(1, 1, True, 20, 3) is None
    assert "2 starts in a row" in str(why(1, 2, True, 20, 3)) and "--max-restarts" in str(why(3, 0, True, 20, 3))


@pytest.mark.slow
def test_deepspeed_stops_on_request_with_85(tmp_path: Path) -> None:
    run = start(deepspeed(tmp_path, "work"))
    wait_for(tmp_path, {"0.pid", "1.pid"})
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 85
    assert (tmp_path / "0.saved").exists() and (tmp_path / "1.saved").exists()
    assert alive(tmp_path) == []


@pytest.mark.slow
def test_deepspeed_stops_on_a_request_before_its_ranks_listen(tmp_path: Path) -> None:
    run = start(deepspeed(tmp_path, "work"))
    started_s = time.monotonic()
    while not psutil.Process(run.pid).children():
        assert time.monotonic() < started_s + 30
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert not list(tmp_path.iterdir()), "no rank is there yet"
    assert run.wait(timeout=90) == 85
    assert (tmp_path / "0.saved").exists() and (tmp_path / "1.saved").exists()


@pytest.mark.slow
def test_deepspeed_with_a_killed_rank_is_started_again_and_leaves_nobody(tmp_path: Path) -> None:
    run = start(deepspeed(tmp_path, "twice"), restarts=1)
    wait_for(tmp_path, {"0.pid", "1.pid"})
    first = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    (tmp_path / "killed").touch()
    os.kill(first[1], signal.SIGKILL)
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 0, said
    assert "SIGKILL" in said and "start 2, from step 0" in said
    assert alive(tmp_path) == [] and not any(Path(f"/proc/{pid}").exists() for pid in first)


@pytest.mark.slow
def test_deepspeed_inner_launcher_killed_is_no_success(tmp_path: Path) -> None:
    run = start(deepspeed(tmp_path, "work"))
    wait_for(tmp_path, {"0.pid", "1.pid"})
    pid = int((tmp_path / "0.pid").read_text())
    inner = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(inner, signal.SIGKILL)
    assert run.wait(timeout=60) == 1
    assert alive(tmp_path) == []
