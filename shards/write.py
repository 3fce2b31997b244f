"""Building a shard set: the samples of a source into tars, over any number of ranks, always the same bytes.

Samples are cut into ranges, each a pure function of the source, so it does not matter which rank writes one. While a
build is under way its folder holds nothing but `.build/`: the recipe, and for each finished range its tars, hashes and
part of the index. A build that was stopped, at any moment, keeps the ranges that still verify. At the end the tars get
their names; `index.json` comes last.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from launcher import files
from launcher.comm import Comm
from launcher.errors import UsageError, UserError
from launcher.progress import Progress
from shards import part, record
from shards.index import FORMAT, INDEX_JSON, INDEX_NPZ, KEY, Arrays, open_set

WORK_FOLDER = ".build"
_RECIPE, _LOCK = "recipe.json", "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS)
_PROBES = 8
_INDEX_BYTES = 256  # a sample's share of index.npz and of the parts, at most
_MEGABYTE = 1_000_000


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


def build(
    source: Source,
    out: Path,
    comm: Comm,
    samples_per_shard: int | None = None,
    name: str | None = None,
    max_shard_mb: float | None = None,
) -> None:
    """All ranks. Write `source` into the folder `out`: complete or not there, byte-identical for any number of ranks.

    samples_per_shard: a tar holds at most so many; by default 1000, or fewer so that a small set too has 16 tars for
    ranks and readers to share. max_shard_mb: a tar has at most so many million bytes, unless one sample alone has more.
    A complete set of the same recipe is kept, an unfinished one is finished. Raises UserError where `out` holds
    something else or another build is writing into it, a sample breaks the schema, the disk has too little room or gets
    full: what is finished is kept. Rank 0 merges the index in memory: 50 bytes and twice the longest key a sample,
    4 bytes a head, and three times the table of subjects.
    """
    out = Path(out)
    with _full_disk(out), ExitStack() as held:
        recipe = _recipe(source, samples_per_shard, name or source.name, max_shard_mb)
        with _writable(out):
            is_complete = comm.broadcast(_prepare(out, recipe, held) if comm.rank == 0 else None)
        if is_complete:
            return
        missing = _missing(out, recipe, comm)
        if comm.rank == 0:
            _check_space(source, out, recipe, missing)
        _write_missing(source, out, recipe, missing, comm)
        comm.barrier()
        if comm.rank == 0:
            _finish(out, recipe)
        comm.barrier()


@contextmanager
def _full_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"{out}: the disk is full ({error.strerror}); what is finished is kept: free some space and run the same "
            "command again"
        ) from None


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_FOLDER:
            raise
        raise UserError(
            f"{out}: no folder that can be written to ({error.strerror}: {error.filename}); choose another --out, or "
            "mend its rights"
        ) from None


def _recipe(source: Source, samples_per_shard: int | None, name: str, max_shard_mb: float | None) -> dict[str, Any]:
    if samples_per_shard is None:
        samples_per_shard = min(1000, max(16, -(-len(source) // 16)))
    if samples_per_shard < 1:
        raise UsageError(f"{samples_per_shard} samples per shard: at least one is needed")
    if max_shard_mb is not None and not max_shard_mb * _MEGABYTE >= 1:
        raise UsageError(f"{max_shard_mb} MB per shard: it must be more than nothing")
    if len(source) < 1:
        raise UserError(f"source {source.name} has no samples; check its folder and options")
    if not KEY.fullmatch(name) or "/" in name:
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
        "max_shard_mb": max_shard_mb,
    }
    as_stored: dict[str, Any] = json.loads(json.dumps(recipe))
    return as_stored


def _prepare(out: Path, recipe: dict[str, Any], held: ExitStack) -> bool:
    """Make the folder ready to be written to, by us alone as long as `held` is open; True where the set is complete."""
    work = out / WORK_FOLDER
    _check_folder(out, recipe)
    if not (out / INDEX_JSON).exists():
        work.mkdir(parents=True, exist_ok=True)
        _lock(out, held)
        _check_folder(out, recipe)  # again: another build may have ended just before
    if (out / INDEX_JSON).exists():
        shutil.rmtree(work, ignore_errors=True)
        print(f"{out}: complete already, kept; `hpe-shards verify {out}` checks it, remove it to build it again")
        return True
    for leftover in work.glob(part.TEMPORARIES):
        leftover.unlink(missing_ok=True)
    files.write_json_atomic(work / _RECIPE, recipe)
    return False


def _check_folder(out: Path, recipe: dict[str, Any]) -> None:
    """Raise UserError where the folder holds something else than this set, complete or not."""
    work = out / WORK_FOLDER
    if (out / INDEX_JSON).exists():
        _check_same(out, recipe, open_set(out).info, "a complete set")
    elif (work / _RECIPE).exists():
        _check_same(out, recipe, json.loads((work / _RECIPE).read_text(encoding="utf-8")), "an unfinished build")
    elif out.exists() and any(path.name != WORK_FOLDER for path in out.iterdir()):
        raise UserError(f"{out}: holds files that are no shard set; choose another --out")


def _lock(out: Path, held: ExitStack) -> None:
    """Keep other builds out until `held` is closed, or this process ends. Raises UserError where one is under way."""
    try:
        file = held.enter_context((out / WORK_FOLDER / _LOCK).open("w"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{out}: another build is writing into it; wait for its end, or stop it, or choose another --out"
        ) from None
    except OSError:
        return  # no locks on this file system; where it cannot be written to, the recipe says so


def _check_same(out: Path, recipe: dict[str, Any], other: dict[str, Any], what: str) -> None:
    for key in recipe:
        if recipe[key] != other.get(key):
            here, there = json.dumps(recipe[key]), json.dumps(other.get(key))
            raise UserError(f"{out}: holds {what} with {key} {there}, not {here}; remove it or choose another --out")


def _bounds(recipe: dict[str, Any]) -> list[tuple[int, int]]:
    """First and last + 1 sample of every range: as equal as can be, since plain readers deal whole shards."""
    samples, count = recipe["samples"], -(-recipe["samples"] // recipe["samples_per_shard"])
    return [(samples * k // count, samples * (k + 1) // count) for k in range(count)]


def _missing(out: Path, recipe: dict[str, Any], comm: Comm) -> list[int]:
    """All ranks. The ranges still to be written; the ranks share the hashing of those that are there."""
    work, count = out / WORK_FOLDER, len(_bounds(recipe))
    # Tars get their names once all ranges are there, and in their order: only then may one have gone ahead.
    named = _tar_names(recipe["name"], work, count) if all(_has_npz(work, k) for k in range(count)) else {}
    mine = [k for k in range(comm.rank, count, comm.size) if not _is_written(out, k, named)]
    gathered = comm.gather(mine)
    missing = comm.broadcast(sorted(k for found in gathered for k in found) if gathered is not None else [])
    if comm.rank == 0 and len(missing) < count:
        print(f"{out}: {count - len(missing)} of {count} parts are there already, kept")
    return missing


def _has_npz(work: Path, number: int) -> bool:
    return part.npz_path(work, number).exists()


def _is_written(out: Path, number: int, named: Mapping[Path, str]) -> bool:
    work = out / WORK_FOLDER
    if not _has_npz(work, number):
        return False
    arrays = np.load(part.npz_path(work, number))
    if "subjects" not in arrays:  # of an earlier version
        return False
    for piece, digest in enumerate(arrays["sha256"].tolist()):
        tar = part.tar_path(work, number, piece)
        if not tar.exists() and tar in named:
            tar = out / named[tar]
        if not tar.exists() or files.sha256(tar) != digest:
            return False
    return True


def _tar_names(name: str, work: Path, count: int) -> dict[Path, str]:
    """The final name of every waiting tar."""
    tars = [
        part.tar_path(work, number, piece)
        for number in range(count)
        for piece in range(len(np.load(part.npz_path(work, number))["sha256"]))
    ]
    return {tar: f"{name}-{shard:06d}.tar" for shard, tar in enumerate(tars)}


def _check_space(source: Source, out: Path, recipe: dict[str, Any], missing: list[int]) -> None:
    """Raise UserError where the disk has no room for the ranges still to be written, as far as can be told before."""
    bounds, work = _bounds(recipe), out / WORK_FOLDER
    samples = sum(bounds[number][1] - bounds[number][0] for number in missing)
    if not samples:
        return
    there = [part.npz_path(work, number) for number in sorted(set(range(len(bounds))) - set(missing))[:_PROBES]]
    if there:
        sizes = [part.stored_bytes(*pair) for path in there for pair in _stored_sizes(np.load(path))]
    else:
        count = min(_PROBES, len(source))
        probes = [source.sample((2 * k + 1) * len(source) // (2 * count)) for k in range(count)]
        sizes = [part.stored_bytes(len(probe.image), len(probe.record.to_json())) for probe in probes]
    needed = int(samples * (sum(sizes) / len(sizes) + _INDEX_BYTES))
    free = shutil.disk_usage(work).free
    if free < needed:
        raise UserError(
            f"{out}: {samples:,} samples need about {needed / 1e9:,.3f} GB, {free / 1e9:,.3f} GB are free; free some "
            "space or choose another --out"
        )


def _stored_sizes(arrays: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    return zip(arrays["image_size"].tolist(), arrays["json_size"].tolist(), strict=True)


def _write_missing(source: Source, out: Path, recipe: dict[str, Any], missing: list[int], comm: Comm) -> None:
    """All ranks. Round by round each rank writes one range, in step with the others: rank 0 shows the total."""
    bounds = _bounds(recipe)
    most_bytes = recipe["max_shard_mb"] and int(recipe["max_shard_mb"] * _MEGABYTE)
    ticks = -(-max((bounds[number][1] - bounds[number][0] for number in missing), default=0) // part.TICK)
    total = sum(bounds[number][1] - bounds[number][0] for number in missing)
    with Progress(comm).bar(f"build {recipe['name']}", total) as bar:
        for first in range(0, len(missing), comm.size):
            mine = missing[first + comm.rank : first + comm.rank + 1]
            work: Iterator[int] = iter(())
            if mine:
                work = part.write_range(source, out / WORK_FOLDER, mine[0], bounds[mine[0]], most_bytes)
            for _ in range(ticks):
                bar.advance(comm.sum(next(work, 0)))


def _finish(out: Path, recipe: dict[str, Any]) -> None:
    """Merge the parts into index.npz, give the tars their names, and make the set visible."""
    work, count = out / WORK_FOLDER, len(_bounds(recipe))
    arrays, poses, digests = _merged(work, recipe)
    _check_keys(arrays["key"], recipe["source"])
    part.save_npz(work / INDEX_NPZ, arrays)
    os.replace(work / INDEX_NPZ, out / INDEX_NPZ)
    names = _tar_names(recipe["name"], work, count)
    for waiting, name in names.items():
        if waiting.exists():
            os.replace(waiting, out / name)
    samples = np.bincount(arrays["shard"], minlength=len(names)).tolist()
    tars = [
        {"file": name, "samples": count, "bytes": (out / name).stat().st_size, "sha256": digest}
        for name, count, digest in zip(names.values(), samples, digests, strict=True)
    ]
    index = {"bytes": (out / INDEX_NPZ).stat().st_size, "sha256": files.sha256(out / INDEX_NPZ)}
    files.write_json_atomic(work / INDEX_JSON, _info(recipe, arrays, poses, tars) | {"index": index})
    _sync(out)  # all names before the one that makes the set visible
    os.replace(work / INDEX_JSON, out / INDEX_JSON)
    _sync(out)
    shutil.rmtree(work, ignore_errors=True)


def _merged(work: Path, recipe: dict[str, Any]) -> tuple[Arrays, Arrays, list[str]]:
    """The set's arrays, its histogram of poses, and the hashes of its tars.

    Two passes over the parts: what is large is written into its place once.
    """
    bounds = _bounds(recipe)
    paths = [part.npz_path(work, number) for number in range(len(bounds))]
    tables, heads, key_bytes = [], [0], 1
    for path in paths:
        found = np.load(path)
        tables.append(found["subjects"])
        heads.append(heads[-1] + len(found["head_subject"]))
        key_bytes = max(key_bytes, found["key"].itemsize)
    subjects = np.unique(np.concatenate(tables))
    samples = recipe["samples"]
    arrays: Arrays = {column: np.empty(samples, dtype) for column, dtype in part.DTYPES.items()}
    arrays |= {"key": np.empty(samples, f"S{key_bytes}"), "subject": np.empty(samples, np.int32)}
    arrays |= {"head_subject": np.empty(heads[-1], np.int32), "subjects": subjects}
    poses: Arrays = {}
    digests: list[str] = []
    for path, rows, head_rows, table in zip(paths, bounds, pairwise(heads), tables, strict=True):
        found = np.load(path)
        for column in (*part.DTYPES, "key"):
            arrays[column][slice(*rows)] = found[column]
        arrays["shard"][slice(*rows)] += len(digests)
        numbers = np.searchsorted(subjects, table).astype(np.int32)
        arrays["subject"][slice(*rows)] = numbers[found["subject"]]
        arrays["head_subject"][slice(*head_rows)] = numbers[found["head_subject"]]
        poses = {angle: poses.get(angle, 0) + found[angle] for angle in part.LOWEST_DEG}
        digests += found["sha256"].tolist()
    return arrays, poses, digests


def _check_keys(keys: np.ndarray, source: str) -> None:
    """Raise UserError where a key comes twice."""
    keys = np.sort(keys)
    again = np.flatnonzero(keys[1:] == keys[:-1])
    if len(again):
        names, times = np.unique(keys[again], return_counts=True)
        worst = int(np.argmax(times))
        name = str(bytes(names[worst]), "ascii")
        raise UserError(f"source {source}: key {name} comes {times[worst] + 1} times; keys must be unique")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _info(recipe: dict[str, Any], arrays: Arrays, poses: Arrays, tars: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {
        "samples": len(arrays["key"]),
        "heads": int(arrays["n_heads"].sum()),
        "objects": int(arrays["n_objects"].sum()),
        "subjects": int(np.count_nonzero(arrays["subjects"] != b"")),
        "shards": len(tars),
        "bytes": sum(tar["bytes"] for tar in tars),
    }
    histogram = {
        angle: {"lowest_deg": part.LOWEST_DEG[angle], "bin_deg": part.BIN_DEG, "heads": poses[angle].tolist()}
        for angle in poses
    }
    return recipe | {"counts": counts, "poses": histogram, "shards": tars}
