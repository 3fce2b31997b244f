"""A bounded cache of whole files on this machine, shared by all its processes and ranks.

A file is complete or not there: it is written beside its name, checked against its hash, then renamed. Its writer holds
a lock that ends with the process, so others wait and nobody fetches twice. Room is made by dropping what was read
longest ago; the total never exceeds the limit, since a file takes its room before it is fetched.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from launcher import files
from launcher.errors import UserError

FOLDER_VARIABLE, GIGABYTES_VARIABLE = "HPE_SHARDS_CACHE", "HPE_SHARDS_CACHE_GB"
DEFAULT_GB = 50.0
_GIGABYTE = 1_000_000_000
_PART = ".part"
_BLOCK = 1 << 20
_NOTE_WIDTH = 20
_TOUCH_EVERY_S = 5.0
_WAIT_S = 0.05

Opener = Callable[[], AbstractContextManager[IO[bytes]]]


class Damaged(Exception):
    """What arrived is not what was announced."""


@dataclass(frozen=True)
class Cache:
    """Files below `folder`, tars of at most `most_bytes` together. Indexes are not counted: they stay."""

    folder: Path
    most_bytes: int

    @staticmethod
    def from_environment() -> "Cache":
        """HPE_SHARDS_CACHE (a folder on a local disk; default ~/.cache/hpe-shards) and HPE_SHARDS_CACHE_GB (50)."""
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(os.environ.get(FOLDER_VARIABLE) or base / "hpe-shards")
        text = os.environ.get(GIGABYTES_VARIABLE) or str(DEFAULT_GB)
        try:
            gigabytes = float(text)
        except ValueError:
            gigabytes = -1.0
        if not 0.0 < gigabytes < float("inf"):
            raise UserError(f"{GIGABYTES_VARIABLE} {text!r}: it must be a number of gigabytes, such as 50")
        return Cache(folder.absolute(), int(gigabytes * _GIGABYTE))

    @staticmethod
    def touch(handle: int) -> None:
        """The open file is in use: it is dropped later than those that are not."""
        if time.time() - os.fstat(handle).st_mtime > _TOUCH_EVERY_S:
            with contextlib.suppress(OSError):
                os.utime(handle)

    def place(self, target: Path, data: bytes) -> None:
        """Write a small file that stays, complete or not there; any number of processes may at once."""
        with contextlib.suppress(OSError):
            if target.read_bytes() == data:
                return
        temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}")
        with _room_said(self.folder):
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)

    def bring(self, target: Path, opened: Opener, size: int | None, sha256: str | None) -> None:
        """Fetch `target` unless it is there. size: its bytes, counted against the limit; None: an index, which is not
        counted, and is fetched again where it is there with another hash.

        Raises Damaged where size or hash are not those announced, OSError where the other side fails or stops early,
        UserError where the file can never fit or the disk is full.
        """
        part = target.with_name(target.name + _PART)
        with self._writer(part, target, sha256 if size is None else None) as file:
            if file is None:
                return
            if size is not None:
                self._make_room(part, file, size)
            self._fill(file, opened, size, sha256)
            os.replace(part, target)

    @contextlib.contextmanager
    def _writer(self, part: Path, target: Path, sha256: str | None) -> Iterator[IO[bytes] | None]:
        """The unfinished file, ours alone; None once somebody else has finished it. Removed where we fail."""
        while True:
            with _room_said(self.folder):
                target.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            with os.fdopen(handle, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if is_whole(target, sha256):
                    yield None
                    return
                if not _is_at(file, part):
                    continue  # it was finished, and dropped again, or swept away while we waited
                try:
                    file.truncate(0)
                    yield file
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
                return

    def _fill(self, file: IO[bytes], opened: Opener, size: int | None, sha256: str | None) -> None:
        digest, count = hashlib.sha256(), 0
        with opened() as stream:
            while block := stream.read(_BLOCK):
                if size is not None and count + len(block) > size:
                    raise Damaged(f"more than the {size:,} bytes announced")
                digest.update(block)
                with _room_said(self.folder):
                    file.seek(count)
                    file.write(block)
                    file.flush()
                count += len(block)
        if size is not None and count != size:
            raise OSError(f"{count:,} bytes, {size:,} were announced")  # a broken connection looks like an end
        if sha256 is not None and digest.hexdigest() != sha256:
            raise Damaged("its sha256 is not the one announced")
        with _room_said(self.folder):
            os.fsync(file.fileno())

    def _make_room(self, part: Path, file: IO[bytes], size: int) -> None:
        """Take `size` bytes of the limit, dropping the tars read longest ago. One process at a time."""
        if size > self.most_bytes:
            raise UserError(
                f"{part.name.removesuffix(_PART)}: {size / _GIGABYTE:,.3f} GB do not fit into the cache of "
                f"{self.most_bytes / _GIGABYTE:,.3f} GB; raise {GIGABYTES_VARIABLE}"
            )
        while not self._took_room(part, file, size):
            time.sleep(_WAIT_S)  # others' unfinished files hold it all; finished, they can be dropped

    def _took_room(self, part: Path, file: IO[bytes], size: int) -> bool:
        with self._alone() as lock:
            # What all have taken so far is noted in the lock, so that not every fetch looks at all the files. It may be
            # too much, as nobody takes away what failed or was removed; then we look again.
            total = _noted(lock)
            if total is None or total + size > min(self.most_bytes, self.free_bytes()):
                total = self._dropped_to(part, size)
            if total is None:
                return False
            lock.seek(0)
            lock.write(f"{total + size:{_NOTE_WIDTH}d}")
            file.truncate(size)  # the room is taken: others count it, and it costs no disk before it is filled
            return True

    def _dropped_to(self, part: Path, size: int) -> int | None:
        """Drop tars until `size` bytes fit; what is held then, besides `part`. None where they cannot be dropped yet.

        Raises UserError where the disk has no room although nothing is held.
        """
        found = [held for held in _files(self.folder) if held.path != part]
        total = sum(held.size for held in found)
        # The disk may have less room than the limit; some of what is free is promised to files on their way.
        promised = sum(held.size - held.written for held in found)
        most_bytes = min(self.most_bytes, total + self.free_bytes() - promised)
        for held in sorted(found):
            if total + size <= most_bytes:
                break
            if _drop(held.path):
                total -= held.size
        if total + size <= most_bytes:
            return total
        if total > 0:
            return None
        raise UserError(
            f"{self.folder}: the disk has no room for {part.name.removesuffix(_PART)} ({size / _GIGABYTE:,.3f} GB); "
            f"free some space, or name another folder in {FOLDER_VARIABLE}"
        )

    def free_bytes(self) -> int:
        """What the disk of the cache has free now."""
        return shutil.disk_usage(self.folder).free

    def held_bytes(self) -> int:
        """What tars, and tars on their way, take of the limit now."""
        with self._alone():
            return sum(held.size for held in _files(self.folder))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[IO[str]]:
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with os.fdopen(handle, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock


def _noted(lock: IO[str]) -> int | None:
    """The bytes that the lock says are held; None where it does not."""
    text = lock.read(_NOTE_WIDTH)
    return int(text) if len(text) == _NOTE_WIDTH and text.strip().isdigit() else None


def is_whole(path: Path, sha256: str | None) -> bool:
    """Whether a file is there, with this hash if one is given."""
    return path.exists() and (sha256 is None or files.sha256(path) == sha256)


class _Held(NamedTuple):
    """A tar, or one on its way."""

    used: float
    """When it was last read."""
    size: int
    written: int
    """So many of its bytes are on the disk already."""
    path: Path


def _files(folder: Path) -> list[_Held]:
    """The tars, and those on their way."""
    found = {}
    for name in os.listdir(folder):
        # In this order one that is finished meanwhile is met twice, not missed.
        for ending in (f".tar{_PART}", ".tar"):
            with contextlib.suppress(NotADirectoryError, FileNotFoundError), os.scandir(folder / name) as entries:
                for entry in entries:
                    if entry.name.endswith(ending):
                        with contextlib.suppress(FileNotFoundError):
                            held = _held(Path(entry.path))
                            found[entry.path.removesuffix(_PART)] = held
    return list(found.values())


def _held(path: Path) -> _Held:
    stat = path.stat()
    written = min(stat.st_size, 512 * stat.st_blocks) if path.suffix == _PART else stat.st_size
    return _Held(stat.st_mtime, stat.st_size, written, path)


def _drop(path: Path) -> bool:
    """Remove a tar, or an unfinished one that nobody is working on; whether its room is free now."""
    if path.suffix != _PART:
        path.unlink(missing_ok=True)
        return True
    with contextlib.suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, path):  # not finished, and renamed, since it was opened
            path.unlink()
            return True
    return False


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(file.fileno())
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


@contextlib.contextmanager
def _room_said(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        raise UserError(
            f"{folder}: the cache of remote shards cannot be written ({error.strerror}); free some space, lower "
            f"{GIGABYTES_VARIABLE}, or name another folder in {FOLDER_VARIABLE}"
        ) from None
