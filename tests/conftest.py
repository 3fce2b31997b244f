"""Fixtures for all rooms."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import hypothesis
import pytest

os.environ["OMP_NUM_THREADS"] = "1"

from tiny_source import TinySource

from launcher.comm import single
from shards.write import build

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

_SHARED = Path("/dev/shm")
_BEFORE = pytest.StashKey[set[Path]]()


def pytest_configure(config: pytest.Config) -> None:
    """Remember what others have left in shared memory."""
    config.stash[_BEFORE] = _left_by_mpich()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what ranks that were killed have left of MPICH's shared memory, 2 MB each; the last process does."""
    if hasattr(config, "workerinput"):
        return
    held = _held()
    for path in _left_by_mpich() - config.stash[_BEFORE]:
        if str(path) not in held:
            with contextlib.suppress(OSError):  # another user's, or gone
                path.unlink()


def _left_by_mpich() -> set[Path]:
    return set(_SHARED.glob("mpich_shm_*")) if _SHARED.is_dir() else set()


def _held() -> set[str]:
    """Files in shared memory that a process has mapped."""
    held = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            lines = maps.read_text(errors="replace").splitlines()
            held |= {line[line.index(f"{_SHARED}/") :] for line in lines if f"{_SHARED}/" in line}
    return held


def pytest_collection_finish() -> None:
    """Start the one fork server that a process has where tests fork ranks: readers would start one that has less."""
    if "forked" in sys.modules:
        forkserver.ensure_running()


@pytest.fixture
def tiny_source() -> TinySource:
    """Twelve small drawn images with heads and an object each."""
    return TinySource()


@pytest.fixture
def tiny_set(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Builds small shard sets: `tiny_set(samples=20, split="test", samples_per_shard=8)` gives the set's folder."""
    made = 0

    def make(samples_per_shard: int = 5, **source_options: object) -> Path:
        nonlocal made
        made += 1
        out = tmp_path / f"set-{made}"
        build(TinySource(**source_options), out, single(), samples_per_shard)  # type: ignore[arg-type]
        return out

    yield make
