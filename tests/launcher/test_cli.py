"""hpe-launch: which way it takes, and that asking it costs nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import cli
from launcher.errors import UsageError

NO_SLURM = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}


def launch(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", *words]
    return subprocess.run(command, env=NO_SLURM | env, capture_output=True, text=True, timeout=60)


def test_train_goes_through_deepspeed() -> None:
    done = launch(
        "train", "x.yaml", "--nproc", "2", "--run-dir", "r", "--train.stop_after", "4", "--resume", "--dry-run"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "/deepspeed --quiet --num_gpus 2 --master_port " in done.stdout
    assert done.stdout.endswith("--module cogvlm_hpe train --config x.yaml --run_dir r --train.stop_after 4 --resume\n")
    assert "OMP_NUM_THREADS=" in done.stdout


def test_preflight_goes_the_way_of_train() -> None:
    done = launch("preflight", "x.yaml", "--nproc", "2", "--deep", "--gpu-memory", "80", "--train.lr", "1", "--dry-run")
    assert "/deepspeed --quiet --num_gpus 2 --master_port " in done.stdout, done.stderr
    assert done.stdout.endswith("cogvlm_hpe preflight --config x.yaml --train.lr 1 --deep --gpu-memory 80\n")


def test_evaluate_and_shards_go_through_mpirun() -> None:
    evaluated = launch("evaluate", "--nproc", "2", "--model", "m", "--limit", "3", "--threads", "5", "--dry-run")
    assert "/mpirun -np 2 " in evaluated.stdout and "OMP_NUM_THREADS=" in evaluated.stdout
    assert evaluated.stdout.endswith("-m cogvlm_hpe evaluate --model m --limit 3 --threads 5\n")
    built = launch("shards", "build", "synthetic", "--out", "o", "--nproc", "3", "--threads", "4", "--dry-run")
    assert (
        "/mpirun -np 3 " in built.stdout
        and "OMP_NUM_THREADS=4" in built.stdout
        and built.stdout.endswith("-m shards build synthetic --out o\n")
    )


def job_of(tmp_path: Path, nodes: int, tasks: int, cpus: int) -> dict[str, str]:
    """What Slurm tells a job of so many nodes and tasks, with so many CPUs each; srun is there."""
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(tasks),
        "SLURM_CPUS_PER_TASK": str(cpus),
        "SLURM_JOB_NODELIST": "localhost",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }


def test_inside_slurm_everything_goes_through_srun(tmp_path: Path) -> None:
    allocation = job_of(tmp_path, nodes=2, tasks=16, cpus=6)
    trained = launch("train", "x.yaml", "--dry-run", **allocation)
    assert "srun --nodes 2 --ntasks 16 --mpi=none --kill-on-bad-exit=1 --cpus-per-task=6 " in trained.stdout
    assert "MASTER_ADDR=localhost" in trained.stdout and "OMP_NUM_THREADS=6" in trained.stdout
    assert "DS_ACCELERATOR" not in trained.stdout, "that this shell has no GPU says nothing of the nodes"
    assert "--mpi=pmi2" in launch("evaluate", "--dry-run", **allocation).stdout
    container = launch("train", "x.yaml", "--dry-run", **allocation, HPE_SRUN="--container-image='/a b.sqsh'")
    assert "--cpus-per-task=6 '--container-image=/a b.sqsh' " in container.stdout
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "16"}
    inside = launch("train", "x.yaml", "--dry-run", **allocation, **step)
    assert inside.returncode == 2 and "without srun" in inside.stderr


def test_more_ranks_than_a_job_has_cpus_start_without_srun_or_not_at_all(tmp_path: Path) -> None:
    job = job_of(tmp_path, nodes=1, tasks=1, cpus=8)
    job |= {"SLURM_JOB_CPUS_PER_NODE": "8", "SLURMD_NODENAME": "localhost"}
    train, evaluate = ["train", "x.yaml", "--nproc", "2", "--dry-run"], ["evaluate", "--nproc", "2", "--dry-run"]
    here = launch(*train, **job)
    assert "/deepspeed --quiet --num_gpus 2 " in here.stdout and "in a job of 8 CPUs: started by" in here.stderr
    for words, more in ((evaluate, {}), (train, {"SLURM_JOB_NUM_NODES": "2"}), (train, {"SLURMD_NODENAME": None})):
        place = {name: value for name, value in (job | more).items() if value}
        refused = launch(*words, **place)
        assert refused.returncode == 1 and "--nproc 2, 8 CPUs each, in a job of 8 CPUs" in refused.stderr
    roomy = launch(*train, **job | {"SLURM_JOB_CPUS_PER_NODE": "8(x2)"})
    assert "srun --nodes 1 --ntasks 2 " in roomy.stdout


@pytest.mark.parametrize(
    ("code", "stopped", "ends"), [(2, False, 2), (2, True, 2), (-2, False, 1), (-2, True, 85), (1, True, 85)]
)
def test_a_check_that_is_ended_on_request_is_no_mistake(code: int, stopped: bool, ends: int) -> None:
    assert cli._code_of_check(code, stopped) == ends


def test_a_request_during_the_check_stops_the_run_before_it_began(tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nkill -INT $PPID\nsleep 0.2\nkill -INT $$\n")
    slow.chmod(0o755)
    code = "import sys; from launcher import cli; sys.executable = sys.argv[1]\n"
    code += "cli.build = lambda *_: cli.Command(['false'])\nsys.exit(cli.main(['train', 'x.yaml', '--nproc', '1']))"
    done = subprocess.run([sys.executable, "-c", code, slow], env=NO_SLURM, capture_output=True, timeout=60)
    assert done.returncode == 85, done.stderr


def test_ranks_of_a_hostfile_are_ended_on_request_and_that_is_said(tmp_path: Path) -> None:
    code = "import sys; from launcher import cli\ncli._check = lambda *_: 0\n"
    code += "cli.build = lambda *_: cli.Command(['sh', '-c', 'kill -INT $PPID; exec sleep 30'])\n"
    code += "sys.exit(cli.main(['train', 'x.yaml', '--nproc', '1', '--hostfile', 'h', '--run-dir', sys.argv[1]]))"
    words = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(words, env=NO_SLURM, capture_output=True, text=True, timeout=25)
    assert done.returncode == 1 and "killed by SIGINT" in done.stderr
    assert "ends the ranks of a hostfile and saves nothing" in done.stderr and "asking the ranks" not in done.stderr


def test_under_mpirun_it_starts_no_ranks_of_ranks() -> None:
    ranks = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    inside = launch("evaluate", "--model", "m", "--dry-run", **ranks)
    assert inside.returncode == 2 and "under mpirun: it starts the ranks itself" in inside.stderr


def test_merge_is_one_process() -> None:
    assert launch("merge", "--base", "b", "--dry-run").stdout.endswith("-m cogvlm_hpe merge --base b\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "x.yaml", "--nprc", "2"], "--nprc 2: not an option"),
        (["train", "x.yaml", "--train.lr"], "--train.lr: a config key needs a value"),
        (["shards", "--nproc", "0"], "--nproc 0: at least 1"),
        (["train", "x.yaml", "--hostfile", "nowhere", "--nproc", "2"], "nowhere: no such file"),
        (["tensorboard", "nowhere"], "nowhere: no such run folder"),
        (["tensorboard", ".", "--port", "70000"], "--port 70000: a port is a number from 1 to 65535"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(words: list[str], said: str) -> None:
    done = launch(*words)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_a_hostfile_without_machines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# none yet\n")
    with pytest.raises(UsageError, match="hosts: names no machine"):
        cli._nodes(tmp_path / "hosts", 2, given=True)


def test_overrides_are_parted_from_our_own_words() -> None:
    ours, theirs = cli.split_overrides("train --train.lr 1e-4 f.yaml --a.b=c --nproc 2 --resume --t.bias -1".split())
    assert ours == "train f.yaml --nproc 2".split()
    assert theirs == "--train.lr 1e-4 --a.b=c --resume --t.bias -1".split()
    with pytest.raises(UsageError):
        cli.split_overrides(["train", "--train.lr", "--resume"])


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["evaluate", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
from launcher import cli
try:
    cli.main({words})
except SystemExit as end:
    assert end.code == 0
heavy = {{"torch", "deepspeed", "transformers", "mpi4py", "numpy", "rich"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage: hpe-launch" in done.stdout, done.stderr
