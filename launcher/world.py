"""Where am I: reads from the environment which rank this process is, whoever started it."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import UserError

_DEFAULT_PORT = 29500
_LOCALHOST = "127.0.0.1"
LAST_PORT = 65535


@dataclass(frozen=True)
class World:
    """One process among all: ranks count from 0; `local_*` is within one machine.

    kind: "plain" (nobody started us), "env" (deepspeed or torchrun), "slurm" (srun), "openmpi" or "mpich" (mpirun).
    """

    rank: int
    local_rank: int
    size: int
    local_size: int
    master_addr: str
    master_port: int
    kind: str

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            raise UserError(
                f"rank {self.rank} of {self.size} (on this machine {self.local_rank} of {self.local_size}), read from "
                f"the {self.kind} variables: a rank must be below its size; unset stale RANK, WORLD_SIZE, … and retry"
            )


def discover(env: Mapping[str, str] = os.environ) -> World:
    """The World that `env` describes. Raises UserError where the variables contradict each other.

    The innermost launcher wins: variables of an outer one (a batch script's SLURM_PROCID, say) are inherited.
    """
    if "RANK" in env:
        return _from_env(env)
    return _from_mpi(env) or _from_slurm(env) or _plain(env)


def promised_size(env: Mapping[str, str] = os.environ) -> int | None:
    """How many processes an MPI-capable launcher (mpirun or srun) says it started; None without such a launcher."""
    world = _from_mpi(env) or _from_slurm(env)
    return world.size if world else None


def export(world: World) -> dict[str, str]:
    """The variables DeepSpeed and torch read; with all of them set, DeepSpeed never asks MPI for them."""
    return {
        "RANK": str(world.rank),
        "LOCAL_RANK": str(world.local_rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_SIZE": str(world.local_size),
        "MASTER_ADDR": world.master_addr,
        "MASTER_PORT": str(world.master_port),
    }


def free_port(first: int = 0) -> int:
    """A TCP port free on this machine now: the first one from `first` on, or any for 0. Raises UserError."""
    last = min(first + 99, LAST_PORT)
    for port in range(first, last + 1) if first else [0]:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UserError(f"ports {first}-{last}: all are taken; set MASTER_PORT to a free one")


def slurm_port(job_id: int) -> int:
    """The port a Slurm job tries first: jobs that share a machine get different ones."""
    return 20000 + job_id % 10000


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list: `gpu[07-09,12],cpu1` gives `gpu07`."""
    name = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,]*))?", node_list.strip())
    assert name is not None, "the pattern matches any string"
    return "".join(part or "" for part in name.groups())


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        said = "is not set" if text is None else f"is {text!r}"
        raise UserError(f"{name} {said}: it must be a whole number; start through hpe-launch, or set it") from None


def _master(env: Mapping[str, str], addr: str = _LOCALHOST, port: int = _DEFAULT_PORT) -> tuple[str, int]:
    return env.get("MASTER_ADDR") or addr, _number(env, "MASTER_PORT", port)


def _from_env(env: Mapping[str, str]) -> World:
    size = _number(env, "WORLD_SIZE")
    local_size = _number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", 0)) or size
    rank = _number(env, "RANK")
    return World(rank, _number(env, "LOCAL_RANK", rank % local_size), size, local_size, *_master(env), "env")


def _from_mpi(env: Mapping[str, str]) -> World | None:
    if "OMPI_COMM_WORLD_RANK" in env:
        kind, names = "openmpi", [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")]
    elif "PMI_RANK" in env and "MPI_LOCALRANKID" in env:  # srun sets PMI_RANK too, but not the second one
        kind, names = "mpich", ["PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"]
    else:
        return None
    rank, local_rank, size, local_size = (_number(env, name) for name in names)
    return World(rank, local_rank, size, local_size, *_master(env), kind)


def _from_slurm(env: Mapping[str, str]) -> World | None:
    if not env.get("SLURM_STEP_ID", "").isdigit() or "SLURM_PROCID" not in env:
        return None  # a batch script or a login shell inside an allocation, not a task of srun
    size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    head = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or _LOCALHOST)
    master = _master(env, head, slurm_port(_number(env, "SLURM_JOB_ID", 0)))
    counts = per_node(env.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
    node = _number(env, "SLURM_NODEID", 0)
    local_size = counts[node] if node < len(counts) else size
    return World(_number(env, "SLURM_PROCID"), _number(env, "SLURM_LOCALID", 0), size, local_size, *master, "slurm")


def per_node(text: str) -> list[int]:
    """How many of something each node has, as Slurm writes it: `2(x3),1` means 2, 2, 2, 1."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def _plain(env: Mapping[str, str]) -> World:
    addr, port = _master(env, port=0)
    return World(0, 0, 1, 1, addr, port or free_port(), "plain")
