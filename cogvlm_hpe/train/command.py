"""`cogvlm-hpe train`: one rank's work, started by a launcher."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cogvlm_hpe import config as configs
from cogvlm_hpe.config import RunConfig
from launcher.errors import UsageError
from launcher.supervise import StopFlag


@dataclass(frozen=True)
class Flags:
    """What a start is asked for beside its config."""

    resume: bool
    allow_change: bool
    check: bool
    print_trainable: bool
    skip_preflight: bool = False


_MEET_S = 1800.0  # for loading a base from a slow disk
HELP = "train an adapter, or a whole base: one rank's work, started by a launcher"
EPILOG = """starting it
  hpe-launch train FILE --nproc 2                          finds the way itself
  deepspeed --num_gpus 2 --module cogvlm_hpe train --config FILE
  cogvlm-hpe train --config FILE                           one rank
more keys: --adapter.help, --shards.train.help, --shards.val.help, --train.auxiliary.help
exit code 85: stopped on request, resumable with --resume"""
_ONLY_LOOKS = {"--check", "--print-trainable", "--print_config", "--help", "-h"}


def make_parser(prog: str = "cogvlm-hpe train") -> Any:
    """Typed parser over RunConfig: `--config FILE`, then any key as `--section.key VALUE`."""
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        pass

    parser = ArgumentParser(prog=prog, description=HELP, epilog=EPILOG, exit_on_error=False, formatter_class=Formatter)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; keys on the command line win over it")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint of run_dir")
    parser.add_argument("--allow-change", action="store_true", help="resume although keys changed that matter")
    parser.add_argument("--check", action="store_true", help="check config and command line, and leave")
    parser.add_argument("--print-trainable", action="store_true", help="count what would train, by group, and leave")
    parser.add_argument("--skip-preflight", action="store_true", help="start without looking at files, disk, network")
    parser.add_class_arguments(RunConfig)
    return parser


def parse(argv: list[str]) -> tuple[RunConfig, Flags]:
    """Config and flags of a command line. Raises UsageError in one line."""
    from jsonargparse import ArgumentError

    parser = make_parser()
    try:
        namespace = parser.parse_args(argv)
        flags = Flags(*(namespace.pop(f.name) for f in fields(Flags)))
        namespace.pop("config")
        built = parser.instantiate(namespace)
        config = RunConfig(**vars(built))
    except ArgumentError as error:
        raise UsageError(f"{' '.join(str(error).split())} (cogvlm-hpe train --help lists all keys)") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"the config does not make a run: {' '.join(str(error).split())}") from None
    configs.check(config)
    return config, flags


def parse_file(path: Path) -> RunConfig:
    """The config a run folder recorded."""
    return parse(["--config", str(path)])[0]


def patience_s(config: RunConfig) -> float:
    """Seconds that ranks wait for each other at most: longer than the watchdog, which can say more."""
    return max(_MEET_S, 2 * config.train.timeout_s)


def main(argv: list[str]) -> int:
    """Parse, set up, loop."""
    stop = None if _ONLY_LOOKS & {*argv} else StopFlag()
    config, flags = parse(argv)
    if flags.check:
        return 0
    if flags.print_trainable:
        from cogvlm_hpe.train.adapter import count_trainable

        print(count_trainable(config))
        return 0
    assert stop is not None, "it does more than look"

    from cogvlm_hpe.train.loop import run_loop
    from cogvlm_hpe.train.setup import setup
    from launcher.comm import from_torch
    from launcher.world import discover

    world = discover()
    comm = from_torch(world, patience_s(config))
    if not flags.skip_preflight:
        from cogvlm_hpe.preflight import check_start

        check_start(config, flags, world, comm)
    run = setup(config, world, comm, resume=flags.resume, allow_change=flags.allow_change)
    try:
        return run_loop(run, stop)
    finally:
        run.monitor.close()
