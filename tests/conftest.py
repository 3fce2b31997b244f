"""Fixtures for all rooms."""

import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tiny_source import TinySource

from launcher.comm import single
from shards.write import build

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


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
