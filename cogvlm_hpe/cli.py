"""`cogvlm-hpe`: finds the sub-command and gets out of its way. Nothing heavy is imported before one is chosen."""

import argparse
import sys
from importlib import import_module, metadata

from launcher.errors import UsageError, run_main

PROGRAM = "cogvlm-hpe"

# Each module has HELP and either main(argv), or add_arguments(parser) and run(args) and perhaps an EPILOG.
COMMANDS = {
    "train": "cogvlm_hpe.train.command",
    "merge": "cogvlm_hpe.merge.command",
    "evaluate": "cogvlm_hpe.evaluate.command",
    "report": "cogvlm_hpe.evaluate.report_command",
    "predict": "cogvlm_hpe.predict",
    "label": "cogvlm_hpe.label",
    "train-cnn": "cogvlm_hpe.evaluate.baselines.train_cnn",
    "plan": "cogvlm_hpe.train.plan_command",
    "preflight": "cogvlm_hpe.preflight",
    "convert": "cogvlm_hpe.convert",
    "demo": "cogvlm_hpe.demo",
    "paper": "cogvlm_hpe.paper.command",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line; the exit code."""
    return run_main(PROGRAM, lambda: _dispatch(sys.argv[1:] if argv is None else argv))


def _dispatch(argv: list[str]) -> int:
    # The deepspeed launcher puts its own flag before the program's arguments.
    argv = argv[1:] if argv and argv[0].startswith("--local_rank") else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"{PROGRAM} {metadata.version('cogvlm-hpe')}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        raise UsageError(f"{name!r}: no such command; one of {', '.join(COMMANDS)}")
    module = import_module(COMMANDS[name])
    if hasattr(module, "main"):
        return module.main(rest)
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=module.HELP,
        epilog=getattr(module, "EPILOG", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(rest))


def _help() -> str:
    lines = [f"usage: {PROGRAM} [--version] COMMAND …", "", "A vision language model that reads head pose.", ""]
    for name, module in COMMANDS.items():
        lines.append(f"  {name:<9} {import_module(module).HELP}")
    return "\n".join([*lines, "", f"{PROGRAM} COMMAND --help says more. Shards: hpe-shards. Starting: hpe-launch."])
