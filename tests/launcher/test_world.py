"""World from the environment each launcher really sets (values copied from real runs)."""

import dataclasses
import socket

import pytest

from launcher import world
from launcher.errors import UserError
from launcher.world import World, discover, export

SLURM_STEP = {
    "SLURM_JOB_ID": "12345678",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    "SLURM_STEP_NUM_TASKS": "15",
    "SLURM_STEP_TASKS_PER_NODE": "4(x3),3",
    "SLURM_NTASKS": "15",
    "SLURM_NODEID": "3",
    "SLURM_PROCID": "13",
    "SLURM_LOCALID": "1",
}


def test_plain_is_a_world_of_one_with_a_free_port() -> None:
    here = discover({})
    assert (here.rank, here.size, here.local_rank, here.local_size, here.kind) == (0, 1, 0, 1, "plain")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", here.master_port))


def test_deepspeed() -> None:
    env = {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "LOCAL_SIZE": "8",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "7",
    }
    assert discover(env) == World(9, 1, 16, 8, "a", 7, "env")


def test_torchrun() -> None:
    env = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert discover(env) == World(3, 1, 4, 2, "127.0.0.1", 29500, "env")


def test_slurm_step() -> None:
    assert discover(SLURM_STEP) == World(13, 1, 15, 3, "gpu07", 20000 + 5678, "slurm")


def test_slurm_step_keeps_a_given_master() -> None:
    here = discover(SLURM_STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (here.master_addr, here.master_port) == ("10.0.0.1", 4000)


def test_slurm_batch_script_is_no_step() -> None:
    env = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "gpu[1-2]"}
    assert discover(env).kind == "plain"
    assert world.promised_size(env) is None


def test_openmpi() -> None:
    env = {
        f"OMPI_COMM_WORLD_{k}": v for k, v in {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()
    }
    assert discover(env) == World(3, 1, 4, 2, "127.0.0.1", 29500, "openmpi")


def test_mpich_under_a_slurm_step_of_its_own_proxies_is_mpich() -> None:
    env = SLURM_STEP | {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert discover(env) == World(1, 1, 2, 2, "127.0.0.1", 29500, "mpich")


def test_srun_with_pmi2_is_slurm() -> None:
    assert discover(SLURM_STEP | {"PMI_RANK": "13", "PMI_SIZE": "15"}).kind == "slurm"


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
    ],
)
def test_contradictions_are_named(env: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        discover(env)


def test_export_is_read_back_as_the_same_place() -> None:
    here = discover(SLURM_STEP)
    again = discover(export(here))
    assert again == dataclasses.replace(here, kind="env")
    assert {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= export(here).keys()  # DeepSpeed's five


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("node[1-2]", "node1"), ("a[07-09,12],b1", "a07"), ("a,b", "a"), ("r[1-2]-ib", "r1-ib")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert world.first_host(nodes) == first


def test_free_port_moves_on_from_a_taken_one() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert world.free_port(port) > port
