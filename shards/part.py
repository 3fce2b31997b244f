"""One range of a source's samples on its way into a set: tars no larger than asked, and their part of the index.

A range is a pure function of the source, so it does not matter which rank writes it. It is there once its `.npz` is,
which holds the hashes of its tars.
"""

import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from launcher import files
from launcher.errors import UserError
from shards import record
from shards.index import HEADER, KEY, Arrays

if TYPE_CHECKING:
    from shards.write import Sample, Source

BIN_DEG = 15
"""Width of the bins of the pose histogram."""
LOWEST_DEG = {"yaw": -180, "pitch": -90, "roll": -180}
DTYPES: dict[str, Any] = {
    "shard": np.int32,
    "image_offset": np.int64,
    "image_size": np.int32,
    "json_offset": np.int64,
    "json_size": np.int32,
    "n_heads": np.int32,
    "n_objects": np.int32,
}
TEMPORARIES = "*.tmp-*"
"""What is on its way: left behind by a build that was killed."""
TICK = 16  # samples between two reports of progress
_TAR_RECORD, _TAR_END = 20 * HEADER, 2 * HEADER


def npz_path(folder: Path, number: int) -> Path:
    """Where range `number` keeps its part of the index."""
    return folder / f"{number:06d}.npz"


def tar_path(folder: Path, number: int, piece: int) -> Path:
    """Where the `piece`-th tar of range `number` waits for the rest of the set."""
    return folder / f"{number:06d}-{piece:03d}.tar"


def write_range(
    source: "Source", folder: Path, number: int, bounds: tuple[int, int], most_bytes: int | None
) -> Iterator[int]:
    """Write samples [bounds[0], bounds[1]) of `source` as range `number`; yields, now and then, how many more are done.

    most_bytes: of a tar; a range that is larger is cut into tars of about equal size. Raises UserError for a sample
    that cannot be stored.
    """
    from webdataset.writer import TarWriter

    temporary, rows = _temporary(folder / f"{number:06d}.tar"), _Rows()
    try:
        with temporary.open("wb") as file:
            # Fixed times and owners: equal samples give equal bytes.
            with TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
                for start in range(*bounds, TICK):
                    stop = min(start + TICK, bounds[1])
                    for i in range(start, stop):
                        _write_sample(writer, rows, source.sample(i), f"{source.name} sample {i}")
                    if stop < bounds[1]:
                        yield stop - start
            file.flush()
            os.fsync(file.fileno())
        cuts = rows.cuts(most_bytes)
        tars = [tar_path(folder, number, piece) for piece in range(len(cuts) - 1)]
        if len(tars) == 1:
            os.replace(temporary, tars[0])
        else:
            for tar, (first, last) in zip(tars, pairwise(cuts), strict=True):
                _copy_piece(temporary, tar, rows.starts[first], rows.ends[last - 1])
    finally:
        temporary.unlink(missing_ok=True)
    digests = np.array([files.sha256(tar) for tar in tars])
    save_npz(npz_path(folder, number), rows.arrays(cuts) | {"sha256": digests})
    yield stop - start


def _write_sample(writer: Any, rows: "_Rows", sample: "Sample", name: str) -> None:
    if not KEY.fullmatch(sample.key):
        raise UserError(f"{name}: key {sample.key!r} is not 1 to 90 letters, digits, _, - and /")
    text = sample.record.to_json().encode()
    try:
        # As stored, so that the index counts what a reader will find: numbers are rounded on the way.
        sample = replace(sample, record=record.from_json(text))
    except record.RecordError as error:
        raise UserError(f"{name}, key {sample.key}: {error}; the source gives an impossible record") from None
    rows.add(sample, len(text), writer.tarstream.offset)
    writer.write({"__key__": sample.key, sample.extension: sample.image, "json": text})
    assert writer.tarstream.offset == rows.ends[-1], "the tar writer lays members out in another way than the index"


