"""Whether a shard set is what its index says, and whether sets that must be apart share a subject."""

import tarfile
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from launcher import files
from launcher.comm import Comm
from launcher.progress import Progress
from shards.index import SampleError, ShardSet, open_set
from shards.part import pose_histogram
from shards.pixels import decode_pixels
from shards.record import Record

_OUTSIDE_PX = 1.0
_NAMED = 5
_LEFT_ALONE = {"index.json", "index.npz"}


def verify(paths: Sequence[Path], comm: Comm, fast: bool = False) -> list[str]:
    """All ranks. The findings over the sets at `paths`, one line each, the same on every rank; none: all is well.

    fast: the index only (counts, keys, sizes of the tars, subjects shared between splits), else also every byte:
    hashes, members, images, records, boxes, poses; ranks share the shards. Raises UserError where a set does not open.
    """
    sets = [open_set(path) for path in paths]
    findings = [finding for shard_set in sets for finding in check_index(shard_set)]
    findings += check_leaks(sets)
    if not fast:
        for shard_set in sets:
            findings += _check_content(shard_set, comm)
    return findings


def check_index(shard_set: ShardSet) -> list[str]:
    """Findings that need no sample to be read: counts, keys, offsets, and the tars' presence and sizes."""
    arrays, info, path = shard_set.arrays, shard_set.info, shard_set.path
    findings = []
    counted = {
        "samples": len(shard_set),
        "heads": int(arrays["n_heads"].sum()),
        "objects": int(arrays["n_objects"].sum()),
        "shards": len(info["shards"]),
        "bytes": sum(shard["bytes"] for shard in info["shards"]),
    }
    for what, number in counted.items():
        if info["counts"][what] != number:
            findings.append(f"{path}: index.json counts {info['counts'][what]} {what}, there are {number}")
    keys, times = np.unique(arrays["key"], return_counts=True)
    findings += [f"{path}, key {str(key, 'ascii')}: comes more than once" for key in keys[times > 1][:_NAMED].tolist()]
    per_shard = np.bincount(arrays["shard"], minlength=len(info["shards"]))
    for shard, found in zip(info["shards"], per_shard.tolist(), strict=False):
        findings += _check_tar(path / shard["file"], shard, found)
    findings += _check_offsets(shard_set)
    listed = {shard["file"] for shard in info["shards"]} | _LEFT_ALONE
    strangers = sorted(file.name for file in path.iterdir() if file.suffix == ".tar" and file.name not in listed)
    return findings + [f"{path / name}: a tar that the index does not list" for name in strangers]


def _check_tar(tar: Path, shard: dict[str, Any], found: int) -> list[str]:
    findings = []
    if found != shard["samples"]:
        findings.append(f"{tar}: index.json says {shard['samples']} samples, index.npz {found}")
    if not tar.is_file():
        return [*findings, f"{tar}: missing"]
    size = tar.stat().st_size
    if size != shard["bytes"]:
        findings.append(f"{tar}: {size} bytes, {shard['bytes']} were written")
    return findings


def _check_offsets(shard_set: ShardSet) -> list[str]:
    arrays = shard_set.arrays
    limits = np.array([shard["bytes"] for shard in shard_set.info["shards"]])[arrays["shard"]]
    findings = []
    for part in ("image", "json"):
        ends = arrays[f"{part}_offset"] + arrays[f"{part}_size"]
        for i in np.flatnonzero((arrays[f"{part}_offset"] < 512) | (ends > limits))[:_NAMED].tolist():
            where = f"{shard_set.path / shard_set.shard_name(i)}, key {shard_set.key(i)}"
            findings.append(f"{where}: the index puts its {part} outside the tar")
    return findings


def check_leaks(sets: Sequence[ShardSet]) -> list[str]:
    """Subjects that sets of different splits share: a model would be judged on people it has seen."""
    findings = []
    subjects = [shard_set.subjects() for shard_set in sets]
    for (one, in_one), (other, in_other) in combinations(zip(sets, subjects, strict=True), 2):
        shared = sorted(in_one & in_other)
        if one.info["split"] != other.info["split"] and shared:
            names = ", ".join(shared[:_NAMED]) + (", …" if len(shared) > _NAMED else "")
            splits = f"{one.path} ({one.info['split']}) and {other.path} ({other.info['split']})"
            findings.append(f"{splits}: share {len(shared)} subjects: {names}")
    return findings


