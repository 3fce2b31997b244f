"""`hpe-launch`: starts the other programs on as many ranks as asked, in the way that fits where it runs."""

import argparse
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import command, world
from launcher.command import Command
from launcher.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USAGE, UsageError, UserError, run_main

if TYPE_CHECKING:
    from launcher.supervise import Supervisor

PROGRAM = "hpe-launch"
_HELP = """\
Starts the project's programs on many ranks: inside a Slurm allocation with srun; elsewhere training with the
DeepSpeed launcher, evaluation and shard building with mpirun. The variable HPE_SRUN holds more options for srun."""
_COMMANDS = {
    "train": "training: config keys in the form --train.lr 1e-4, --resume and --skip-preflight are passed on",
    "preflight": "whether a training run would go well, on the ranks that would train; --deep takes two real steps",
    "evaluate": "evaluation: every option it does not know is passed on to `cogvlm-hpe evaluate`",
    "shards": "shard work: every word it does not know is passed on to `hpe-shards` (build, verify, …)",
    "merge": "the merge job, one process with all CPUs: options are passed on to `cogvlm-hpe merge`",
    "status": "what a run's folder says of it: step, time left, losses, restarts, age of the checkpoint",
    "tensorboard": "TensorBoard on run folders, here or, inside a Slurm job, with the tunnel to type",
}
_ON_TRAINING_RANKS = ("train", "preflight")
_TRAIN_FLAGS = {"--resume", "--allow-change", "--skip-preflight", "--print_config"}
_RESTARTS = 3


@dataclass(frozen=True)
class Place:
    """What the machine and its scheduler offer."""

    cpus: int
    gpus: int
    slurm: Mapping[str, str] | None  # the variables of the allocation we are in

    @classmethod
    def here(cls) -> "Place":
        """Looks at this machine. Raises UsageError where it is one of many ranks, each of which would start ranks."""
        if (world.promised_size() or 1) > 1:
            starter = "srun" if world.discover().kind == "slurm" else "mpirun"
            raise UsageError(f"{PROGRAM} under {starter}: it starts the ranks itself; run it once, without {starter}")
        slurm = {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}
        cpus = len(os.sched_getaffinity(0))
        return cls(cpus, command.gpu_count(), slurm if "SLURM_JOB_ID" in slurm else None)

    def ranks(self, default_per_gpu_free: int) -> int:
        """How many ranks, where the user does not say: Slurm's tasks, or one per GPU, or the given number."""
        if self.slurm:
            return int(self.slurm.get("SLURM_NTASKS", "1"))
        return self.gpus or default_per_gpu_free


