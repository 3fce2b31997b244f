"""Builds one small set again and again, killed (-9) before its first, second, … file operation, and finishes it.

A child process for each build; the operations are those Python itself reports (its audit events). Prints how many
kills there were; exits with 1 and a line where a killed build left a set that can be seen, or ended in other bytes.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import webdataset.writer  # noqa: F401  (once, before the children)
from tiny_source import TinySource

from launcher.comm import single
from shards.write import build

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def child(out: Path, kill_at: int | None) -> int:
    """Build in a process of its own; its exit status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in OPERATIONS and str(out) in str(arguments[0]):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.addaudithook(hook)
    build(TinySource(samples=9), out, single(), samples_per_shard=5, max_shard_mb=0.0122)
    os._exit(0)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished set."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> int:
    folder = Path(sys.argv[1])
    assert child(folder / "whole", None) == 0
    whole = contents(folder / "whole")
    assert len(whole) > 5, "the ranges are cut into several tars"
    for kill_at in range(1, 1000):
        out = folder / "killed"
        status = child(out, kill_at)
        if status == 0:
            print(kill_at - 1)
            return 0
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        visible = (out / "index.json").exists()
        if visible and {name: data for name, data in contents_of(out).items() if name in whole} != whole:
            print(f"killed at operation {kill_at}: an unfinished set can be seen")
            return 1
        if child(out, None) != 0 or contents(out) != whole:
            print(f"killed at operation {kill_at}: the build that went on ended in other bytes")
            return 1
        shutil.rmtree(out)
    return 1


def contents_of(folder: Path) -> dict[str, bytes]:
    """Files of a folder that may hold folders too."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


if __name__ == "__main__":
    sys.exit(main())
