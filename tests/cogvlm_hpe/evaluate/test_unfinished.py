"""Whom a cut-off evaluation names; what it keeps is tested with real ranks in test_command.py."""

from cogvlm_hpe.evaluate import unfinished


def test_the_ranks_that_all_wait_for_are_named() -> None:
    states = {rank: {"rounds": 5, "host": f"n{rank // 2}", "pid": 100 + rank, "ranks": 4} for rank in range(4)}
    assert "all 4 ranks had done 5 rounds" in unfinished.late(states, 4, 60)
    states[3]["rounds"] = 4
    assert "last was rank 3 (host n1, pid 103) after 4 rounds, others had done up to 5" in unfinished.late(
        states, 4, 60
    )
    del states[2]
    assert "no rank has moved for 60 s; rank 2, not started" in unfinished.late(states, 4, 60)
    assert "ranks 4, 5, 6, 7, 8, 9, 10, 11 and 4 more, not started" in unfinished.late(states | {2: states[3]}, 16, 1)


def test_processes_are_named_as_launchers_name_them() -> None:
    states = {rank: {"host": f"n{rank // 8}", "pid": 100 + rank} for rank in range(16)}
    said = unfinished.processes(states)
    assert said.startswith("rank 0 (host n0, pid 100), rank 1 (") and said.endswith(" and 8 more (rank-NNNN.json)")
