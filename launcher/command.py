"""The command lines that start ranks: deepspeed, mpirun, srun. Pure functions, but for the look-ups at the end."""

import glob
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import UserError

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Command:
    """What to run: `argv`, and `env` to add to the environment.

    `ignores_usr1`: the launcher does not know SIGUSR1 and would die of it; it is started with the signal ignored.
    """

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    ignores_usr1: bool = False

    def text(self) -> str:
        """As one would type it in a shell."""
        return shlex.join(["env", *(f"{name}={value}" for name, value in self.env.items()), *self.argv])


def threads_env(threads: int) -> dict[str, str]:
    """Fixes the threads of one rank: speed when ranks share a machine, and sums that come out the same every time."""
    return dict.fromkeys(_THREAD_VARIABLES, str(threads))


def threads_per_rank(cpus: int, ranks_here: int) -> int:
    """An equal share of a machine's CPUs."""
    return max(1, cpus // ranks_here)


def deepspeed(
    module: str,
    arguments: Sequence[str],
    *,
    ranks: int,
    port: int,
    threads: int,
    env: dict[str, str],
    hostfile: Path | None = None,
    nodes: int = 1,
    gpus: Sequence[str] | None = None,
    program: str = "deepspeed",
    python: str = sys.executable,
) -> Command:
    """`ranks` ranks through DeepSpeed's launcher: on this machine, or on the first `nodes` machines of `hostfile`.

    `gpus`: those of this machine that CUDA_VISIBLE_DEVICES names, where it does. Raises UserError if the ranks cannot
    be spread evenly, or there are fewer such GPUs.
    """
    env = threads_env(threads) | env
    per_node = _even(ranks, nodes)
    if hostfile is None:
        which = ["--num_gpus", str(ranks)]
        if gpus is not None:  # DeepSpeed heeds the variable only where no option says anything of GPUs
            env, which = env | {_VISIBLE: _first_gpus(gpus, ranks)}, []
        here = [program, "--quiet", *which, "--master_port", str(port)]
        return Command([*here, "--module", module, *arguments], env, ignores_usr1=True)
    there = [program, "--quiet", "--hostfile", str(hostfile), "--num_nodes", str(nodes), "--num_gpus", str(per_node)]
    # DeepSpeed takes only a few variables to the other machines, so `env` sets ours there, before each rank.
    ranks_run = ["env", *(f"{name}={value}" for name, value in env.items()), python, "-u", "-m", module]
    rest = ["--force_multi", "--no_python", "--no_local_rank", *ranks_run, *arguments]
    return Command([*there, "--master_port", str(port), *rest], env, ignores_usr1=True)


def mpirun(
    arguments: Sequence[str],
    *,
    ranks: int,
    threads: int,
    env: dict[str, str],
    flavour: str = "mpich",
    hostfile: Path | None = None,
    nodes: int = 1,
    as_root: bool = False,
    program: str = "mpirun",
) -> Command:
    """`ranks` ranks of `arguments` under mpirun; flavour "mpich" (takes the environment along) or "openmpi" (does not).

    `hostfile` has one `host slots=N` a line. Raises UserError if the ranks cannot be spread evenly.
    """
    env = threads_env(threads) | env
    per_node = _even(ranks, nodes)
    argv = [program, "-np", str(ranks)]
    if flavour == "openmpi":
        argv += ["--oversubscribe"] + ["--allow-run-as-root"] * as_root
        argv += ["--hostfile", str(hostfile), "-npernode", str(per_node)] if hostfile else []
        argv += [word for name in env for word in ("-x", name)]
    elif hostfile:
        argv += ["-hosts", ",".join(hosts(hostfile.read_text())[:nodes]), "-ppn", str(per_node)]
    return Command([*argv, *arguments], env)


def srun(
    arguments: Sequence[str],
    *,
    ranks: int,
    nodes: int,
    threads: int,
    env: dict[str, str],
    mpi: str = "none",
    cpus_per_task: int | None = None,
    options: Sequence[str] = (),
    program: str = "srun",
) -> Command:
    """`ranks` tasks of `arguments` on `nodes` nodes of the Slurm allocation; `mpi` is "none", "pmi2" or "pmix".

    One task that fails ends all: without that, the others would wait for it until the time limit. `options` are more
    of srun's own, such as a container to run the tasks in.
    """
    argv = [program, "--nodes", str(nodes), "--ntasks", str(ranks), f"--mpi={mpi}", "--kill-on-bad-exit=1"]
    if cpus_per_task:  # since Slurm 22.05 a step does not inherit it from the job
        argv += [f"--cpus-per-task={cpus_per_task}"]
    return Command([*argv, *options, *arguments], threads_env(threads) | env | _netmod_env(mpi))


def _netmod_env(mpi: str) -> dict[str, str]:
    """What MPICH under Slurm's PMI talks with, unless the user has chosen: libfabric, whose addresses are short.

    By UCX a rank tells its address in lines of up to 1,080 characters, filled up from unset memory. Slurm's plugin
    reads 1,024: now and then a step dies at its start ("value not properly terminated in client request").
    """
    name = "MPIR_CVAR_CH4_NETMOD"
    return {name: "ofi"} if mpi == "pmi2" and name not in os.environ else {}


def hosts(hostfile: str) -> list[str]:
    """The machines named in the text of a hostfile (`host slots=N` a line, # starts a comment)."""
    lines = (line.split("#")[0].split() for line in hostfile.splitlines())
    return [words[0] for words in lines if words]


def find_program(name: str, remedy: str) -> str:
    """The path of `name` beside this Python, else on PATH. Raises UserError with `remedy`."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None:
        raise UserError(f"no {name}: neither beside {sys.executable} nor on PATH; {remedy}")
    return found


def find_mpirun() -> str:
    """The mpirun that belongs to this environment. Raises UserError where there is none."""
    return find_program("mpirun", "pip install mpich, or load your cluster's MPI module")


def mpi_flavour(mpirun_path: str) -> str:
    """ "openmpi" or "mpich", as `mpirun --version` says."""
    said = subprocess.run([mpirun_path, "--version"], capture_output=True, text=True, timeout=30).stdout
    return "openmpi" if "Open MPI" in said or "OpenRTE" in said else "mpich"


def gpu_count() -> int:
    """NVIDIA GPUs of this machine that may be used, without the seconds that importing torch takes."""
    named = visible_gpus()
    return len(_gpu_files()) if named is None else len(named)


def visible_gpus() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names; None where it names none, and where this machine has none."""
    named = [word.strip() for word in os.environ.get(_VISIBLE, "").split(",") if word.strip()]
    return named if named and _gpu_files() else None


def accelerator_env() -> dict[str, str]:
    """Where there is no GPU, DeepSpeed is told so instead of searching for one. For ranks on this very machine only."""
    return {} if gpu_count() or "DS_ACCELERATOR" in os.environ else {"DS_ACCELERATOR": "cpu"}


def _gpu_files() -> list[str]:
    return glob.glob("/dev/nvidia[0-9]*")


def _first_gpus(gpus: Sequence[str], ranks: int) -> str:
    said = f"{_VISIBLE}={','.join(gpus)}"
    if not all(gpu.isdecimal() for gpu in gpus):
        raise UserError(
            f"{said}: DeepSpeed's launcher takes numbers only; name the GPUs by the numbers that nvidia-smi shows, or "
            "start one rank by cogvlm-hpe itself"
        )
    if ranks > len(gpus):
        raise UserError(f"{said}: too few for {ranks} ranks, one a GPU; lower --nproc, or name more GPUs there")
    return ",".join(gpus[:ranks])


def _even(ranks: int, nodes: int) -> int:
    if nodes < 1 or ranks < nodes or ranks % nodes:
        raise UserError(f"{ranks} ranks on {nodes} machines: every machine gets the same number; change --nproc")
    return ranks // nodes
