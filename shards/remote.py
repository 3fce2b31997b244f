"""Shard sets that are elsewhere: their files by URL, the index copied here once, tars whole and when first read.

http and https by Python itself, `pipe:` as webdataset runs it, everything else (s3://, gs://, …) by fsspec.
"""

import contextlib
import hashlib
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

from launcher.errors import UsageError, UserError
from shards.cache import Cache, Damaged, is_whole

_WAITS_S = (0.5, 2.0)
_PATIENCE_S, _LONGEST_WAIT_S = 300.0, 60.0
"""A run outlives an outage of five minutes, which the launcher's watchdog (half an hour) does not end either."""
_NOT_THERE = (401, 403, 404, 410)  # HTTP: asking again changes nothing
_TIMEOUT_S = 60.0
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/{1,3}(?!/)(.+)", re.DOTALL)
_PIPE = "pipe:"


def as_url(path: str | Path) -> str | None:
    """The URL that `path` is, or None for a folder. A URL that went through Path has its slashes back."""
    text = str(path)
    if text.startswith(_PIPE):
        if "{}" not in text:
            raise UsageError(f"{text!r}: the command needs {{}} where the name of a file belongs")
        return text
    match = _URL.fullmatch(text)
    if match is None:
        return None
    return f"{match[1]}:{'///' if match[1] == 'file' else '//'}{match[2]}"


@dataclass(frozen=True)
class Remote:
    """A set at a URL, and the cache on this machine that its files are copied to."""

    url: str
    cache: Cache

    @property
    def shown(self) -> str:
        """The URL without passwords and signatures, for messages."""
        return self.url if self.url.startswith(_PIPE) else re.sub(r"//[^/@]*@", "//", self.url.partition("?")[0])

    def bring_index(self, json_name: str, npz_name: str) -> Path:
        """The folder of the cache for this build of the set, with its index. Raises UserError.

        The folder is named by what index.json says, so a set that was built anew never meets the tars of the old one. A
        query (a signature, a day) does not count, a whole command does. What is in the folder is checked each time.
        """
        text = self._tried(json_name, lambda: self._read(json_name))
        url = self.url if self.url.startswith(_PIPE) else self.url.partition("?")[0]
        name = hashlib.sha256(url.encode() + b"\0" + text).hexdigest()[:24]
        folder = self.cache.folder / name
        self.cache.place(folder / json_name, text)
        npz, said = folder / npz_name, _index_hash(text)
        if not is_whole(npz, said):
            self._tried(npz_name, lambda: self.cache.bring(npz, self._opener(npz_name), None, said))
        return folder

    def bring(self, name: str, target: Path, size: int, sha256: str, patient: bool = True) -> None:
        """Copy the tar `name` to `target`, unless another process has. Raises UserError.

        patient: an outage of some minutes is waited for, and stderr says so.
        """
        self._tried(name, lambda: self.cache.bring(target, self._opener(name), size, sha256), patient)

    def _opener(self, name: str) -> Callable[[], contextlib.AbstractContextManager[IO[bytes]]]:
        return lambda: open_url(self._of(name))

    def _of(self, name: str) -> str:
        """The URL of one file of the set."""
        if "{}" in self.url:
            return self.url.replace("{}", name)
        folder, mark, query = self.url.partition("?")
        return f"{folder.rstrip('/')}/{name}{mark}{query}"

    def _read(self, name: str) -> bytes:
        with open_url(self._of(name)) as stream:
            return stream.read()

    def _tried(self, name: str, act: Callable[[], Any], patient: bool = False) -> Any:
        """act(), again after a while where the network or the other side failed."""
        first_s = None
        for turn in count():
            try:
                return act()
            except (OSError, Damaged) as error:
                now_s = time.monotonic()
                first_s = now_s if first_s is None else first_s
                waits = patient and not isinstance(error, Damaged) and now_s - first_s < _PATIENCE_S
                if _is_final(error) or (turn >= len(_WAITS_S) and not waits):
                    times = f"; tried {turn + 1} times" if turn else ""
                    raise UserError(
                        f"{self.shown}: {name} cannot be fetched ({_reason(error)}{times}); check the address and the "
                        "network, or copy the set to a disk"
                    ) from None
                wait_s = min(2.0 * 2**turn, _LONGEST_WAIT_S) if patient else _WAITS_S[turn]
                # Not all ranks at once; nor may this touch the numbers that training draws.
                wait_s *= random.SystemRandom().uniform(0.75, 1.25)
                if patient:
                    said = f"{name} cannot be fetched ({_reason(error)}); trying again in {wait_s:.0f} s"
                    print(f"{self.shown}: {said}", file=sys.stderr, flush=True)
                time.sleep(wait_s)
        raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    """Whether another try changes nothing: there is no such file, or no right to it."""
    return isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "code", None) in _NOT_THERE


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]


def _index_hash(text: bytes) -> str | None:
    """The hash of index.npz that index.json tells; sets of older builds do not."""
    found = re.search(rb'"index":\s*\{[^}]*"sha256":\s*"([0-9a-f]{64})"', text)
    return found[1].decode() if found else None


@contextlib.contextmanager
def open_url(url: str) -> Iterator[IO[bytes]]:
    """The bytes of a file at a URL. Raises OSError where it cannot be read, UsageError for a kind that nobody reads."""
    try:
        yield from _opened(url)
    except (OSError, UserError, Damaged):
        raise
    except Exception as error:
        # Opening and reading both: botocore's errors, http.client's and others' are no OSErrors.
        raise OSError(f"{type(error).__name__}: {error}") from None


def _opened(url: str) -> Iterator[IO[bytes]]:
    if url.startswith(("http://", "https://")):
        import urllib.request

        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as stream:
            yield stream
    elif url.startswith(_PIPE):
        from webdataset.gopen import gopen

        with contextlib.closing(gopen(url, "rb")) as stream:
            yield stream
    else:
        yield from _fsspec(url)


def _fsspec(url: str) -> Iterator[IO[bytes]]:
    import fsspec

    kind = url.partition(":")[0]
    try:
        opened = fsspec.open(url, "rb")
    except ImportError as error:
        raise UserError(f"{kind}:// needs a package that is not installed ({error})") from None
    except ValueError as error:
        raise UsageError(f"{kind}:// is not a kind of address that can be read ({error})") from None
    with opened as stream:
        yield stream
