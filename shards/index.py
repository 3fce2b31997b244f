"""A shard set on disk: where every sample's bytes are, read by offset, with no pass over the tars.

`index.npz` is stored uncompressed and its members are mapped into memory, so opening a set costs the same for 10^3
samples and for 10^8, and the processes of one machine share the pages. Its arrays, N samples with H heads in all:

    shard (N,)  image_offset image_size json_offset json_size (N,) bytes in the tar  key (N,)
    n_heads n_objects (N,)  subject (N,) head_subject (H,) numbers of `subjects`, the sorted table of names
"""

import json
import os
import re
import struct
import zipfile
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from launcher.errors import UserError
from shards.record import Record, RecordError, from_json

FORMAT = "hpe-shards-1"
INDEX_JSON, INDEX_NPZ = "index.json", "index.npz"
HEADER = 512  # a tar member's header, in the USTAR form the shards are written in
KEY = re.compile(r"(?=.{1,90}\Z)[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*")
"""Keys of samples: a dot would end them for webdataset readers."""
_OPEN_TARS = 64

Arrays = dict[str, NDArray[Any]]


class SampleError(UserError):
    """One sample that cannot be read; the message names shard, key and remedy. `key` is kept for counters."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        return (SampleError, (str(self), self.key))


class Stored(NamedTuple):
    """One sample as stored. `extension` is "jpg" or "png"."""

    key: str
    image: bytes
    extension: str
    json: bytes


class ShardSet:
    """A finished set. Cheap to send to worker processes: they open it again; tars are opened when first read."""

    def __init__(self, path: Path, info: dict[str, Any], arrays: Arrays) -> None:
        self.path = path
        self.info = info
        self.arrays = arrays
        self._tars: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.arrays["shard"])

    def __reduce__(self) -> tuple[Any, ...]:
        return (open_set, (self.path,))

    @property
    def n_heads(self) -> NDArray[np.int32]:
        """(N,) heads in each sample."""
        return self.arrays["n_heads"]

    @property
    def shard_sizes(self) -> list[int]:
        """Samples in each shard."""
        return [shard["samples"] for shard in self.info["shards"]]

    @cached_property
    def head_starts(self) -> NDArray[np.int64]:
        """(N + 1,) where each sample's heads begin in arrays that hold all heads in a row."""
        return np.concatenate([[0], np.cumsum(self.n_heads, dtype=np.int64)])

    def key(self, i: int) -> str:
        """The key of sample i."""
        return str(bytes(self.arrays["key"][i]), "ascii")

    def key_order(self) -> NDArray[np.int64]:
        """(N,) sample numbers sorted by key: the order of evaluations."""
        return np.argsort(self.arrays["key"], kind="stable")

    def subjects(self) -> set[str]:
        """Every subject of the set: of images and of single heads. The empty name (unknown) is left out."""
        used = np.union1d(np.unique(self.arrays["subject"]), np.unique(self.arrays["head_subject"]))
        return {str(bytes(name), "utf-8") for name in self.arrays["subjects"][used]} - {""}

    def shard_name(self, i: int) -> str:
        """File name of the tar that holds sample i."""
        return str(self.info["shards"][int(self.arrays["shard"][i])]["file"])

    def read(self, i: int) -> Stored:
        """Sample i. Raises SampleError where its bytes are missing or not its own, UserError where the tar is."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        spans = [
            tuple(int(self.arrays[f"{part}_{what}"][i]) for what in ("offset", "size")) for part in ("image", "json")
        ]
        start = min(offset for offset, _ in spans) - HEADER
        stop = max(offset + size for offset, size in spans)
        data = self._pread(i, start, stop - start)
        if len(data) < stop - start:
            raise self.sample_error(i, f"the tar ends at byte {start + len(data)}, the sample at byte {stop}")
        key = self.key(i)
        image_name, image = _member(data, spans[0][0] - start, spans[0][1])
        json_name, text = _member(data, spans[1][0] - start, spans[1][1])
        extension = image_name.rpartition(".")[2]
        if json_name != f"{key}.json" or image_name not in (f"{key}.jpg", f"{key}.png"):
            raise self.sample_error(i, "the tar holds other bytes there than the index says")
        return Stored(key, image, extension, text)

    def record(self, i: int) -> Record:
        """What is known of sample i. Raises SampleError (a record that breaks the schema too) or UserError."""
        return self.parse(i, self.read(i).json)

    def parse(self, i: int, text: bytes) -> Record:
        """The record in sample i's JSON. Raises SampleError."""
        try:
            return from_json(text)
        except RecordError as error:
            raise self.sample_error(i, str(error)) from None

    def sample_error(self, i: int, what: str) -> SampleError:
        """The error for sample i: shard, key, what is wrong, and what to do."""
        key = self.key(i)
        where = f"{self.path / self.shard_name(i)}, key {key}"
        return SampleError(
            f"{where}: {what}; run `hpe-shards verify {self.path}`, then copy the set again, or remove and build it",
            key,
        )

    def _pread(self, i: int, offset: int, count: int) -> bytes:
        """Up to `count` bytes: fewer only where the file ends (network file systems may return short reads)."""
        path = self.path / self.shard_name(i)
        try:
            handle = self._tar(int(self.arrays["shard"][i]), path)
            data = os.pread(handle, count, offset)
            while len(data) < count and (more := os.pread(handle, count - len(data), offset + len(data))):
                data += more
        except FileNotFoundError:
            raise UserError(
                f"{path}: the index lists this shard but it is missing; copy the set again, or remove and build it"
            ) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the file system") from None
        return data

    def _tar(self, shard: int, path: Path) -> int:
        if shard in self._tars:
            self._tars.move_to_end(shard)
        else:
            self._tars[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._tars) > _OPEN_TARS:
                os.close(self._tars.popitem(last=False)[1])
        return self._tars[shard]

    def close(self) -> None:
        """Close the tars; a later read opens them again."""
        while self._tars:
            os.close(self._tars.popitem()[1])

    def __del__(self) -> None:
        self.close()


