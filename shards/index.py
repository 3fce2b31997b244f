"""A shard set on disk: where every sample's bytes are, read by offset, with no pass over the tars.

`index.npz` is stored uncompressed and its members are mapped into memory, so opening a set costs the same for 10^3
samples and for 10^8, and the processes of one machine share the pages. Its arrays, N samples with H heads in all:

    shard (N,)  image_offset image_size json_offset json_size (N,) bytes in the tar  key (N,)
    n_heads n_objects (N,)  subject (N,) head_subject (H,) numbers of `subjects`, the sorted table of names

A set may also be elsewhere, at a URL: its index is copied here once, and its tars, whole, when they are first read.
"""

import hashlib
import json
import os
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from launcher.errors import UserError
from shards.cache import Cache
from shards.pixels import Scratch, SizeError, decode_pixels
from shards.record import Record, RecordError, from_json
from shards.remote import Remote, as_url

FORMAT = "hpe-shards-1"
INDEX_JSON, INDEX_NPZ = "index.json", "index.npz"
HEADER = 512  # a tar member's header, in the USTAR form the shards are written in
KEY = re.compile(r"(?=.{1,90}\Z)[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*")
"""Keys of samples: a dot would end them for webdataset readers."""
_TAR_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.tar")
_PER_SAMPLE = ("image_offset", "image_size", "json_offset", "json_size", "n_heads", "n_objects", "subject")
_NAME = 100  # bytes of the name at the start of a header
_OPEN_TARS = 64
_EVICTIONS = 5  # times a tar may vanish from the cache between its arrival and its reading

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

    def __init__(self, path: Path, info: dict[str, Any], arrays: Arrays, remote: Remote | None = None) -> None:
        self.path = path
        """Folder of the index, and of the tars as far as they are here."""
        self.info = info
        self.arrays = arrays
        self.remote = remote
        """Where the tars come from, if not from `path`."""
        self._tars: OrderedDict[int, int] = OrderedDict()
        # Bound once: a dozen look-ups a sample are a good part of what a sample costs.
        self._shard_at, self._key_at = arrays["shard"].item, arrays["key"].item
        self._shard_bytes: list[int] = [shard["bytes"] for shard in info["shards"]]
        self._spans_at = [arrays[f"{part}_{what}"].item for part in ("image", "json") for what in ("offset", "size")]

    def __len__(self) -> int:
        return len(self.arrays["shard"])

    def __reduce__(self) -> tuple[Any, ...]:
        return (_open_folder, (self.path, self.remote))

    @property
    def n_heads(self) -> NDArray[np.int32]:
        """(N,) heads in each sample."""
        return self.arrays["n_heads"]

    @property
    def shard_sizes(self) -> list[int]:
        """Samples in each shard."""
        return [shard["samples"] for shard in self.info["shards"]]

    @cached_property
    def digest(self) -> str:
        """What tells this build from another, wherever it lies: of its tars' hashes, in their order; 16 digits."""
        tars = "".join(f"{shard['samples']} {shard['sha256']}\n" for shard in self.info["shards"])
        return hashlib.sha256(tars.encode()).hexdigest()[:16]

    @cached_property
    def head_starts(self) -> NDArray[np.int64]:
        """(N + 1,) where each sample's heads begin in arrays that hold all heads in a row."""
        return np.concatenate([[0], np.cumsum(self.n_heads, dtype=np.int64)])

    def key(self, i: int) -> str:
        """The key of sample i."""
        return str(self._key_at(i), "ascii", "replace")

    def key_order(self) -> NDArray[np.int64]:
        """(N,) sample numbers sorted by key: the order of evaluations."""
        return np.argsort(self.arrays["key"], kind="stable")

    def subjects(self) -> set[str]:
        """Every subject of the set: of images and of single heads. The empty name (unknown) is left out."""
        used = np.union1d(np.unique(self.arrays["subject"]), np.unique(self.arrays["head_subject"]))
        return {str(bytes(name), "utf-8") for name in self.arrays["subjects"][used]} - {""}

    @property
    def place(self) -> str:
        """The set's folder or URL, for messages."""
        return str(self.path) if self.remote is None else self.remote.shown

    def shard_name(self, i: int) -> str:
        """File name of the tar that holds sample i. Raises UserError where the index names no such tar."""
        shard = self._shard_at(i)
        if not 0 <= shard < len(self.info["shards"]):
            raise UserError(
                f"{self.place}, key {self.key(i)}: the index puts it into a shard that there is not; {_AGAIN}"
            )
        return str(self.info["shards"][shard]["file"])

    def read(self, i: int) -> Stored:
        """Sample i. Raises SampleError where its bytes are missing or not its own, UserError where the tar is."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        image_at, image_size, json_at, json_size = [at(i) for at in self._spans_at]
        shard = self._shard_at(i)
        end = self._shard_bytes[shard] if 0 <= shard < len(self._shard_bytes) else 0
        # Before memory is given for it: a damaged index may ask for anything.
        if not (HEADER <= image_at <= image_at + image_size <= end >= json_at + json_size >= json_at >= HEADER):
            raise self.sample_error(i, "the index puts it outside the tar")
        # Read apart, so that the image need not be copied out of a larger piece.
        spans = ((image_at - HEADER, _NAME), (image_at, image_size), (json_at - HEADER, HEADER + json_size))
        named, image, rest = self._pread(i, shard, spans)
        if len(image) < image_size or len(rest) < HEADER + json_size:
            end, last = self._tar_end(i), max(image_at + image_size, json_at + json_size)
            raise self.sample_error(i, f"the tar ends at byte {end}, the sample at byte {last}")
        key = self._key_at(i)
        if named.startswith(key + b".jpg\0"):
            extension = "jpg"
        elif named.startswith(key + b".png\0"):
            extension = "png"
        else:
            raise self.sample_error(i, "the tar holds other bytes there than the index says")
        if not rest.startswith(key + b".json\0"):
            raise self.sample_error(i, "the tar holds other bytes there than the index says")
        return Stored(str(key, "ascii"), image, extension, rest[HEADER:])

    def record(self, i: int) -> Record:
        """What is known of sample i. Raises SampleError (a record that breaks the schema too) or UserError."""
        return self.parse(i, self.read(i).json)

    def parse(self, i: int, text: bytes) -> Record:
        """The record in sample i's JSON. Raises SampleError."""
        try:
            return from_json(text)
        except RecordError as error:
            raise self.sample_error(i, str(error)) from None

    def pixels(self, i: int, stored: Stored, known: Record, scratch: Scratch | None = None) -> NDArray[np.uint8]:
        """(H, W, 3) RGB of sample i, in `scratch` if it is given.

        Raises SampleError where it does not decode, or is not of the size that its record says.
        """
        try:
            return decode_pixels(stored.image, stored.extension, (known.image.width, known.image.height), scratch)
        except SizeError as error:
            raise self.sample_error(i, str(error)) from None
        except ValueError as error:
            raise self.sample_error(i, f"the {stored.extension} does not decode ({error})") from None

    def sample_error(self, i: int, what: str) -> SampleError:
        """The error for sample i: shard, key, what is wrong, and what to do."""
        key = self.key(i)
        return SampleError(f"{self.place}/{self.shard_name(i)}, key {key}: {what}; {self._remedy()}", key)

    def _remedy(self) -> str:
        if self.remote is not None:
            return f"{self.path} holds the copy that was read; check the set where it comes from"
        return f"run `hpe-shards verify {self.path}`, then copy the set again, or remove and build it"

    def _tar_end(self, i: int) -> int:
        """Where sample i's tar really ends."""
        try:
            return self.tar(self._shard_at(i)).stat().st_size
        except FileNotFoundError:
            return 0

    def _pread(self, i: int, shard: int, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes at each (offset, size) of sample i's tar: fewer only where the file ends."""
        try:
            if self.remote is not None:
                return self._pread_cached(shard, spans)
            return _pread_all(self._tar(shard), spans)
        except FileNotFoundError:
            tar = self.path / self.shard_name(i)
            raise UserError(
                f"{tar}: the index lists this shard but it is missing; copy the set again, or remove and build it"
            ) from None
        except OSError as error:
            tar = self.path / self.shard_name(i)
            raise UserError(f"{tar}: cannot be read ({error.strerror}); check the file system") from None

    def _pread_cached(self, shard: int, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        # Opened for one read only: a tar that is dropped from the cache gives its room back at once.
        for _ in range(_EVICTIONS):
            tar = self.bring(shard)
            try:
                handle = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                Cache.touch(handle)
                return _pread_all(handle, spans)
            finally:
                os.close(handle)
        raise UserError(
            f"{self.path}: the cache drops shards faster than they are read; raise HPE_SHARDS_CACHE_GB, or shuffle by "
            "fewer block_shards"
        )

    def tar(self, shard: int) -> Path:
        """Where the tar of `shard` is on this machine, or would be."""
        return self.path / str(self.info["shards"][shard]["file"])

    def bring(self, shard: int, patient: bool = True) -> Path:
        """The tar of `shard` on this machine, fetched first where the set is elsewhere. Raises UserError.

        patient: where it cannot be fetched, an outage of some minutes is waited for.
        """
        entry, tar = self.info["shards"][shard], self.tar(shard)
        if self.remote is not None and not tar.exists():
            self.remote.bring(entry["file"], tar, entry["bytes"], entry["sha256"], patient)
        return tar

    def _tar(self, shard: int) -> int:
        if shard in self._tars:
            self._tars.move_to_end(shard)
        else:
            self._tars[shard] = os.open(self.tar(shard), os.O_RDONLY | os.O_CLOEXEC)
            if len(self._tars) > _OPEN_TARS:
                os.close(self._tars.popitem(last=False)[1])
        return self._tars[shard]

    def close(self) -> None:
        """Close the tars; a later read opens them again."""
        while self._tars:
            os.close(self._tars.popitem()[1])

    def __del__(self) -> None:
        self.close()


def _pread_all(handle: int, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    pieces = []
    for offset, size in spans:
        data = os.pread(handle, size, offset)
        # Network file systems may return less than is there.
        while len(data) < size and (more := os.pread(handle, size - len(data), offset + len(data))):
            data += more
        pieces.append(data)
    return pieces


_AGAIN = "copy the set again, or remove and build it"


def open_set(path: str | Path) -> ShardSet:
    """Open a finished shard set, in a folder or at a URL: http(s)://…, s3://… and others that fsspec knows, or
    `pipe:COMMAND {}` for a command that writes the file named {} to its output.

    Raises UserError where there is none, or where its index is damaged.
    """
    url = as_url(path)
    if url is not None:
        remote = Remote(url, Cache.from_environment())
        return _open_folder(remote.bring_index(INDEX_JSON, INDEX_NPZ), remote)
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; build a set with `hpe-shards build SOURCE --out {path}`")
    if not (path / INDEX_JSON).is_file():
        remedy = f"run its `hpe-shards build … --out {path}` again, it goes on where it stopped"
        raise UserError(f"{path}: not a finished shard set (no {INDEX_JSON}); {remedy}")
    return _open_folder(path, None)


def _open_folder(path: Path, remote: Remote | None) -> ShardSet:
    place = str(path) if remote is None else remote.shown
    try:
        info = json.loads((path / INDEX_JSON).read_text(encoding="utf-8"))
        known = info["format"] == FORMAT
        arrays = map_npz(path / INDEX_NPZ) if known else {}
        whole = not known or _is_whole(info, arrays)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, zipfile.BadZipFile, struct.error) as error:
        said = str(error).split("\n")[0]
        raise UserError(f"{place}: its index is damaged ({type(error).__name__}: {said}); {_AGAIN}") from None
    if not known:
        raise UserError(
            f"{place}: index format {info['format']!r}, only {FORMAT!r} is read; remove the set and build it"
        )
    if not whole:
        raise UserError(f"{place}: {INDEX_NPZ} and {INDEX_JSON} are not of one build; {_AGAIN}")
    return ShardSet(path, info, arrays, remote)


def _is_whole(info: dict[str, Any], arrays: Arrays) -> bool:
    """Whether the arrays belong to `info`. Raises ValueError, KeyError or TypeError for what no build has written."""
    for shard in info["shards"]:
        # A name with a folder in it would reach outside the set.
        if not _TAR_NAME.fullmatch(shard["file"]):
            raise ValueError(f"{shard['file']!r} is no name of a tar")
        if type(shard["bytes"]) is not int or type(shard["samples"]) is not int or type(shard["sha256"]) is not str:
            raise ValueError(f"{shard['file']}: bytes, samples and sha256 are a number, a number and a text")
    samples = len(arrays["shard"])
    for name in ("shard", *_PER_SAMPLE):
        if arrays[name].shape != (samples,) or arrays[name].dtype.kind != "i":
            raise ValueError(f"array {name} is not one whole number a sample")
    if arrays["key"].shape != (samples,) or arrays["key"].dtype.kind != "S":
        raise ValueError("array key is not one name a sample")
    for name, kind in (("head_subject", "i"), ("subjects", "S")):
        if arrays[name].ndim != 1 or arrays[name].dtype.kind != kind:
            raise ValueError(f"array {name} is not a row of its kind")
    return bool(samples == info["counts"]["samples"])


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
            shape, dtype = _npy_header(file, member.filename)
            if dtype.hasobject:
                raise ValueError(f"{path.name}: {member.filename} holds objects, which are never read")
            name = member.filename.removesuffix(".npy")
            empty = 0 in shape
            arrays[name] = np.empty(shape, dtype) if empty else _mapped(path, dtype, shape, file.tell())
    return arrays


def _npy_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:
        # Damaged bytes make numpy raise SyntaxError, TokenError, … as well as ValueError.
        raise ValueError(f"{name} has no header of an array ({type(error).__name__})") from None
    return shape, dtype


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    # A plain view: indexing the memmap class itself costs several times as much.
    return np.memmap(path, dtype, "r", offset, shape).view(np.ndarray)
