"""Result folders for the tests of reports."""

import shutil
from pathlib import Path

import pytest
from results_made import make_result
from tiny_source import TinySource

from launcher.comm import single
from shards.write import build


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two systems on two sets: one errs by 10 degrees, one by 30 and blends four answers."""
    place = tmp_path_factory.mktemp("made")
    for split in ("train", "test"):
        build(TinySource(samples=24, split=split), place / split, single(), 5)
        make_result(place / "runs" / f"good-{split}", place / split, "good", 10.0)
        make_result(place / "runs" / f"poor-{split}", place / split, "poor", 30.0, blended=4)
    return place / "runs"


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> list[Path]:
    """`made`, copied, so that a test may damage it."""
    shutil.copytree(made, tmp_path / "runs")
    return [tmp_path / "runs" / f"{name}-{split}" for split in ("train", "test") for name in ("good", "poor")]
