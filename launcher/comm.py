"""The one file that speaks torch.distributed and MPI: what ranks say to each other."""

import atexit
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from launcher import errors
from launcher.errors import UserError
from launcher.machine import check_reachable
from launcher.world import World, discover, export, promised_size

if TYPE_CHECKING:
    import torch
    from mpi4py import MPI

_FILES_PER_RANK = 3  # at most: gloo's group, DeepSpeed's copy of it, and on rank 0 the store
_FILES = 300  # besides: images, tars, readers, CUDA
Number = TypeVar("Number", int, float, np.ndarray)
T = TypeVar("T")


class Pending:
    """A sum over ranks that is under way; `array` becomes the sum."""

    def __init__(
        self, array: np.ndarray, ready: Callable[[], bool] = lambda: True, wait: Callable[[], object] = lambda: None
    ) -> None:
        self._array, self.ready, self._wait = array, ready, wait

    def wait(self) -> np.ndarray:
        """The sum, once every rank has begun it."""
        self._wait()
        return self._array


class Comm:
    """Rank `rank` of `size`. This base class is the world of one; the others speak MPI or torch.distributed."""

    rank: int = 0
    size: int = 1

    def sum(self, value: Number) -> Number:
        """All ranks. The sum over ranks of a number or an array (same shape and dtype everywhere)."""
        return _like(value, self._reduce(np.array(value), "SUM"))

    def begin_sum(self, value: np.ndarray) -> Pending:
        """All ranks. Begin a sum of arrays and go on at once; ranks begin theirs in one order."""
        return Pending(value.copy())

    def max(self, value: Number) -> Number:
        """All ranks. The largest over ranks of a number, or of each element of an array."""
        return _like(value, self._reduce(np.array(value), "MAX"))

    def agree(self, flag: bool) -> bool:
        """All ranks. True everywhere as soon as one rank says True."""
        return self.max(int(flag)) > 0

    def gather(self, value: T) -> list[T] | None:
        """All ranks. On rank 0 the values of all ranks in rank order, elsewhere None."""
        return [value]

    def broadcast(self, value: T, root: int = 0) -> T:
        """All ranks. The value that rank `root` holds."""
        return value

    def barrier(self) -> None:
        """All ranks. Returns once every rank has arrived."""

    def post(self, key: str, text: str) -> None:
        """Leave a note for the other ranks; may be called by any thread, while another one waits for ranks."""

    def posted(self, key: str) -> str | None:
        """A note that a rank has left, or None."""
        return None

    def time_sum(self, n_bytes: int) -> float:
        """All ranks. Seconds for a sum over ranks of so many bytes on the devices of training: best of three.

        Raises UserError where ranks cannot talk.
        """
        return 0.0

    def time_exchange(self, partner: int | None, n_bytes: int) -> float:
        """All ranks. Seconds in which this rank and `partner` give each other so many bytes: best of three.

        None: this rank has no partner and looks on. Raises UserError where two cannot talk.
        """
        return 0.0

    def _reduce(self, array: np.ndarray, operation: str) -> np.ndarray:
        return array


def single() -> Comm:
    """A world of one."""
    return Comm()


def mpi() -> Comm:
    """All ranks. The ranks mpirun or srun started, or `single()` where neither did.

    Raises UserError if MPI finds another number of ranks than the launcher promised. From here on a rank that fails
    takes the others along, which would otherwise wait for it for ever.
    """
    promised = promised_size()
    if promised is None or promised == 1:
        return single()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{promised} ranks started, but mpi4py does not load ({error}); install mpi4py and mpich"
        ) from None
    found = MPI.COMM_WORLD.Get_size()
    if found != promised:
        raise UserError(
            f"{discover().kind} started {promised} ranks but MPI sees {found}: launcher and MPI library do not belong "
            "together; use the mpirun of this Python's environment, or srun --mpi=pmi2 (MPICH) or --mpi=pmix (Open MPI)"
        )
    return _Mpi(MPI.COMM_WORLD)


def from_torch(world: World, timeout_s: float = 1800.0) -> Comm:
    """All ranks. Initialise torch.distributed for `world`: nccl for CUDA tensors and gloo for the rest.

    Also sets RANK, WORLD_SIZE, MASTER_ADDR, … so that DeepSpeed finds them and does not ask MPI. A collective that
    some rank does not join fails after `timeout_s`. Does nothing if the process group is there already.
    """
    from torch import distributed

    os.environ.update(export(world))
    cuda = _take_gpu(world)
    if not distributed.is_initialized():
        check_reachable(world)
        _allow_files(world)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        timeout = timedelta(seconds=timeout_s)
        try:
            distributed.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout)
        except (distributed.DistError, ValueError) as error:
            raise UserError(
                f"rank {world.rank} of {world.size} did not meet the others at {world.master_addr}:{world.master_port} "
                f"({str(error).splitlines()[0]}); check that all ranks run, that the host resolves and the port is free"
            ) from None
        atexit.register(_destroy_group)
        errors.end = _end
        _fail_together(world.rank, os._exit)
    return _Torch(world.rank, world.size)


def _take_gpu(world: World) -> bool:
    """Whether there are GPUs; this rank then works on its own one."""
    import torch

    if not torch.cuda.is_available():
        return False
    gpu = world.local_rank % torch.cuda.device_count()  # a task that Slurm binds to a GPU sees only that one
    torch.cuda.set_device(gpu)
    os.environ["LOCAL_RANK"] = str(gpu)  # DeepSpeed takes it for the number of the GPU
    return True


