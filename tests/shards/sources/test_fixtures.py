"""Every source reads a data set in the official format: fixture, build and verify, as a user would go."""

import subprocess
import sys
from pathlib import Path

import pytest

from shards.cli import main
from shards.sources import SOURCES
from shards.sources.fixtures import FIXTURES, FOLDER, build_words

NEEDS_NO_FILES = {"synthetic"}


def test_every_source_has_a_fixture() -> None:
    assert set(FIXTURES) == set(SOURCES) - NEEDS_NO_FILES


@pytest.mark.parametrize("name", FIXTURES)
def test_a_fixture_is_built_and_verified_without_findings(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "data set", tmp_path / "shards"
    assert main(["fixture", name, str(folder)]) == 0
    assert f"build {name}" in capsys.readouterr().out
    assert any(path.is_file() for path in folder.rglob("*"))
    assert main([*build_words(name, folder), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["verify", str(out)]) == 0, capsys.readouterr().out
    assert "good (every byte checked)" in capsys.readouterr().out


@pytest.mark.parametrize("name", FIXTURES)
def test_a_data_set_that_is_not_there_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "not here"
    assert any(FOLDER in word for word in FIXTURES[name])
    assert main([*build_words(name, nowhere), "--out", str(tmp_path / "shards")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and str(nowhere) in said[0], said
    assert not (tmp_path / "shards").exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    assert main(["fixture", next(iter(FIXTURES)), str(tmp_path)]) == 1
    assert "not overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_name_that_does_not_exist_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fixture", "imagenet", "somewhere"])
    assert end.value.code == 2 and "imagenet" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from shards.cli import main
try:
    main(["fixture", "--help"])
except SystemExit as end:
    assert end.code == 0
assert not {"numpy", "PIL", "scipy", "torch", "defusedxml", "mpi4py"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "refcoco" in done.stdout