def main(argv: list[str] | None = None) -> int:
    """Run one command line; the exit code."""
    return run_main(PROGRAM, lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    arguments, rest = _parse(argv)
    if arguments.command == "status":
        return _status(arguments, rest)
    if arguments.command == "tensorboard":
        return _tensorboard(arguments, rest)
    place = Place.here()
    started = build(arguments, rest, place)
    if arguments.dry_run:
        print(started.text())
        return 0
    from launcher import supervise

    graceful = arguments.command == "train" and arguments.hostfile is None
    if arguments.command == "train" and not graceful:
        said = "a request to stop (Ctrl-C) ends the ranks of a hostfile and saves nothing"
        print(f"{PROGRAM}: {said}; --resume goes on from the last of train.save_every's checkpoints", file=sys.stderr)
    with supervise.Supervisor(graceful=graceful) as supervisor:
        if arguments.command in _ON_TRAINING_RANKS and "--print_config" not in rest:
            code = _check(arguments, rest)
            if code:
                return _code_of_check(code, stopped=arguments.command == "train" and supervisor.asked)
            if arguments.command == "train":
                return _train(arguments, rest, place, started, supervisor)
        return supervisor.run(started)


def _train(
    arguments: argparse.Namespace, rest: list[str], place: Place, started: Command, supervisor: "Supervisor"
) -> int:
    """Run the training to its end, over crashes. A start after one takes a port that is free by then."""
    import yaml

    from launcher import status

    run_dir = arguments.run_dir or yaml.safe_load(Path(arguments.config).read_text(encoding="utf-8"))["run_dir"]
    again = [*rest, *(["--resume"] if "--resume" not in rest else [])]
    return supervisor.run_again(
        lambda resume: build(arguments, again, place) if resume else started,
        lambda: status.progress(Path(run_dir)),
        arguments.max_restarts,
    )


def _check(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Exit code of the program's own check of its config.

    Asked once, before there are ranks: of several that fail, srun ends the slower ones and loses the exit code.
    """
    run_dir = ["--run_dir", arguments.run_dir] if arguments.run_dir else []
    words = ["train", "--config", arguments.config, *run_dir, *rest, "--check"]
    return subprocess.run([sys.executable, "-m", "cogvlm_hpe", *words]).returncode


def _code_of_check(code: int, stopped: bool) -> int:
    """Ours, where the check ended with `code`: a request to stop may have ended it, but a mistake stays one."""
    if stopped and code != EXIT_USAGE:
        return EXIT_STOPPED
    return code if code > 0 else EXIT_FAILURE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=_HELP, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in _COMMANDS.items():
        one = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name in _ON_TRAINING_RANKS:
            one.add_argument("config", metavar="FILE", help="the YAML file of the stage")
            one.add_argument("--run-dir", metavar="DIR", help="where the run goes (default: run_dir of FILE)")
        if name == "train":
            text = "how often to start a crashed run again, from its last checkpoint (default: %(default)s)"
            one.add_argument("--max-restarts", type=int, default=_RESTARTS, metavar="N", help=text)
        if name == "preflight":
            one.add_argument("--deep", action="store_true", help="two real steps and a checkpoint as well")
            one.add_argument("--gpu-memory", metavar="GB", help="of one GPU (default: what is free)")
        if name == "status":
            one.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
            one.add_argument("--json", action="store_true", help="print JSON, one object a run")
            continue
        if name == "tensorboard":
            one.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or a folder that holds some")
            one.add_argument("--port", type=int, default=6006, help="first port to try (default: 6006)")
        elif name != "merge":
            alone = "one per CPU" if name == "shards" else "1"
            text = f"ranks (default: Slurm's tasks, or one per GPU; without one, {alone})"
            one.add_argument("--nproc", type=int, metavar="N", help=text)
            one.add_argument("--hostfile", type=Path, metavar="FILE", help="machines, one `host slots=N` a line")
        if name in ("evaluate", "shards"):
            one.add_argument("--mpi", metavar="TYPE", default="pmi2", help="srun's --mpi (default: pmi2)")
        if name == "evaluate":
            one.set_defaults(threads=None)  # it has --threads of its own, on which its bytes depend
        elif name != "tensorboard":
            default = "all" if name == "merge" else "an equal share"
            one.add_argument("--threads", type=int, metavar="N", help=f"CPU threads of a rank (default: {default})")
        one.add_argument("--dry-run", action="store_true", help="print the exact command and run nothing")
    return parser


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    ours, overrides = split_overrides(argv) if argv[:1] and argv[0] in _ON_TRAINING_RANKS else (argv, [])
    parser = _parser()
    arguments, unknown = parser.parse_known_args(ours)
    if arguments.version:
        from importlib.metadata import version

        print(f"{PROGRAM} {version('cogvlm-hpe')}")
        raise SystemExit(0)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if arguments.command in _ON_TRAINING_RANKS and unknown:
        said = f"{' '.join(unknown)}: not an option of {PROGRAM} {arguments.command}"
        raise UsageError(f"{said}; config keys look like --train.lr 1e-4")
    for name in ("nproc", "threads"):
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: at least 1 is needed")
    return arguments, overrides or unknown


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Part the training program's own words (`--train.lr 1e-4`, `--train.lr=1e-4`, `--resume`) from hpe-launch's."""
    ours: list[str] = []
    theirs: list[str] = []
    words = iter(argv)
    for word in words:
        name = word.partition("=")[0]
        if name in _TRAIN_FLAGS:
            theirs.append(word)
        elif name.startswith("--") and "." in name:
            value = [] if "=" in word else [next(words, "")]
            if value and (not value[0] or value[0].startswith("--")):
                raise UsageError(f"{word}: a config key needs a value, as in {word} 1e-4")
            theirs += [word, *value]
        else:
            ours.append(word)
    return ours, theirs


def build(arguments: argparse.Namespace, rest: list[str], place: Place) -> Command:
    """The command that carries out the parsed command line at `place`. Raises UserError where a program is missing."""
    if arguments.command == "merge":
        env = command.threads_env(arguments.threads or place.cpus)
        return Command([sys.executable, "-m", "cogvlm_hpe", "merge", *rest], env)
    module, words = _program(arguments, rest)
    ranks = arguments.nproc or place.ranks(place.cpus if arguments.command == "shards" else 1)
    if place.slurm and not _beyond_srun(arguments, place.slurm):
        return _with_srun(arguments, module, words, ranks, place)
    env = {} if arguments.hostfile else command.accelerator_env()
    nodes = _nodes(arguments.hostfile, ranks, arguments.nproc is not None)
    threads = arguments.threads or command.threads_per_rank(place.cpus, max(1, ranks // nodes))
    if arguments.command in _ON_TRAINING_RANKS:
        return command.deepspeed(
            module,
            words,
            ranks=ranks,
            port=world.free_port(),
            threads=threads,
            env=env,
            hostfile=arguments.hostfile,
            nodes=nodes,
            gpus=command.visible_gpus(),
            program=command.find_program("deepspeed", "pip install deepspeed"),
        )
    mpirun = command.find_mpirun()
    return command.mpirun(
        [sys.executable, "-m", module, *words],
        ranks=ranks,
        threads=threads,
        env=env,
        flavour=command.mpi_flavour(mpirun),
        hostfile=arguments.hostfile,
        nodes=nodes,
        as_root=os.geteuid() == 0,
        program=mpirun,
    )


def _program(arguments: argparse.Namespace, rest: list[str]) -> tuple[str, list[str]]:
    if arguments.command == "shards":
        return "shards", rest
    if arguments.command == "evaluate":
        return "cogvlm_hpe", ["evaluate", *rest]
    run_dir = ["--run_dir", arguments.run_dir] if arguments.run_dir else []
    words = [arguments.command, "--config", arguments.config, *run_dir, *rest]
    if arguments.command == "preflight":
        words += ["--deep"] * arguments.deep + (["--gpu-memory", arguments.gpu_memory] if arguments.gpu_memory else [])
    return "cogvlm_hpe", words


def _beyond_srun(arguments: argparse.Namespace, slurm: Mapping[str, str]) -> bool:
    """Whether --nproc asks for more CPUs than the job has: srun refuses that, DeepSpeed's launcher shares them.

    Raises UserError where the ranks cannot start without srun either: only on the one node of a job.
    """
    ranks, cpus = arguments.nproc or 0, sum(world.per_node(slurm.get("SLURM_JOB_CPUS_PER_NODE", "")))
    each = int(slurm.get("SLURM_CPUS_PER_TASK", "1"))
    if not cpus or ranks <= int(slurm.get("SLURM_NTASKS", "1")) or ranks * each <= cpus:
        return False
    said = f"--nproc {ranks}, {each} CPUs each, in a job of {cpus} CPUs"
    on_its_node = slurm.get("SLURM_JOB_NUM_NODES", "1") == "1" and "SLURMD_NODENAME" in os.environ
    if not on_its_node or arguments.command not in _ON_TRAINING_RANKS:
        raise UserError(f"{said}: srun has no room for them; submit it with --ntasks={ranks}, or lower --nproc")
    print(f"{PROGRAM}: {said}: started by DeepSpeed's launcher, not by srun", file=sys.stderr)
    return True


def _with_srun(arguments: argparse.Namespace, module: str, words: list[str], ranks: int, place: Place) -> Command:
    assert place.slurm is not None
    nodes = int(place.slurm.get("SLURM_JOB_NUM_NODES", "1"))
    cpus = place.slurm.get("SLURM_CPUS_PER_TASK")
    threads = arguments.threads or (int(cpus) if cpus else command.threads_per_rank(place.cpus, -(-ranks // nodes)))
    port = world.free_port(world.slurm_port(int(place.slurm["SLURM_JOB_ID"])))
    head = os.environ.get("MASTER_ADDR") or _address(
        world.first_host(place.slurm.get("SLURM_JOB_NODELIST", "localhost"))
    )
    return command.srun(
        [sys.executable, "-m", module, *words],
        ranks=ranks,
        nodes=min(nodes, ranks),
        threads=threads,
        env={"MASTER_ADDR": head, "MASTER_PORT": os.environ.get("MASTER_PORT") or str(port)},
        mpi="none" if arguments.command in _ON_TRAINING_RANKS else arguments.mpi,
        cpus_per_task=int(cpus) if cpus else None,
        options=_srun_options(os.environ.get("HPE_SRUN", "")),
        program=command.find_program("srun", "inside a Slurm job it must be on PATH"),
    )


def _srun_options(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"HPE_SRUN={text}: not words of a shell ({error}); mend it in slurm/site.conf") from None


def _address(node: str) -> str:
    """Where `node` can be reached; some clusters' node names are known to Slurm only."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        said = subprocess.run(["scontrol", "-o", "show", "node", node], capture_output=True, text=True).stdout
        words = (word.partition("=") for word in said.split())
        return next((value for name, _, value in words if name == "NodeAddr"), node)


def _nodes(hostfile: Path | None, ranks: int, given: bool) -> int:
    if hostfile is None:
        return 1
    if not hostfile.is_file():
        raise UsageError(f"--hostfile {hostfile}: no such file; write one `host slots=N` a line")
    if not given:
        raise UsageError("--hostfile without --nproc: say how many ranks all machines together run")
    machines = command.hosts(hostfile.read_text())
    if not machines:
        raise UsageError(f"--hostfile {hostfile}: names no machine; write one `host slots=N` a line")
    return min(ranks, len(machines))


def _status(arguments: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UsageError(f"{rest[0]}: not an option of {PROGRAM} status; it takes run folders and --json")
    from launcher import status

    show = status.as_json if arguments.json else status.describe
    for run in arguments.runs:
        print(show(status.read_status(Path(run))))
    return 0


def _tensorboard(arguments: argparse.Namespace, rest: list[str]) -> int:
    missing = [run for run in arguments.runs if not Path(run).is_dir()]
    if missing:
        raise UsageError(f"{missing[0]}: no such run folder; name one that holds tensorboard/ or runs that do")
    if not 1 <= arguments.port <= world.LAST_PORT:
        raise UsageError(f"--port {arguments.port}: a port is a number from 1 to {world.LAST_PORT}")
    port = world.free_port(arguments.port)
    spec = ",".join(f"{Path(run).resolve().name}:{run}" for run in arguments.runs)
    where = ["--logdir", arguments.runs[0]] if len(arguments.runs) == 1 else ["--logdir_spec", spec]
    started = Command([sys.executable, "-m", "tensorboard.main", *where, "--port", str(port), *rest])
    if arguments.dry_run:
        print(started.text())
        return 0
    if "SLURM_JOB_ID" in os.environ:
        print(f"from your machine: ssh -L {port}:localhost:{port} {socket.gethostname()}", file=sys.stderr)
    from launcher import supervise

    return supervise.run(started, graceful=False)