def _check_content(shard_set: ShardSet, comm: Comm) -> list[str]:
    """All ranks."""
    shards = shard_set.info["shards"]
    findings: list[str] = []
    poses = [np.empty((0, 3))]
    with Progress(comm).bar(f"verify {shard_set.path.name}", len(shards)) as bar:
        for first in range(0, len(shards), comm.size):
            mine = first + comm.rank
            if mine < len(shards):
                findings += _check_shard(shard_set, mine, poses)
            comm.barrier()
            bar.advance(min(comm.size, len(shards) - first))
    gathered = comm.gather((findings, pose_histogram(np.concatenate(poses))))
    merged = _merge(shard_set, gathered) if gathered is not None else []
    return comm.broadcast(merged)


def _merge(shard_set: ShardSet, gathered: list[tuple[list[str], dict[str, Any]]]) -> list[str]:
    findings = sorted(finding for found, _ in gathered for finding in found)
    for angle, said in shard_set.info["poses"].items():
        counts = np.sum([histogram[angle] for _, histogram in gathered], axis=0).tolist()
        if counts != said["heads"] and not findings:
            findings.append(f"{shard_set.path}: the histogram of {angle} in index.json is not that of the records")
    return findings


def _check_shard(shard_set: ShardSet, shard: int, poses: list[np.ndarray]) -> list[str]:
    """Findings of one tar; the poses of its heads are added to `poses`."""
    said = shard_set.info["shards"][shard]
    tar = shard_set.path / said["file"]
    if not tar.is_file():
        return []  # check_index has said so, and of another size too
    findings = []
    if tar.stat().st_size == said["bytes"] and files.sha256(tar) != said["sha256"]:
        findings.append(f"{tar}: sha256 differs from the index: the bytes have changed since it was built")
    samples = np.flatnonzero(shard_set.arrays["shard"] == shard).tolist()
    findings += _check_members(tar, [shard_set.key(i) for i in samples])
    for i in samples:
        try:
            findings += [f"{tar}, key {shard_set.key(i)}: {what}" for what in _check_sample(shard_set, i, poses)]
        except SampleError as error:
            findings.append(str(error))
    return findings


def _check_members(tar: Path, keys: list[str]) -> list[str]:
    """Whether any reader of tars finds the samples of the index, each one's files side by side."""
    try:
        with tarfile.open(tar) as archive:
            found = [member.name.split(".", 1)[0] for member in archive]
    except tarfile.TarError as error:
        return [f"{tar}: not a readable tar ({error})"]
    if found[::2] == keys and found[1::2] == keys:
        return []
    return [f"{tar}: its members are not two files for each of the {len(keys)} keys of the index, side by side"]


def _check_sample(shard_set: ShardSet, i: int, poses: list[np.ndarray]) -> Iterator[str]:
    stored = shard_set.read(i)
    known = shard_set.parse(i, stored.json)
    poses.append(known.poses_deg)
    indexed = (int(shard_set.arrays["n_heads"][i]), int(shard_set.arrays["n_objects"][i]))
    if indexed != (len(known.heads), len(known.objects)):
        yield f"{len(known.heads)} heads and {len(known.objects)} objects, the index says {indexed[0]} and {indexed[1]}"
    try:
        height, width = decode_pixels(stored.image, stored.extension).shape[:2]
    except ValueError as error:
        yield f"the {stored.extension} does not decode ({error})"
        return
    if (width, height) != (known.image.width, known.image.height):
        yield f"the image is {width}x{height}, its record says {known.image.width}x{known.image.height}"
    yield from _boxes_outside(known)


def _boxes_outside(known: Record) -> Iterator[str]:
    boxes = [(f"head {k}", head.bbox) for k, head in enumerate(known.heads)]
    boxes += [(f"object {k}", thing.bbox) for k, thing in enumerate(known.objects)]
    for name, (x0, y0, x1, y1) in boxes:
        beyond = max(-x0, -y0, x1 - known.image.width, y1 - known.image.height)
        if beyond > _OUTSIDE_PX:
            yield f"{name}: box reaches {beyond:.1f} px outside the image"
