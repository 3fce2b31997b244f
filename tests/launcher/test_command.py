"""Command lines for one rank, one node and many nodes."""

from pathlib import Path

import pytest

from launcher import command
from launcher.command import Command
from launcher.errors import UserError

TRAIN = ["train", "--config", "x y.yaml"]


def words(made: Command, *wanted: str) -> bool:
    """Whether `wanted` stands in the command line in this order, side by side."""
    text = "\0".join(made.argv) + "\0"
    return "\0".join(wanted) + "\0" in text


def hostfile(folder: Path, nodes: int) -> Path:
    path = folder / "hosts"
    path.write_text("# machines\n" + "".join(f"gpu{i:02d} slots=8\n" for i in range(nodes)))
    return path


@pytest.mark.parametrize("ranks", [1, 8])
def test_deepspeed_on_one_node_is_the_plain_deepspeed_way(ranks: int) -> None:
    made = command.deepspeed("cogvlm_hpe", TRAIN, ranks=ranks, port=7, threads=4, env={})
    assert made.argv == [
        "deepspeed",
        "--quiet",
        "--num_gpus",
        str(ranks),
        "--master_port",
        "7",
        "--module",
        "cogvlm_hpe",
        *TRAIN,
    ]
    assert made.env["OMP_NUM_THREADS"] == made.env["MKL_NUM_THREADS"] == "4"


def test_deepspeed_takes_the_gpus_that_are_visible() -> None:
    made = command.deepspeed("cogvlm_hpe", TRAIN, ranks=2, port=7, threads=4, env={}, gpus=["2", "3", "5"])
    assert made.argv[:4] == ["deepspeed", "--quiet", "--master_port", "7"], "an option would make it drop the variable"
    assert made.env["CUDA_VISIBLE_DEVICES"] == "2,3"
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES=2: too few for 2 ranks.*--nproc"):
        command.deepspeed("cogvlm_hpe", TRAIN, ranks=2, port=7, threads=4, env={}, gpus=["2"])
    with pytest.raises(UserError, match=r"GPU-0a: .*numbers only"):
        command.deepspeed("cogvlm_hpe", TRAIN, ranks=1, port=7, threads=4, env={}, gpus=["GPU-0a"])


@pytest.mark.parametrize(("said", "count"), [(None, 8), ("", 8), ("2, 3", 2), ("GPU-0a", 1)])
def test_gpus_are_counted_as_far_as_they_are_visible(
    said: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if said is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    monkeypatch.setattr(command, "_gpu_files", lambda: ["/dev/nvidia0"] * 8)
    assert command.gpu_count() == count
    monkeypatch.setattr(command, "_gpu_files", list)
    assert command.gpu_count() == 0 and command.visible_gpus() is None, "a variable makes no GPUs"


@pytest.mark.parametrize("nodes", [8, 64])
def test_deepspeed_on_many_nodes_takes_the_environment_along(nodes: int, tmp_path: Path) -> None:
    made = command.deepspeed(
        "cogvlm_hpe",
        TRAIN,
        ranks=8 * nodes,
        port=7,
        threads=4,
        env={"A": "b"},
        hostfile=hostfile(tmp_path, nodes),
        nodes=nodes,
        python="/venv/bin/python",
    )
    assert words(made, "--num_nodes", str(nodes), "--num_gpus", "8", "--master_port", "7")
    start = made.argv.index("env")
    assert "OMP_NUM_THREADS=4" in made.argv[start:] and "A=b" in made.argv[start:]
    assert words(made, "/venv/bin/python", "-u", "-m", "cogvlm_hpe", *TRAIN)


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (8, 1), (64, 8), (512, 64)])
def test_mpirun(ranks: int, nodes: int, tmp_path: Path) -> None:
    file = hostfile(tmp_path, nodes) if nodes > 1 else None
    made = command.mpirun(["prog"], ranks=ranks, threads=2, env={"A": "b"}, hostfile=file, nodes=nodes)
    assert words(made, "mpirun", "-np", str(ranks)) and made.argv[-1] == "prog"
    assert made.env["OMP_NUM_THREADS"] == "2" and made.env["A"] == "b"
    assert ("-ppn" in made.argv) == (nodes > 1)
    if nodes > 1:
        assert made.argv[made.argv.index("-hosts") + 1].count(",") == nodes - 1


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (8, 1), (64, 8), (512, 64)])
def test_openmpi(ranks: int, nodes: int, tmp_path: Path) -> None:
    file = hostfile(tmp_path, nodes) if nodes > 1 else None
    made = command.mpirun(
        ["prog"], ranks=ranks, threads=2, env={"A": "b"}, flavour="openmpi", hostfile=file, nodes=nodes, as_root=True
    )
    assert words(made, "--oversubscribe", "--allow-run-as-root")
    assert words(made, "-x", "OMP_NUM_THREADS") and words(made, "-x", "A")
    assert words(made, "-npernode", str(ranks // nodes)) == (nodes > 1)


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (8, 1), (64, 8), (512, 64)])
def test_srun(ranks: int, nodes: int) -> None:
    how = {"mpi": "pmi2", "cpus_per_task": 7, "options": ["--container-image=/i.sqsh"]}
    made = command.srun(["prog"], ranks=ranks, nodes=nodes, threads=7, env={"A": "b"}, **how)
    assert words(made, "--nodes", str(nodes), "--ntasks", str(ranks), "--mpi=pmi2")
    assert words(made, "--container-image=/i.sqsh", "prog")
    assert "--kill-on-bad-exit=1" in made.argv and "--cpus-per-task=7" in made.argv
    assert made.env["OMP_NUM_THREADS"] == "7"


def test_mpich_under_slurm_talks_by_libfabric_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def netmod(mpi: str) -> str | None:
        made = command.srun(["prog"], ranks=2, nodes=2, threads=1, env={}, mpi=mpi)
        return made.env.get("MPIR_CVAR_CH4_NETMOD")

    monkeypatch.delenv("MPIR_CVAR_CH4_NETMOD", raising=False)
    assert (netmod("pmi2"), netmod("none"), netmod("pmix")) == ("ofi", None, None)
    monkeypatch.setenv("MPIR_CVAR_CH4_NETMOD", "ucx")
    assert netmod("pmi2") is None  # the user's own is inherited


def test_text_can_be_pasted_into_a_shell() -> None:
    assert Command(["prog", "x y.yaml"], {"A": "1 2"}).text() == "env 'A=1 2' prog 'x y.yaml'"


def test_ranks_that_do_not_spread_evenly_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="9 ranks on 2 machines"):
        command.mpirun(["prog"], ranks=9, threads=1, env={}, hostfile=hostfile(tmp_path, 2), nodes=2)


@pytest.mark.parametrize(("cpus", "ranks", "threads"), [(2, 1, 2), (2, 2, 1), (2, 4, 1), (96, 8, 12), (100, 8, 12)])
def test_threads_per_rank(cpus: int, ranks: int, threads: int) -> None:
    assert command.threads_per_rank(cpus, ranks) == threads


def test_mpirun_of_this_environment_is_found_and_known() -> None:
    assert command.mpi_flavour(command.find_mpirun()) in ("mpich", "openmpi")


def test_no_mpirun_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"no mpirun: .*pip install mpich"):
        command.find_mpirun()
