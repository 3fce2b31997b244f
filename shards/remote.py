"""Shard sets that are elsewhere: their files by URL, the index copied here once, tars whole and when first read.

http and https by Python itself, `pipe:` as webdataset runs it, everything else (s3://, gs://, …) by fsspec.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from launcher.errors import UsageError, UserError
from shards.cache import Cache, Damaged

TRIES = 3
_WAIT_S = 0.5
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

        The folder is named by what index.json says, so a set that was built anew never meets the tars of the old one.
        """
        text = self._tried(json_name, lambda: self._read(json_name))
        name = hashlib.sha256(self.url.encode() + b"\0" + text).hexdigest()[:24]
        folder = self.cache.folder / name
        self.cache.place(folder / json_name, text)
        if not (folder / npz_name).exists():
            said = _index_hash(text)
            self._tried(npz_name, lambda: self.cache.bring(folder / npz_name, self._opener(npz_name), None, said))
        return folder

    def bring(self, name: str, target: Path, size: int, sha256: str) -> None:
        """Copy the tar `name` to `target`, unless another process has. Raises UserError."""
        self._tried(name, lambda: self.cache.bring(target, self._opener(name), size, sha256))

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

    def _tried(self, name: str, act: Callable[[], Any]) -> Any:
        """act(), again after a while where the network or the other side failed."""
        for turn in range(1, TRIES + 1):
            try:
                return act()
            except (OSError, Damaged) as error:
                if turn == TRIES:
                    raise UserError(
                        f"{self.shown}: {name} cannot be fetched ({_reason(error)}; tried {TRIES} times); check the "
                        "address and the network, or copy the set to a disk"
                    ) from None
                time.sleep(_WAIT_S * 4 ** (turn - 1))
        raise AssertionError("unreachable")


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
