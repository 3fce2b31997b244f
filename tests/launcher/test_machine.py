"""What the machine says of itself."""

import socket
from datetime import datetime

import pytest

from launcher import machine
from launcher.errors import UserError
from launcher.world import World

PLACES = ((8, "n1"), (4, "n1"), (4, "127.0.0.1"))  # the last are nodes of this very machine
HAVE = [name for _, name in socket.if_nameindex()]


def test_an_interface_of_this_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for address, named in (("127.0.0.1", "lo"), ("192.0.2.1", "192.0.2.1")):
        monkeypatch.setattr("socket.gethostbyname", lambda name, address=address: address)
        assert machine.interface({}) == named
    assert machine.interface({"NCCL_SOCKET_IFNAME": HAVE[0]}) == f"192.0.2.1, {HAVE[0]} (NCCL_SOCKET_IFNAME)"
    assert machine.interface({"GLOO_SOCKET_IFNAME": HAVE[0]}) == f"{HAVE[0]} (GLOO_SOCKET_IFNAME)"
    assert "^lo" in machine.interface({"NCCL_SOCKET_IFNAME": "^lo"})


def test_an_interface_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=f"GLOO_SOCKET_IFNAME=ib77: .* has only {HAVE[0]}"):
        machine.interface({"GLOO_SOCKET_IFNAME": "ib77"})


def test_a_loopback_address_is_no_way_to_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")
    alone, spread, virtual = (World(0, 0, 8, local, address, 1, "slurm") for local, address in PLACES)
    machine.check_reachable(alone, {})
    machine.check_reachable(virtual, {})
    machine.check_reachable(spread, {"GLOO_SOCKET_IFNAME": "eth0"})
    for env in ({}, {"NCCL_SOCKET_IFNAME": "eth0"}):  # which gloo does not read
        with pytest.raises(UserError, match="resolves to 127.0.1.1.*mend /etc/hosts"):
            machine.check_reachable(spread, env)


def test_the_end_of_a_job() -> None:
    assert machine.wall_time_left_s({}) is None
    assert machine.wall_time_left_s({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1500"}, 1000.0) == 500.0
    end_s = datetime(2026, 5, 1, 12, 0).timestamp()
    said = "JobId=7 TimeLimit=1-00:00:00 StartTime=2026-04-30T12:00:00 EndTime=2026-05-01T12:00:00 Partition=main"
    assert machine.end_of_job_s(said, end_s - 90) == 90.0
    assert machine.end_of_job_s("JobId=7 EndTime=Unknown") is None


def test_wall_time() -> None:
    assert machine.judge_wall_time(None, 100, 10, None) == "no limit"
    assert "--deep" in machine.judge_wall_time(3600, 100, 10, None)
    assert "1:00:00 left, 5000 steps take 2:46:40: 3 such jobs" in machine.judge_wall_time(3600, 5000, 200, 2.0)
    assert machine.judge_wall_time(100, 10, 200, 2.0).endswith("1 such jobs"), "fewer steps left than save_every"
    with pytest.raises(UserError, match=r"ask for more --time, or lower train.save_every"):
        machine.judge_wall_time(300, 5000, 200, 2.0)
