"""Complete or not there."""

import hashlib
import json
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.files import atomic_folder, sha256, write_json_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "set"
    with atomic_folder(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert not final.exists()
    assert (final / "sub" / "a").read_text() == "a"
    assert names(final.parent) == ["set"]


def test_folder_of_failed_work_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "set") as folder:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_folder_with_content_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").touch()
    with pytest.raises(UserError, match="set: exists already"), atomic_folder(tmp_path / "set"):
        pass
    assert names(tmp_path / "set") == ["mine"]


def test_json_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json_atomic(path, {"a": [1, 2.5, None]})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
    assert names(tmp_path) == ["x.json"]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()
