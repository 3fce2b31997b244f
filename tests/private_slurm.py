"""A private Slurm with two virtual nodes of this machine, in a temporary folder; it touches nothing of the system's."""

import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ports import next_port

_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

# cred_expire 5: with the default of 120 s a requeued job waits two minutes. proctrack/pgid: with linuxproc ranks that
# a dead launcher leaves behind survive their job.
_CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
MinJobAge=300
FirstJobId={first_job}
KillWait=8
InactiveLimit=0
UnkillableStepTimeout=30
MailProg=/bin/true
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0 OverSubscribe=NO
PartitionName=urgent Nodes=node[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Slurm:
    """The running cluster; `env` is what its client programs need."""

    root: Path
    env: dict[str, str]

    def call(self, *words: str, check: bool = True) -> str:
        """Run a client program; its output."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str, cwd: Path) -> int:
        """`sbatch` with these words in `cwd`; the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words], cwd=cwd, env=self.env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        words = self.call("scontrol", "-o", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until(self, number: int, *states: str, timeout_s: float = 240) -> dict[str, str]:
        """The job, once it is in one of `states`."""
        deadline_s = time.monotonic() + timeout_s
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline_s, f"job {number} is not {states}: {job}\n{self.log(job)}"
            time.sleep(0.2)
        return job

    def wait_while_running(self, number: int) -> None:
        """Until the job no longer runs."""
        self.wait_until(number, *_FINISHED, "PENDING", "COMPLETING", "PREEMPTED", "REQUEUED")

    def mend(self, node: str) -> None:
        """The node, if it was set down, takes jobs again."""
        deadline_s = time.monotonic() + 60
        while "DOWN" in self.call("scontrol", "-o", "show", "node", node).partition("State=")[2].split()[0]:
            assert time.monotonic() < deadline_s, f"{node} stays down"
            self.call("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            time.sleep(0.5)

    def wait_for_start(self, number: int, start: int) -> None:
        """Once the job runs for at least the `start`-th time; Slurm holds it back for cred_expire and a second."""
        deadline_s = time.monotonic() + 240
        while int((job := self.job(number))["Restarts"]) + 1 < start or job["JobState"] != "RUNNING":
            ended = job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED")
            assert time.monotonic() < deadline_s and not ended, f"{job}\n{self.log(job)}"
            time.sleep(0.2)

    def finish(self, number: int, timeout_s: float = 240) -> tuple[str, int, str]:
        """State, exit code and output of the job, once it has ended."""
        job = self.wait_until(number, *_FINISHED, timeout_s=timeout_s)
        return job["JobState"], int(job["ExitCode"].split(":")[0]), self.log(job)

    def log(self, job: dict[str, str]) -> str:
        """What the job has printed so far."""
        path = Path(job["StdOut"])
        return path.read_text() if path.exists() else ""


def missing_programs() -> list[str]:
    """What is not installed of all it takes."""
    return [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]


@contextmanager
def private_slurm() -> Iterator[Slurm]:
    """A running Slurm, stopped and removed at the end of the block. Needs root."""
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    env |= {"SLURM_CONF": str(root / "slurm.conf"), "PATH": _PATH}
    try:
        _start(root, env)
        yield Slurm(root, env)
    finally:
        _stop(root, env)
        shutil.rmtree(root, ignore_errors=True)


def _start(root: Path, env: dict[str, str]) -> None:
    for name in ("state", "log", "run", "spool/node1", "spool/node2", "dev"):
        (root / name).mkdir(parents=True)
    for i in range(2):  # Slurm insists on device files for its GPUs
        os.mknod(root / f"dev/nvidia{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    key = root / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    first_job = random.randrange(1, 9000)  # ranks take their port from it, and another private Slurm may run beside
    (root / "slurm.conf").write_text(
        _CONF.format(root=root, host=host, ports=[next_port() for _ in range(3)], first_job=first_job)
    )
    (root / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={root}/dev/nvidia[0-1]\n")
    run = root / "run"
    munge = {"key-file": key, "socket": run / "munge.sock", "pid-file": run / "munged.pid"}
    munge |= {"log-file": root / "log/munged.log", "seed-file": run / "munged.seed"}
    daemons = [["munged", "--force", *(f"--{name}={path}" for name, path in munge.items())]]
    daemons += [["slurmctld", "-i", "-c"], ["slurmd", "-N", "node1"], ["slurmd", "-N", "node2"]]
    for words in daemons:
        subprocess.run(words, env=env, check=True, timeout=60, stdout=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 60
    while _idle(env) < 2:
        assert time.monotonic() < deadline_s, (root / "log/slurmctld.log").read_text()
        time.sleep(0.2)


def _idle(env: dict[str, str]) -> int:
    words = ["sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N"]
    return len(subprocess.run(words, env=env, capture_output=True, text=True, timeout=30).stdout.split())


def _stop(root: Path, env: dict[str, str]) -> None:
    subprocess.run(["scancel", "--full", "--user=root"], env=env, timeout=30, capture_output=True)
    deadline_s = time.monotonic() + 30
    while subprocess.run(["squeue", "-h"], env=env, timeout=30, capture_output=True).stdout:  # else steps stay behind
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.2)
    subprocess.run(["scontrol", "shutdown"], env=env, timeout=30, capture_output=True)
    deadline_s = time.monotonic() + 20
    while list(root.glob("run/slurm*.pid")) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    for path in root.glob("run/*.pid"):
        os.kill(int(path.read_text()), signal.SIGTERM)
