"""Files that are either complete or not there: temporary name, fsync, rename."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.errors import UserError


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside `final`; on success it is made durable and renamed to `final`, else removed.

    Raises UserError if `final` exists and is not an empty folder.
    """
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise UserError(f"{final}: exists already and is not overwritten; remove it or choose another folder")
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(final)
    temporary.mkdir()
    try:
        yield temporary
        publish_folder(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_folder(temporary: Path, final: Path) -> None:
    """Make a finished folder durable, readable as the user's umask says, and rename it to `final`."""
    _share(temporary)
    sync_folder(temporary)
    os.rename(temporary, final)
    _sync(final.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as JSON; a reader sees the old file or the new one, never half of it."""
    write_text_atomic(path, json.dumps(value, indent=2) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file; a reader sees the old file or the new one, never half of it."""
    temporary = _sibling(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make every file and folder below `folder` durable."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _share(folder: Path) -> None:
    """Give files the rights the user's umask says; some libraries (safetensors) make them private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o666 & ~umask))


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