class _Mpi(Comm):
    def __init__(self, world: "MPI.Intracomm") -> None:
        self._world = world
        self.rank, self.size = world.Get_rank(), world.Get_size()
        _fail_together(self.rank, world.Abort)

    def gather(self, value: T) -> list[T] | None:
        gathered: list[T] | None = self._world.gather(value, root=0)
        return gathered

    def broadcast(self, value: T, root: int = 0) -> T:
        received: T = self._world.bcast(value, root=root)
        return received

    def barrier(self) -> None:
        self._world.Barrier()

    def begin_sum(self, value: np.ndarray) -> Pending:
        from mpi4py import MPI

        array = value.copy()
        request = self._world.Iallreduce(MPI.IN_PLACE, array, op=MPI.SUM)
        return Pending(array, request.Test, request.Wait)

    def _reduce(self, array: np.ndarray, operation: str) -> np.ndarray:
        from mpi4py import MPI

        self._world.Allreduce(MPI.IN_PLACE, array, op=getattr(MPI, operation))
        return array


class _Torch(Comm):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather(self, value: T) -> list[T] | None:
        from torch import distributed

        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        distributed.gather_object(value, gathered, dst=0)
        return gathered

    def broadcast(self, value: T, root: int = 0) -> T:
        from torch import distributed

        holder = [value]
        distributed.broadcast_object_list(holder, src=root)
        return holder[0]

    def barrier(self) -> None:
        # Not distributed.barrier(): with nccl in the group that one would wait for the device's work.
        self._reduce(np.zeros(1), "SUM")

    def begin_sum(self, value: np.ndarray) -> Pending:
        import torch
        from torch import distributed

        array = value.copy()
        work = distributed.all_reduce(torch.from_numpy(array), async_op=True)
        return Pending(array, work.is_completed, work.wait)

    def post(self, key: str, text: str) -> None:
        self._store().set(key, text)

    def posted(self, key: str) -> str | None:
        store = self._store()
        return store.get(key).decode() if store.check([key]) else None

    def time_sum(self, n_bytes: int) -> float:
        from torch import distributed

        tensor = self._probe(n_bytes)
        return self.max(self._time("a sum over ranks", lambda: distributed.all_reduce(tensor), tensor))

    def time_exchange(self, partner: int | None, n_bytes: int) -> float:
        from torch import distributed

        there, back = self._probe(n_bytes), self._probe(n_bytes)

        def swap() -> None:
            if partner is not None:
                ways = [(distributed.isend, there), (distributed.irecv, back)]
                work = [distributed.P2POp(operation, tensor, partner) for operation, tensor in ways]
                for request in distributed.batch_isend_irecv(work):
                    request.wait()

        return self._time(f"an exchange with rank {partner}", swap, back)

    def _probe(self, n_bytes: int) -> "torch.Tensor":
        import torch

        return torch.zeros(n_bytes // 4, device="cuda" if torch.cuda.is_available() else "cpu")

    def _time(self, what: str, work: Callable[[], object], written: "torch.Tensor") -> float:
        """All ranks. Seconds of `work`, begun together, until `written` holds its result."""
        taken_s = []
        try:
            for _ in range(4):  # the first one makes the connections
                self.barrier()
                start_s = time.monotonic()
                work()
                written[:1].tolist()  # waits for the device
                taken_s.append(time.monotonic() - start_s)
        except RuntimeError as error:
            raise UserError(
                f"rank {self.rank}: {what} failed ({str(error).splitlines()[0]}); check the network and "
                "NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO says more"
            ) from None
        return min(taken_s[1:])

    def _store(self) -> Any:
        from torch.distributed import distributed_c10d

        return distributed_c10d._get_default_store()

    def _reduce(self, array: np.ndarray, operation: str) -> np.ndarray:
        import torch
        from torch import distributed

        distributed.all_reduce(torch.from_numpy(array), op=getattr(distributed.ReduceOp, operation))
        return array


def _fail_together(rank: int, end: Callable[[int], object]) -> None:
    """From now on this rank's failure is said and ends at once: no clean-up that waits for ranks that wait for us."""

    def leave(message: str, exit_code: int) -> None:
        if rank:  # rank 0 goes first and is the only one to speak where all fail alike: the launcher ends the others
            # srun ends with the largest exit code, and 143 of a rank that SIGTERM has killed would be it.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(exit_code))
            time.sleep(2.0)
        print(message, file=sys.stderr)
        finish(exit_code)

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        finish(errors.EXIT_FAILURE)

    def finish(exit_code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for child in multiprocessing.active_children():  # readers of shards, which nobody would end otherwise
            child.kill()
        time.sleep(0.5)  # mpirun drops what it has not yet passed on when a rank aborts
        end(exit_code)

    errors.leave = leave
    sys.excepthook = excepthook


def _allow_files(world: World) -> None:
    """Raise this process's limit of open files as far as it goes: it holds a socket to each rank, in several groups.

    Raises UserError where that is not enough.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    needed = _FILES_PER_RANK * world.size + _FILES
    if most != resource.RLIM_INFINITY and most < needed:
        raise UserError(
            f"{world.size} ranks need about {needed} open files in each process, the hard limit here is {most} "
            "(`ulimit -Hn`); have it raised, for Slurm's jobs in slurmd's own limits"
        )


def _end(exit_code: int) -> None:
    """Do what is due at exit and end, without taking the interpreter apart.

    Gloo's threads outlive their group where somebody holds on to it, as DeepSpeed does. One that then lets go of a
    tensor wants the interpreter, which is going, and aborts the process (pytorch/pytorch#179291).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _destroy_group() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _like(value: Number, array: np.ndarray) -> Number:
    result: Number = array if isinstance(value, np.ndarray) else array.item()
    return result