def _copy_piece(source: Path, target: Path, start: int, stop: int) -> None:
    """Bytes [start, stop) of one tar as a tar of their own, ended as the tar writer ends its own."""
    temporary = _temporary(target)
    try:
        with source.open("rb") as whole, temporary.open("wb") as piece:
            whole.seek(start)
            while start < stop:
                block = whole.read(min(stop - start, 1 << 20))
                piece.write(block)
                start += len(block)
            piece.write(bytes(_tar_bytes(piece.tell()) - piece.tell()))
            piece.flush()
            os.fsync(piece.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A name that no other process has: where no lock keeps two builds apart, neither writes into the other's file."""
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def _tar_bytes(members: int) -> int:
    """Size of a tar whose members take so many bytes."""
    return -(-(members + _TAR_END) // _TAR_RECORD) * _TAR_RECORD


def stored_bytes(image: int, text: int) -> int:
    """What a sample of such sizes takes up in a tar."""
    return sum(HEADER + -(-size // HEADER) * HEADER for size in (image, text))


class _Rows:
    """A range's part of the index, growing."""

    def __init__(self) -> None:
        columns = (*(column for column in DTYPES if column != "shard"), "key", "subject", "head_subject")
        self._rows: dict[str, list[Any]] = {column: [] for column in columns}
        self._poses: list[Any] = []
        self.starts: list[int] = []
        self.ends: list[int] = []

    def add(self, sample: "Sample", json_size: int, offset: int) -> None:
        """Note a sample whose first tar header is at `offset`; members lie in the order of their extensions."""
        self.starts.append(offset)
        sizes, offsets = {sample.extension: len(sample.image), "json": json_size}, {}
        for extension in sorted(sizes):
            offsets[extension] = offset + HEADER
            offset += HEADER + -(-sizes[extension] // HEADER) * HEADER
        self.ends.append(offset)
        known = sample.record
        row = {
            "image_offset": offsets[sample.extension],
            "image_size": sizes[sample.extension],
            "json_offset": offsets["json"],
            "json_size": sizes["json"],
            "n_heads": len(known.heads),
            "n_objects": len(known.objects),
            "key": sample.key.encode(),
            "subject": known.image.subject.encode(),
        }
        for column, value in row.items():
            self._rows[column].append(value)
        self._rows["head_subject"] += [head.subject.encode() for head in known.heads]
        self._poses += list(known.poses_deg)

    def cuts(self, most_bytes: int | None) -> list[int]:
        """Samples before which tars begin, and the number of samples: as few equal tars as fit into `most_bytes`.

        A sample that is larger by itself gets a tar of its own.
        """
        ends, count = np.array(self.ends), len(self.ends)
        if most_bytes is None or _tar_bytes(self.ends[-1]) <= most_bytes:
            return [0, count]
        for pieces in range(2, count):
            inner = np.searchsorted(ends, ends[-1] * np.arange(1, pieces) / pieces, "left") + 1
            cuts = np.unique([0, *inner, count])
            sizes = ends[cuts[1:] - 1] - np.array(self.starts)[cuts[:-1]]
            alone = np.diff(cuts) == 1
            if all(_tar_bytes(size) <= most_bytes or one for size, one in zip(sizes.tolist(), alone, strict=True)):
                return cuts.tolist()
        return list(range(count + 1))

    def arrays(self, cuts: list[int]) -> Arrays:
        """The columns, `shard` and offsets counted within the range's tars, subjects within its own table of names."""
        arrays = {column: np.array(values, DTYPES.get(column, np.bytes_)) for column, values in self._rows.items()}
        names = np.concatenate([arrays["subject"], arrays["head_subject"]])
        arrays["subjects"], numbers = np.unique(names, return_inverse=True)
        arrays["subject"], arrays["head_subject"] = np.split(numbers.astype(np.int32), [len(arrays["subject"])])
        arrays["shard"] = np.repeat(np.arange(len(cuts) - 1, dtype=np.int32), np.diff(cuts))
        before = np.array(self.starts, np.int64)[cuts[:-1]][arrays["shard"]]
        for column in ("image_offset", "json_offset"):
            arrays[column] -= before
        return arrays | pose_histogram(np.array(self._poses).reshape(-1, 3))


def pose_histogram(poses_deg: np.ndarray) -> Arrays:
    """(H, 3) yaw, pitch, roll to counts in bins of BIN_DEG: yaw and roll from -180 (24 bins), pitch from -90 (12)."""
    counts = {}
    for (angle, lowest), values in zip(LOWEST_DEG.items(), poses_deg.T, strict=True):
        bins = -2 * lowest // BIN_DEG
        # 180 belongs to the last bin, and so does pitch 90.
        places = np.minimum((values - lowest) // BIN_DEG, bins - 1).astype(np.int64)
        counts[angle] = np.bincount(places, minlength=bins)
    return counts


def save_npz(path: Path, arrays: Arrays) -> None:
    """Write arrays as an uncompressed .npz that is complete or not there."""
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            np.savez(file, **cast(Any, arrays))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