def _member(data: bytes, at: int, size: int) -> tuple[str, bytes]:
    """Name in the tar header before `at`, and the `size` bytes from there."""
    name = data[at - HEADER : at - HEADER + 100].split(b"\0", 1)[0]
    return name.decode("ascii", "replace"), data[at : at + size]


def open_set(path: str | Path) -> ShardSet:
    """Open a finished shard set. Raises UserError where there is none, or where its index is damaged."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; build a set with `hpe-shards build SOURCE --out {path}`")
    if not (path / INDEX_JSON).is_file():
        remedy = f"run its `hpe-shards build … --out {path}` again, it goes on where it stopped"
        raise UserError(f"{path}: not a finished shard set (no {INDEX_JSON}); {remedy}")
    try:
        info = json.loads((path / INDEX_JSON).read_text(encoding="utf-8"))
        known = info["format"] == FORMAT
        arrays = map_npz(path / INDEX_NPZ) if known else {}
        whole = not known or len(arrays["shard"]) == info["counts"]["samples"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, struct.error) as error:
        raise UserError(f"{path}: its index is damaged ({error}); copy the set again, or remove and build it") from None
    if not known:
        raise UserError(
            f"{path}: index format {info['format']!r}, only {FORMAT!r} is read; remove the set and build it"
        )
    if not whole:
        raise UserError(
            f"{path}: {INDEX_NPZ} and {INDEX_JSON} are not of one build; copy the set again, or remove and build it"
        )
    return ShardSet(path, info, arrays)


def map_npz(path: Path) -> Arrays:
    """The arrays of an uncompressed .npz, mapped into memory (read only) where they lie in the file.

    Raises OSError, ValueError or zipfile.BadZipFile for a file that is no such thing.
    """
    arrays: Arrays = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{path.name}: {member.filename} is compressed and cannot be mapped")
            # The local header's own name and extra lengths: they may differ from the directory's.
            file.seek(member.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            file.seek(member.header_offset + 30 + name_length + extra_length)
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            name = member.filename.removesuffix(".npy")
            empty = 0 in shape
            arrays[name] = np.empty(shape, dtype) if empty else _mapped(path, dtype, shape, file.tell())
    return arrays


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    # A plain view: indexing the memmap class itself costs several times as much.
    return np.memmap(path, dtype, "r", offset, shape).view(np.ndarray)
