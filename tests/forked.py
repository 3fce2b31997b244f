"""Ranks as forks of one process that has imported all that training needs: a start takes a second, not ten.

They are processes of their own, meet through gloo and can be killed and signalled like any other; what starts them is
not DeepSpeed's launcher but `Ranks`, which ends all where one has failed.
"""

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ports import next_port

from launcher.errors import EXIT_STOPPED

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard", "cogvlm_hpe.train.setup"]
)


class Ranks:
    """`size` ranks at work(*arguments), their environment as torchrun sets it; `said` is the file for their output."""

    def __init__(self, size: int, work: Callable[..., int | None], *arguments: Any, said: Path) -> None:
        port = next_port()
        self._said = said
        said.write_text("")
        worlds = [
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            for rank in range(size)
        ]
        self._processes = [
            _CONTEXT.Process(target=_run, args=(world if size > 1 else {}, said, work, arguments)) for world in worlds
        ]
        for process in self._processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        """By rank."""
        return [process.pid for process in self._processes if process.pid is not None]

    @property
    def said(self) -> str:
        """All that they have written to stdout and stderr."""
        return self._said.read_text()

    def poll(self) -> int | None:
        """The exit code once all have left; where one has failed the others are ended, and its code counts."""
        codes = [process.exitcode for process in self._processes]
        failed = [code for code in codes if code not in (None, 0, EXIT_STOPPED)]
        if failed:
            self.kill()
            return min(failed)  # a signal, which is negative, before what it made of the others
        return None if None in codes else max(code or 0 for code in codes)

    def wait(self, timeout_s: float = 500.0) -> int:
        """The exit code."""
        deadline_s = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > deadline_s:
                self.kill()
                raise TimeoutError(f"no end after {timeout_s:g} s: {self.said}")
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        """End what is left."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _run(world: dict[str, str], said: Path, work: Callable[..., int | None], arguments: Sequence[Any]) -> None:
    handle = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(world)
    gc.freeze()  # ZeRO-3's engine collects garbage: it need not look through all that was imported
    sys.exit(work(*arguments))


def train(words: Sequence[str], ranks: int, said: Path) -> Ranks:
    """`cogvlm-hpe train WORDS` on so many ranks, without a look at the machine first."""
    return Ranks(ranks, _train, [*words, "--skip-preflight"], said=said)


def _train(words: list[str]) -> int:
    from cogvlm_hpe.cli import main

    sys.argv = ["cogvlm-hpe", "train", *words]
    return main()
