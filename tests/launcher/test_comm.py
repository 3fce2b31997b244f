"""Comm over real processes: two under mpirun, two over gloo."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ports import next_port

from launcher import comm, world
from launcher.errors import UserError

RANKS = Path(__file__).with_name("ranks.py")
MPIRUN = Path(sys.executable).with_name("mpirun")
ROOT = RANKS.parents[2]


def clean_env(**more: str) -> dict[str, str]:
    ours = tuple(world.export(world.discover({})))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI_", "MPI_", "OMPI_", *ours))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def check_two_ranks(out: Path) -> None:
    for rank in (0, 1):
        assert json.loads((out / f"{rank}.json").read_text()) == {
            "size": 2,
            "sum_int": 2**54 + 1,
            "sum_float": 1.0,
            "sum_array": [[[1.0, 3.0]], "float64"],
            "max": 1.5,
            "gather": [{"rank": 0}, {"rank": 1}] if rank == 0 else None,
            "broadcast": "from 1",
            "agree": [True, False],
            "barrier": None,
            "begun_sums": [[1, 4], [10, 40]],
            "ready": [True, True],
            "own": [rank, 2],
        }


def mpirun(way: str, out: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(MPIRUN), "-np", "2", sys.executable, str(RANKS), way, str(out)]
    return subprocess.run(command, env=env or clean_env(), capture_output=True, text=True, timeout=120)


def test_single() -> None:
    one = comm.single()
    assert (one.rank, one.size, one.sum(3), one.max(2.5)) == (0, 1, 3, 2.5)
    assert one.agree(True) and not one.agree(False)
    assert one.gather("x") == ["x"] and one.broadcast("x") == "x"
    value = np.arange(3)
    pending = one.begin_sum(value)
    assert pending.ready() and pending.wait().tolist() == [0, 1, 2]
    total = one.sum(value)
    total += 1
    assert value.tolist() == [0, 1, 2], "a result is never the caller's own array"


def test_mpirun_two_ranks(tmp_path: Path) -> None:
    done = mpirun("mpi", tmp_path)
    assert done.returncode == 0, done.stderr
    check_two_ranks(tmp_path)
    assert done.stderr.count("taken apart") == 2, "where MPI is finalized as well"


@pytest.mark.parametrize(
    ("way", "said"),
    [("mpi-one-fails", "one rank: fails"), ("mpi-all-fail", "said once"), ("mpi-one-crashes", "Error: a defect")],
)
def test_mpirun_a_failing_rank_ends_all(way: str, said: str, tmp_path: Path) -> None:
    done = mpirun(way, tmp_path)
    assert done.returncode == 1
    assert done.stderr.count(said) == 1
    assert ("Traceback" in done.stderr) == (way == "mpi-one-crashes")


def test_mpi_world_smaller_than_promised_is_refused(tmp_path: Path) -> None:
    promise = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    env = clean_env(**promise, OMPI_COMM_WORLD_LOCAL_SIZE="2")
    done = subprocess.run([sys.executable, RANKS, "mpi", tmp_path], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "started 2 ranks but MPI sees 1" in done.stderr and "--mpi=pmi2" in done.stderr


def test_a_rank_that_is_ended_while_rank_0_speaks_keeps_its_exit_code() -> None:
    code = "import os, signal, threading; from launcher import comm, errors; comm._fail_together(1, os._exit)\n"
    code += "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start(); errors.leave('said by rank 0', 2)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize(("gpus", "own"), [(1, 0), (8, 3)])
def test_deepspeed_is_told_the_number_of_this_ranks_gpu(gpus: int, own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert comm._take_gpu(world.World(3, 3, 4, 4, "", 1, "slurm"))
    assert taken == [own] and os.environ["LOCAL_RANK"] == str(own)


def test_open_files_are_allowed_as_far_as_it_goes_and_missing_ones_told(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"soft": 1024, "hard": 4096}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.update(soft=both[0], hard=both[1]))
    comm._allow_files(world.World(0, 0, 1000, 8, "", 1, "slurm"))
    assert limits == {"soft": 4096, "hard": 4096}
    with pytest.raises(UserError, match="4000 ranks need about 12300 open files .* hard limit here is 4096"):
        comm._allow_files(world.World(0, 0, 4000, 8, "", 1, "slurm"))


def torch_pair(way: str, out: Path) -> tuple[list[int], str]:
    port, children, said = str(next_port()), [], out / "stderr"
    with said.open("w") as stderr:
        for rank in ("0", "1"):
            env = clean_env(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_SIZE="2", MASTER_PORT=port)
            children.append(subprocess.Popen([sys.executable, RANKS, way, out], env=env, stderr=stderr))
    return [child.wait(timeout=120) for child in children], said.read_text()


@pytest.mark.slow
def test_gloo_two_ranks(tmp_path: Path) -> None:
    codes, said = torch_pair("torch", tmp_path)
    assert codes == [0, 0], said
    check_two_ranks(tmp_path)
    assert (said.count("at exit"), said.count("taken apart")) == (2, 0), "gloo's threads meet no dying interpreter"


@pytest.mark.slow
def test_gloo_a_failing_rank_ends_all(tmp_path: Path) -> None:
    codes, said = torch_pair("torch-one-fails", tmp_path)
    assert codes == [1, 1]
    assert said.count("one rank: fails") == 1
