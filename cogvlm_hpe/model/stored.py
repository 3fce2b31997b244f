"""Writes the very bytes that safetensors writes, a piece at a time: `save_file` wants a whole file's tensors in memory.

The format: 8 bytes length of the header, the header in JSON (name → dtype, shape, place), then the tensors one after
the other, those of wider types first and then by name.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

_TYPES = {  # in safetensors' own order, which is that of alignment
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
DTYPES = {name: dtype for dtype, name in _TYPES.items()}
"""By the names that safetensors gives them."""
_ORDER = list(_TYPES)
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor to write: what must be known at once, how to get it when its turn comes, and how to let go of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]  # together all its elements in order; each may be dropped once written
    forget: Callable[[], None] = lambda: None

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_entry(file: IO[bytes], entry: Entry) -> None:
    """Write a tensor's bytes and give back its memory.

    Raises ValueError where its pieces are not together of the size and type that the entry says.
    """
    written = 0
    for piece in entry.pieces():
        if piece.dtype != entry.dtype:
            raise ValueError(f"{entry.name}: {piece.dtype}, not {entry.dtype}")
        written += file.write(memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy()))
    if written != entry.nbytes:
        raise ValueError(f"{entry.name}: {written} bytes, not {entry.nbytes}, which {entry.shape} has")
    entry.forget()


def save_safetensors(path: Path, entries: Sequence[Entry], done: Callable[[], None] = lambda: None) -> None:
    """Write a safetensors file; `done` is called after each tensor."""
    ordered = sorted(entries, key=lambda entry: (-_ORDER.index(entry.dtype), entry.name))
    with path.open("wb") as file:
        file.write(_header(ordered))
        for entry in ordered:
            write_entry(file, entry)
            done()


def _header(entries: Sequence[Entry]) -> bytes:
    said: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        said[entry.name] = {"dtype": _TYPES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
