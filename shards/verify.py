"""Whether a shard set is what its index says, and whether sets that must be apart share a subject."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from launcher import files
from launcher.comm import Comm
from launcher.errors import UsageError, UserError
from launcher.progress import Progress
from shards.index import INDEX_JSON, INDEX_NPZ, SampleError, ShardSet, open_set
from shards.part import LOWEST_DEG, pose_histogram
from shards.pixels import SizeError, decode_pixels
from shards.record import Record
from shards.remote import as_url
from shards.tars import HEADER, Member, check_members

_OUTSIDE_PX = 1.0
_NAMED = 5
_LEFT_ALONE = {INDEX_JSON, INDEX_NPZ}
_COUNTED = ("samples", "heads", "objects", "shards", "bytes")
_MOST_BYTES = 1 << 48  # of a tar: no place in it lies behind them
_PLACES = ("image_offset", "image_size", "json_offset", "json_size")


@dataclass(frozen=True)
class Lint:
    """What was found over some sets, and what is in them."""

    findings: list[str]
    """One line each."""
    sets: list[dict[str, Any]]
    """Of each set: path, source, split, counts and poses, the histogram of its records (the index's with `fast`, and
    where index.npz is damaged)."""

    def to_json(self) -> dict[str, Any]:
        """The report file."""
        return {"good": not self.findings, "findings": self.findings, "sets": self.sets}


def verify(paths: Sequence[Path], comm: Comm, fast: bool = False) -> list[str]:
    """All ranks. The findings of lint()."""
    return lint(paths, comm, fast).findings


def lint(paths: Sequence[Path], comm: Comm, fast: bool = False) -> Lint:
    """All ranks. The findings over the sets at `paths`, one line each, the same on every rank; none: all is well.

    fast: the index only (counts, keys, sizes of the tars, subjects shared between splits), else also every byte:
    hashes, headers, members, images, records, boxes, poses; ranks share the shards. Raises UserError where a set does
    not open, UsageError for one that is elsewhere. Where index.npz is damaged, what needs it is left out.
    """
    for path in paths:
        if as_url(path) is not None:
            raise UsageError(f"{path}: sets are verified where they are; copy it to a folder first")
    sets = [open_set(path) for path in paths]
    for shard_set in sets:
        _check_json(shard_set)
    damage = [_check_npz(shard_set) for shard_set in sets]
    findings = [finding for pair in zip(sets, damage, strict=True) for finding in _check_index(*pair)]
    findings += check_leaks([shard_set for shard_set, damaged in zip(sets, damage, strict=True) if not damaged])
    described = [_describe(shard_set) for shard_set in sets]
    if not fast:
        for shard_set, damaged, description in zip(sets, damage, described, strict=True):
            found, poses = _check_content(shard_set, comm, not damaged)
            findings += found
            for angle, heads in poses.items():
                description["poses"][angle] = {**description["poses"][angle], "heads": heads}
    return Lint(findings, described)


def _describe(shard_set: ShardSet) -> dict[str, Any]:
    info = shard_set.info
    told = {name: info.get(name) for name in ("name", "source", "split", "licence", "counts")}
    return {"path": str(shard_set.path), **told, "poses": dict(info["poses"])}


def _check_json(shard_set: ShardSet) -> None:
    """Raise UserError where index.json lacks what every build writes into it: nothing can be held against it then."""
    info = shard_set.info
    try:
        good = isinstance(info["split"], str) and all(type(info["counts"][what]) is int for what in _COUNTED)
        good = good and info["poses"].keys() == LOWEST_DEG.keys() and type(info.get("index", {})) is dict
        for told in info["poses"].values():
            numbers = [told["lowest_deg"], told["bin_deg"], *told["heads"]]
            good = good and len(told["heads"]) > 0 and all(type(number) is int for number in numbers)
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(
            f"{shard_set.path / INDEX_JSON}: not as a build writes it: split, counts, poses or index is damaged; "
            "copy the set again, or remove and build it"
        )


def _check_npz(shard_set: ShardSet) -> list[str]:
    """Findings that make the columns of index.npz useless: other bytes than were written, numbers of nothing."""
    path, said, arrays = shard_set.path / INDEX_NPZ, shard_set.info.get("index"), shard_set.arrays
    # Sets of the first builds do not say.
    if said is not None and files.sha256(path) != said.get("sha256"):
        return [f"{path}: sha256 differs from that in {INDEX_JSON}: its bytes have changed since it was built"]
    limits = {"shard": len(shard_set.info["shards"]), "subject": len(arrays["subjects"])}
    limits |= {"head_subject": limits["subject"]} | dict.fromkeys(_PLACES, _MOST_BYTES)
    return [
        f"{path}: column {name} holds a number outside [0, {limit}), which no build writes; copy the set again"
        for name, limit in limits.items()
        if len(arrays[name]) and not 0 <= arrays[name].min() <= arrays[name].max() < limit
    ]


def _check_index(shard_set: ShardSet, damage: list[str]) -> list[str]:
    """Findings that need no sample to be read: counts, keys, offsets, and the tars' presence and sizes.

    damage: what _check_npz has found; the columns are looked at where that is nothing.
    """
    info, path = shard_set.info, shard_set.path
    findings = [*damage] or _check_columns(shard_set)
    for shard in info["shards"]:
        findings += _check_tar(path / shard["file"], shard)
    listed = {shard["file"] for shard in info["shards"]} | _LEFT_ALONE
    strangers = sorted(file.name for file in path.iterdir() if file.suffix == ".tar" and file.name not in listed)
    return findings + [f"{path / name}: a tar that the index does not list" for name in strangers]


def _check_columns(shard_set: ShardSet) -> list[str]:
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
    again = keys[times > 1][:_NAMED].tolist()
    findings += [f"{path}, key {str(key, 'ascii', 'replace')}: comes more than once" for key in again]
    per_shard = np.bincount(arrays["shard"], minlength=len(info["shards"]))
    for shard, found in zip(info["shards"], per_shard.tolist(), strict=True):
        if found != shard["samples"]:
            tar = path / shard["file"]
            findings.append(f"{tar}: index.json says {shard['samples']} samples, index.npz {found}")
    return findings + _check_offsets(shard_set)


def _check_tar(tar: Path, shard: dict[str, Any]) -> list[str]:
    if not tar.is_file():
        return [f"{tar}: missing"]
    size = tar.stat().st_size
    return [] if size == shard["bytes"] else [f"{tar}: {size} bytes, {shard['bytes']} were written"]


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


def _check_content(shard_set: ShardSet, comm: Comm, by_index: bool) -> tuple[list[str], dict[str, list[int]]]:
    """All ranks. Findings, and the histogram of the records' poses.

    by_index: look at the samples too, where index.npz says they are; otherwise only at the tars' hashes, and there is
    no histogram.
    """
    shards = shard_set.info["shards"]
    findings: list[str] = []
    poses = pose_histogram(np.empty((0, 3)))
    by_shard = np.argsort(shard_set.arrays["shard"], kind="stable")
    starts = np.searchsorted(shard_set.arrays["shard"], np.arange(len(shards) + 1), sorter=by_shard)
    with Progress(comm).bar(f"verify {shard_set.path.name}", len(shards)) as bar:
        for first in range(0, len(shards), comm.size):
            mine = first + comm.rank
            if mine < len(shards):
                findings += _check_bytes(shard_set, mine)
                if by_index:
                    samples = by_shard[starts[mine] : starts[mine + 1]].tolist()
                    found, heads = _check_shard(shard_set, mine, samples)
                    findings += found
                    poses = {angle: poses[angle] + heads[angle] for angle in poses}
            comm.barrier()
            bar.advance(min(comm.size, len(shards) - first))
    gathered = comm.gather((findings, poses))
    merged = _merge(shard_set, gathered, by_index) if gathered is not None else ([], {})
    return comm.broadcast(merged)


def _merge(
    shard_set: ShardSet, gathered: list[tuple[list[str], dict[str, Any]]], by_index: bool
) -> tuple[list[str], dict[str, list[int]]]:
    findings = sorted(finding for found, _ in gathered for finding in found)
    if not by_index:
        return findings, {}
    poses = {
        angle: np.sum([histogram[angle] for _, histogram in gathered], axis=0).tolist()
        for angle in shard_set.info["poses"]
    }
    for angle, said in shard_set.info["poses"].items():
        if poses[angle] != said["heads"] and not findings:
            findings.append(f"{shard_set.path}: the histogram of {angle} in index.json is not that of the records")
    return findings, poses


def _check_bytes(shard_set: ShardSet, shard: int) -> list[str]:
    said, tar = shard_set.info["shards"][shard], shard_set.tar(shard)
    # _check_index has said that it is missing, or of another size.
    if not tar.is_file() or tar.stat().st_size != said["bytes"] or files.sha256(tar) == said["sha256"]:
        return []
    return [f"{tar}: sha256 differs from the index: the bytes have changed since it was built"]


def _check_shard(shard_set: ShardSet, shard: int, samples: Sequence[int]) -> tuple[list[str], dict[str, Any]]:
    """Findings in the samples of one tar, all that the index puts there, and the histogram of their poses."""
    tar, poses, findings = shard_set.tar(shard), [np.empty((0, 3))], []
    if not tar.is_file():
        return [], pose_histogram(poses[0])
    findings += check_members(tar, list(_members(shard_set, samples)))
    for i in samples:
        try:
            findings += [f"{tar}, key {shard_set.key(i)}: {what}" for what in _check_sample(shard_set, i, poses)]
        except SampleError as error:
            findings.append(str(error))
    return findings, pose_histogram(np.concatenate(poses))


def _members(shard_set: ShardSet, samples: Sequence[int]) -> Iterator[Member]:
    """What the tar of these samples should hold."""
    arrays = shard_set.arrays
    for i in samples:
        offsets = {part: int(arrays[f"{part}_offset"][i]) - HEADER for part in ("image", "json")}
        # Members lie in the order of their extensions.
        image = "jpg" if offsets["image"] < offsets["json"] else "png"
        for part, extension in (("image", image), ("json", "json")):
            yield Member(offsets[part], f"{shard_set.key(i)}.{extension}", int(arrays[f"{part}_size"][i]))


def _check_sample(shard_set: ShardSet, i: int, poses: list[np.ndarray]) -> Iterator[str]:
    stored = shard_set.read(i)
    known = shard_set.parse(i, stored.json)
    poses.append(known.poses_deg)
    indexed = (int(shard_set.arrays["n_heads"][i]), int(shard_set.arrays["n_objects"][i]))
    if indexed != (len(known.heads), len(known.objects)):
        yield f"{len(known.heads)} heads and {len(known.objects)} objects, the index says {indexed[0]} and {indexed[1]}"
    try:
        decode_pixels(stored.image, stored.extension, (known.image.width, known.image.height))
    except SizeError as error:
        yield str(error)
    except ValueError as error:
        yield f"the {stored.extension} does not decode ({error})"
        return
    yield from _boxes_outside(known)


def _boxes_outside(known: Record) -> Iterator[str]:
    boxes = [(f"head {k}", head.bbox) for k, head in enumerate(known.heads)]
    boxes += [(f"object {k}", thing.bbox) for k, thing in enumerate(known.objects)]
    for name, (x0, y0, x1, y1) in boxes:
        beyond = max(-x0, -y0, x1 - known.image.width, y1 - known.image.height)
        if beyond > _OUTSIDE_PX:
            yield f"{name}: box reaches {beyond:.1f} px outside the image"
