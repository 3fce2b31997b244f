"""Building a shard set: the samples of a source into tars, over any number of ranks, always the same bytes.

Every shard is a pure function of the source and its range of samples, so it does not matter which rank writes it. While
a build is under way its folder holds finished tars and `.build/`: the recipe, and for each finished tar its part of the
index and its hash. A build that was stopped keeps the tars that still verify. `index.json` comes last.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

from launcher import files
from launcher.comm import Comm
from launcher.errors import UsageError, UserError
from launcher.progress import Progress
from shards import record
from shards.index import FORMAT, HEADER, INDEX_JSON, INDEX_NPZ, Arrays, open_set

WORK_FOLDER = ".build"
_RECIPE = "recipe.json"
_TICK = 16  # samples each rank writes between two reports of progress
_KEY = re.compile(r"(?=.{1,90}\Z)[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*")  # a dot would end it for webdataset readers
_ARRAYS: dict[str, Any] = {
    "shard": np.int32,
    "image_offset": np.int64,
    "image_size": np.int32,
    "json_offset": np.int64,
    "json_size": np.int32,
    "n_heads": np.int32,
    "n_objects": np.int32,
}
_COLUMNS = (*_ARRAYS, "key", "subject", "head_subject")
BIN_DEG = 15
"""Width of the bins of the pose histogram."""
_LOWEST_DEG = {"yaw": -180, "pitch": -90, "roll": -180}


@dataclass(frozen=True)
class Sample:
    """One image, encoded, with its record. The key is unique in the set: letters, digits, `_`, `-` and `/`."""

    key: str
    image: bytes
    extension: Literal["jpg", "png"]
    record: record.Record


class Source(Protocol):
    """A data set to be sharded. `sample(i)` is a pure function of i; `scope` (JSON values) is recorded with the set."""

    @property
    def name(self) -> str: ...

    @property
    def licence(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def scope(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def sample(self, i: int) -> Sample: ...


def build(source: Source, out: Path, comm: Comm, samples_per_shard: int | None = None, name: str | None = None) -> None:
    """All ranks. Write `source` into the folder `out`: complete or not there, byte-identical for any number of ranks.

    samples_per_shard: at most so many; by default 1000, or fewer so that a small set too has 16 shards for ranks and
    readers to share. A complete set of the same recipe is kept, an unfinished one is finished. Raises UserError where
    `out` holds something else, or a sample breaks the schema. Rank 0 merges the index in memory, 100 bytes a sample.
    """
    out = Path(out)
    if samples_per_shard is None:
        samples_per_shard = min(1000, max(16, -(-len(source) // 16)))
    recipe = _recipe(source, samples_per_shard, name or source.name)
    missing = comm.broadcast(_prepare(out, recipe) if comm.rank == 0 else None)
    if missing is None:
        return
    _write_missing(source, out, recipe, missing, comm)
    comm.barrier()
    if comm.rank == 0:
        _finish(out, recipe)
    comm.barrier()


def _recipe(source: Source, samples_per_shard: int, name: str) -> dict[str, Any]:
    if samples_per_shard < 1:
        raise UsageError(f"{samples_per_shard} samples per shard: at least one is needed")
    if len(source) < 1:
        raise UserError(f"source {source.name} has no samples; check its folder and options")
    if not _KEY.fullmatch(name) or "/" in name:
        raise UsageError(f"name {name!r}: only letters, digits, _ and - may name a shard set")
    recipe = {
        "format": FORMAT,
        "convention": record.CONVENTION,
        "name": name,
        "source": source.name,
        "licence": source.licence,
        "split": source.split,
        "scope": dict(source.scope),
        "samples": len(source),
        "samples_per_shard": samples_per_shard,
    }
    as_stored: dict[str, Any] = json.loads(json.dumps(recipe))
    return as_stored


def _prepare(out: Path, recipe: dict[str, Any]) -> list[int] | None:
    """The shards still to be written, or None where the set is complete."""
    work = out / WORK_FOLDER
    if (out / INDEX_JSON).exists():
        _check_same(out, recipe, open_set(out).info, "a complete set")
        shutil.rmtree(work, ignore_errors=True)
        print(f"{out}: complete already, kept; `hpe-shards verify {out}` checks it, remove it to build it again")
        return None
    if work.exists() and (work / _RECIPE).exists():
        _check_same(out, recipe, json.loads((work / _RECIPE).read_text(encoding="utf-8")), "an unfinished build")
    elif out.exists() and any(path.name != WORK_FOLDER for path in out.iterdir()):
        raise UserError(f"{out}: holds files that are no shard set; choose another --out")
    work.mkdir(parents=True, exist_ok=True)
    files.write_json_atomic(work / _RECIPE, recipe)
    shards = range(len(_bounds(recipe)))
    missing = [shard for shard in shards if not _is_written(out, recipe["name"], shard)]
    if len(missing) < len(shards):
        print(f"{out}: {len(shards) - len(missing)} of {len(shards)} shards are there already, kept")
    return missing


def _check_same(out: Path, recipe: dict[str, Any], other: dict[str, Any], what: str) -> None:
    for key in recipe:
        if recipe[key] != other.get(key):
            here, there = json.dumps(recipe[key]), json.dumps(other.get(key))
            raise UserError(f"{out}: holds {what} with {key} {there}, not {here}; remove it or choose another --out")


def _bounds(recipe: dict[str, Any]) -> list[tuple[int, int]]:
    """First and last + 1 sample of every shard: as equal as can be, since plain readers deal whole shards."""
    samples, count = recipe["samples"], -(-recipe["samples"] // recipe["samples_per_shard"])
    return [(samples * k // count, samples * (k + 1) // count) for k in range(count)]


def _tar_name(name: str, shard: int) -> str:
    return f"{name}-{shard:06d}.tar"


def _part_path(out: Path, name: str, shard: int) -> Path:
    return out / WORK_FOLDER / f"{name}-{shard:06d}.npz"


def _is_written(out: Path, name: str, shard: int) -> bool:
    tar, part = out / _tar_name(name, shard), _part_path(out, name, shard)
    return tar.exists() and part.exists() and files.sha256(tar) == str(np.load(part)["sha256"])


def _write_missing(source: Source, out: Path, recipe: dict[str, Any], missing: list[int], comm: Comm) -> None:
    """All ranks. Round by round each rank writes one shard, in step with the others: rank 0 shows the total."""
    bounds = _bounds(recipe)
    ticks = -(-max((bounds[shard][1] - bounds[shard][0] for shard in missing), default=0) // _TICK)
    total = sum(bounds[shard][1] - bounds[shard][0] for shard in missing)
    with Progress(comm).bar(f"build {recipe['name']}", total) as bar:
        for first in range(0, len(missing), comm.size):
            mine = missing[first + comm.rank : first + comm.rank + 1]
            work = _write_shard(source, out, recipe["name"], mine[0], bounds[mine[0]]) if mine else iter(())
            for _ in range(ticks):
                bar.advance(comm.sum(next(work, 0)))


def _write_shard(source: Source, out: Path, name: str, shard: int, bounds: tuple[int, int]) -> Iterator[int]:
    """Write one shard and its part of the index; yields after every few samples how many they were."""
    from webdataset.writer import TarWriter

    tar, temporary = out / _tar_name(name, shard), out / WORK_FOLDER / _tar_name(name, shard)
    part = _Part(shard)
    with temporary.open("wb") as file:
        # Fixed times and owners: equal samples give equal bytes.
        with TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
            for start in range(*bounds, _TICK):
                stop = min(start + _TICK, bounds[1])
                for i in range(start, stop):
                    _write_sample(writer, part, source.sample(i), f"{source.name} sample {i}")
                if stop < bounds[1]:
                    yield stop - start
        file.flush()
        os.fsync(file.fileno())
    digest = files.sha256(temporary)
    os.replace(temporary, tar)
    _save_npz(_part_path(out, name, shard), part.arrays() | {"sha256": np.array(digest)})
    yield stop - start


def _write_sample(writer: Any, part: "_Part", sample: Sample, name: str) -> None:
    if not _KEY.fullmatch(sample.key):
        raise UserError(f"{name}: key {sample.key!r} is not 1 to 90 letters, digits, _, - and /")
    text = sample.record.to_json().encode()
    try:
        # The index says what readers will find: poses after rounding, which may lie across the edge of a bin.
        sample = replace(sample, record=record.from_json(text))
    except record.RecordError as error:
        raise UserError(f"{name}, key {sample.key}: {error}; the source gives an impossible record") from None
    part.add(sample, len(text), writer.tarstream.offset)
    writer.write({"__key__": sample.key, sample.extension: sample.image, "json": text})
    assert writer.tarstream.offset == part.end, "the tar writer lays members out in another way than the index says"


class _Part:
    """One shard's part of the index, growing."""

    def __init__(self, shard: int) -> None:
        self._shard = shard
        self._rows: dict[str, list[Any]] = {column: [] for column in _COLUMNS}
        self._poses: list[Any] = []
        self.end = 0

    def add(self, sample: Sample, json_size: int, offset: int) -> None:
        """Note a sample whose first tar header is at `offset`; members lie in the order of their extensions."""
        sizes, offsets = {sample.extension: len(sample.image), "json": json_size}, {}
        for extension in sorted(sizes):
            offsets[extension] = offset + HEADER
            offset += HEADER + -(-sizes[extension] // HEADER) * HEADER
        self.end = offset
        known = sample.record
        row = {
            "shard": self._shard,
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

    def arrays(self) -> Arrays:
        """The columns; subjects are still names."""
        arrays = {column: np.array(values, _ARRAYS.get(column, np.bytes_)) for column, values in self._rows.items()}
        return arrays | pose_histogram(np.array(self._poses).reshape(-1, 3))


def pose_histogram(poses_deg: np.ndarray) -> Arrays:
    """(H, 3) yaw, pitch, roll to counts in bins of BIN_DEG: yaw and roll from -180 (24 bins), pitch from -90 (12)."""
    counts = {}
    for (angle, lowest), values in zip(_LOWEST_DEG.items(), poses_deg.T, strict=True):
        bins = -2 * lowest // BIN_DEG
        # 180 belongs to the last bin, and so does pitch 90.
        places = np.minimum((values - lowest) // BIN_DEG, bins - 1).astype(np.int64)
        counts[angle] = np.bincount(places, minlength=bins)
    return counts


def _finish(out: Path, recipe: dict[str, Any]) -> None:
    """Merge the parts into index.npz and make the set visible."""
    parts = [dict(np.load(_part_path(out, recipe["name"], shard))) for shard in range(len(_bounds(recipe)))]
    columns = {column: np.concatenate([part[column] for part in parts]) for column in _COLUMNS}
    poses = {angle: np.sum([part[angle] for part in parts], axis=0) for angle in _LOWEST_DEG}
    keys, times = np.unique(columns["key"], return_counts=True)
    if len(keys) < len(columns["key"]):
        again = str(bytes(keys[np.argmax(times)]), "ascii")
        raise UserError(f"source {recipe['source']}: key {again} comes {times.max()} times; keys must be unique")
    subjects, numbers = np.unique(np.concatenate([columns["subject"], columns["head_subject"]]), return_inverse=True)
    numbers = numbers.astype(np.int32)
    arrays = {column: columns[column] for column in (*_ARRAYS, "key")}
    arrays |= {"subject": numbers[: len(keys)], "head_subject": numbers[len(keys) :], "subjects": subjects}
    _save_npz(out / INDEX_NPZ, arrays)
    tars = [
        {
            "file": _tar_name(recipe["name"], shard),
            "samples": len(part["key"]),
            "bytes": (out / _tar_name(recipe["name"], shard)).stat().st_size,
            "sha256": str(part["sha256"]),
        }
        for shard, part in enumerate(parts)
    ]
    files.write_json_atomic(out / INDEX_JSON, _info(recipe, arrays, poses, tars))
    shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)


def _info(recipe: dict[str, Any], arrays: Arrays, poses: Arrays, tars: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {
        "samples": len(arrays["key"]),
        "heads": int(arrays["n_heads"].sum()),
        "objects": int(arrays["n_objects"].sum()),
        "subjects": len(set(arrays["subjects"].tolist()) - {b""}),
        "shards": len(tars),
        "bytes": sum(tar["bytes"] for tar in tars),
    }
    histogram = {
        angle: {"lowest_deg": _LOWEST_DEG[angle], "bin_deg": BIN_DEG, "heads": poses[angle].tolist()} for angle in poses
    }
    return recipe | {"counts": counts, "poses": histogram, "shards": tars}


def _save_npz(path: Path, arrays: Arrays) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **cast(Any, arrays))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
