"""What this machine and its scheduler say of themselves: the network's interface, and when the time is up."""

import fcntl
import math
import os
import socket
import struct
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime

from launcher.errors import UserError
from launcher.progress import clock
from launcher.world import World

_SIOCGIFADDR = 0x8915  # ioctl: IPv4 address of an interface
_GLOO = "GLOO_SOCKET_IFNAME"
_NAMES = (_GLOO, "NCCL_SOCKET_IFNAME")


def interface(env: Mapping[str, str] = os.environ) -> str:
    """The interfaces that ranks talk by: what the variables name, and where none does for gloo, that of our own name.

    Raises UserError where a variable names one that this machine does not have.
    """
    have = [name for _, name in socket.if_nameindex()]
    for variable in _NAMES:
        said = env.get(variable, "")
        # NCCL takes prefixes, =exact names and ^exclusions.
        wanted = [part.lstrip("=") for part in said.split(",") if part and not said.startswith("^")]
        if wanted and not any(name.startswith(part) for name in have for part in wanted):
            raise UserError(
                f"{variable}={said}: {socket.gethostname()} has only {', '.join(have)}; correct it, or unset it"
            )
    named = [f"{env[variable]} ({variable})" for variable in _NAMES if env.get(variable)]
    own = [] if env.get(_GLOO) else [_interface_of(_own_address(), have)]
    return ", ".join(own + named)


def check_reachable(world: World, env: Mapping[str, str] = os.environ) -> None:
    """Raise UserError where other machines are told to find this one at its loopback address."""
    elsewhere = world.size > world.local_size and not world.master_addr.startswith(("127.", "localhost"))
    # Gloo does not read NCCL's variable; it would tell the others the loopback address.
    if elsewhere and not env.get(_GLOO) and _own_address().startswith("127."):
        raise UserError(
            f"{socket.gethostname()} resolves to {_own_address()}, where other machines cannot reach it; mend "
            "/etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (slurm/site.conf)"
        )


def wall_time_left_s(env: Mapping[str, str] = os.environ, now_s: float | None = None) -> float | None:
    """Seconds until Slurm ends this job; None outside of Slurm and where the job has no limit."""
    if "SLURM_JOB_ID" not in env:
        return None
    end_s = env.get("SLURM_JOB_END_TIME", "")
    if not end_s.isdigit():
        words = ["scontrol", "-o", "show", "job", env["SLURM_JOB_ID"]]
        try:
            said = subprocess.run(words, capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.TimeoutExpired):
            return None
        return end_of_job_s(said, now_s)
    return float(end_s) - (time.time() if now_s is None else now_s)


def end_of_job_s(said: str, now_s: float | None = None) -> float | None:
    """Seconds left by the EndTime in `scontrol -o show job`; None where it is not known."""
    words = (word.partition("=") for word in said.split())
    end = next((value for name, _, value in words if name == "EndTime"), "")
    try:
        return datetime.fromisoformat(end).timestamp() - (time.time() if now_s is None else now_s)
    except ValueError:
        return None


def judge_wall_time(left_s: float | None, steps: int, save_every: int, step_s: float | None) -> str:
    """Time left against `steps`. Raises UserError where it ends before the next checkpoint."""
    if left_s is None:
        return "no limit" if step_s is None else f"no limit; {steps} steps take {clock(steps * step_s)}"
    if step_s is None:
        return f"{clock(left_s)} left; --deep says what that is in steps"
    if min(steps, save_every) * step_s > left_s:
        raise UserError(
            f"{clock(left_s)} left, {save_every} steps take {clock(save_every * step_s)}; "
            "ask for more --time, or lower train.save_every"
        )
    times = math.ceil(steps * step_s / left_s)
    return f"{clock(left_s)} left, {steps} steps take {clock(steps * step_s)}: {times} such jobs"


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _interface_of(address: str, names: list[str]) -> str:
    """Its name, or the address itself where no interface says that it is its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in names:
            try:
                packed = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(packed[20:24]) == address:
                return name
    return "lo" if address.startswith("127.") else address
