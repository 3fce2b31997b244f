"""Writes what torch.save writes, one tensor at a time: torch.save itself wants all of them in memory first.

The format is a zip archive without compression: `data.pkl`, a pickle in which each tensor names its storage, and one
member `data/N` for each storage. Members begin at multiples of 64 bytes, so that the file can be memory-mapped.
"""

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch._utils import _rebuild_tensor_v2

from cogvlm_hpe.model.stored import Entry, write_entry

_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
_ZIP64_FIELD_BYTES = 20
_PADDING_FIELD = 0x4246  # the id of the extra field that torch itself pads with
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


def save_entries(path: Path, key: str, entries: Sequence[Entry], done: Callable[[], None] = lambda: None) -> None:
    """Write `{key: {name: tensor, …}}` for `torch.load`; `done` is called after each, and its memory is given back.

    Raises ValueError where a tensor is not of the size and type its entry says.
    """
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write(archive, "data.pkl", _pickle(key, entries))
        for number, entry in enumerate(entries):
            with _member(archive, f"data/{number}") as member:
                write_entry(member, entry)
            done()
        _write(archive, "byteorder", sys.byteorder.encode())
        _write(archive, "version", b"3\n")


def _write(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    with _member(archive, name) as member:
        member.write(data)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A file in the archive, to be written at once; its bytes begin at a multiple of 64."""
    name = f"archive/{name}"
    info = zipfile.ZipInfo(name)
    start = archive.start_dir + _LOCAL_HEADER_BYTES + len(name) + _ZIP64_FIELD_BYTES + 4
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
    return archive.open(info, "w", force_zip64=True)


def _pickle(key: str, entries: Sequence[Entry]) -> bytes:
    buffer = io.BytesIO()
    tensors = {entry.name: _Tensor(entry, str(number)) for number, entry in enumerate(entries)}
    _Pickler(buffer, protocol=2).dump({key: tensors})
    return buffer.getvalue()


class _Storage:
    def __init__(self, entry: Entry, number: str) -> None:
        size = torch.Size(entry.shape).numel()
        self.id = ("storage", _STORAGES[entry.dtype], number, "cpu", size)


class _Tensor:
    """Pickled as a call that rebuilds the tensor from its storage, as torch pickles tensors."""

    def __init__(self, entry: Entry, number: str) -> None:
        self._entry, self._storage = entry, _Storage(entry, number)

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self._entry.shape, device="meta").stride()
        return _rebuild_tensor_v2, (self._storage, 0, self._entry.shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.id if isinstance(value, _Storage) else None
