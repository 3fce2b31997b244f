"""A thousand damaged tars, and damaged indexes: no hang, no crash, nothing outside the folder, and every loss counted.

What is expected of a tar is worked out without the reader: a sample whose bytes are unchanged must arrive unchanged.
"""

import io
import json
import random
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.comm import single
from launcher.errors import UserError
from shards.augment import Augment
from shards.index import SampleError, ShardSet, open_set
from shards.plan import Plan
from shards.record import RecordError, from_json
from shards.stream import Item, Reader, Slot, Stream
from shards.verify import verify

SAMPLES, ROUNDS, PER_ROUND = 8, 10, 100
STRONG = Augment(flip=True, rotate_deg=25.0, crop=0.6, colour=0.3)
Mutation = Callable[[random.Random, bytearray, ShardSet], bytes | bytearray]


def bit_flips(rng: random.Random, data: bytearray, _: ShardSet) -> bytearray:
    for _ in range(rng.choice([1, 3, 40])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def truncation(rng: random.Random, data: bytearray, _: ShardSet) -> bytearray:
    return data[: rng.randrange(len(data))]


def shift(rng: random.Random, data: bytearray, _: ShardSet) -> bytearray:
    at, count = rng.randrange(len(data)), rng.choice([1, 100, 512, 1024])
    if rng.random() < 0.5:
        return data[:at] + bytes(rng.choice([0, 255]) for _ in range(count)) + data[at:]
    return data[:at] + data[at + count :]


def garbage(rng: random.Random, data: bytearray, _: ShardSet) -> bytes:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice([10, 600, 5000]))
    data[start:stop] = rng.randbytes(stop - start) if rng.random() < 0.7 else bytes(stop - start)
    return rng.choice([data, data, data, b"", zlib.compress(bytes(data)), rng.randbytes(3000)])


def members_of(data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for member, content in members:
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def interleaving(rng: random.Random, data: bytearray, _: ShardSet) -> bytes:
    members = members_of(bytes(data))
    if rng.random() < 0.5:
        members = members[::2] + members[1::2]
    else:
        rng.shuffle(members)
    return tar_of(members)


def duplicate_names(rng: random.Random, data: bytearray, _: ShardSet) -> bytes:
    members = members_of(bytes(data))
    for _ in range(rng.choice([1, 2, 8])):
        members[rng.randrange(len(members))][0].name = members[rng.randrange(len(members))][0].name
    return tar_of(members)


EVIL_NAMES = ["../evil.jpg", "../../evil.jpg", "/tmp/evil.json", "a/../../../evil.jpg", "..\\evil.jpg", "\r\n.jpg"]


def path_tricks(rng: random.Random, data: bytearray, _: ShardSet) -> bytes:
    members = members_of(bytes(data))
    for _ in range(rng.choice([1, 4])):
        member = members[rng.randrange(len(members))][0]
        member.name = rng.choice(EVIL_NAMES)
        member.type = rng.choice([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
        member.linkname = "../../../../etc/passwd" if member.type != tarfile.REGTYPE else ""
    return tar_of(members, rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))


def bomb_png(side: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(200_000))) + chunk(b"IEND", b"")


def bomb_jpeg(image: bytes, side: int) -> bytes:
    at = image.index(b"\xff\xc0") + 5
    return image[:at] + struct.pack(">HH", side, side) + image[at + 4 :]


def bombs(rng: random.Random, data: bytearray, shard_set: ShardSet) -> bytearray:
    i = rng.randrange(SAMPLES)
    image_at, image_size = (int(shard_set.arrays[f"image_{what}"][i]) for what in ("offset", "size"))
    json_at, json_size = (int(shard_set.arrays[f"json_{what}"][i]) for what in ("offset", "size"))
    image = bytes(data[image_at : image_at + image_size])
    side = rng.choice([20_000, 65_500])
    kind = rng.randrange(4)
    if kind == 0:
        bomb = bomb_jpeg(image, side) if b"\xff\xc0" in image else bomb_png(side)
        put(data, image_at, image_size, bomb)
    elif kind == 1:
        put(data, image_at, image_size, bomb_png(side))
        # The record agrees, so that only the limit on pixels is left.
        swap(data, json_at, json_size, [("width", side), ("height", side)])
    elif kind == 2:
        put(data, json_at, json_size, rng.choice([b"[" * json_size, b'{"a":' * json_size, b"9" * json_size]))
    else:
        data[image_at - 512 + 124 : image_at - 512 + 136] = b"77777777777\0"
    return data


def put(data: bytearray, at: int, size: int, content: bytes, fill: bytes = b"\0") -> None:
    data[at : at + size] = content[:size].ljust(size, fill)


ODD: list[Any] = [
    *(None, True, -1, 0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), 10**30, 10**400, "", "x", "\u0000", [], {}),
    *([1, 2], [[[]]], {"fx": 0}, "../../evil", [1e308] * 4, [0, 0, 1e-200, 1e-200], [-1e300, 0, 1e300, 5]),
]


def odd_records(rng: random.Random, data: bytearray, shard_set: ShardSet) -> bytearray:
    """JSON that parses, of the right length, with one value of another kind or size."""
    i = rng.randrange(SAMPLES)
    at, size = (int(shard_set.arrays[f"json_{what}"][i]) for what in ("offset", "size"))
    value = json.loads(data[at : at + size])
    value["image"]["camera"] = {"fx": 50.0, "fy": 50.0, "cx": 24.0, "cy": 18.0}
    place: Any = value
    while True:
        name = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[name], dict | list) or not place[name] or rng.random() < 0.2:
            break
        place = place[name]
    place[name] = rng.choice(ODD)
    text = json.dumps(value, separators=(",", ":")).encode()
    for spare in ("objects", "heads"):  # make room: the odd value may be long
        if len(text) > size and place is not value.get(spare):
            value[spare] = []
            text = json.dumps(value, separators=(",", ":")).encode()
    put(data, at, size, text, b" ")
    return data


def swap(data: bytearray, at: int, size: int, values: list[tuple[str, Any]]) -> None:
    value = json.loads(data[at : at + size])
    value["image"] |= dict(values)
    value["objects"] = []
    put(data, at, size, json.dumps(value, separators=(",", ":")).encode(), b" ")


MUTATIONS: list[Mutation] = [
    *(
        bit_flips,
        truncation,
        shift,
        garbage,
        interleaving,
        duplicate_names,
        path_tricks,
        bombs,
        odd_records,
        odd_records,
    )
]


@pytest.fixture
def no_hang() -> Iterator[Callable[[], None]]:
    """Call it before each case: a case that takes half a minute is a hang."""

    def late(*_: object) -> None:
        raise AssertionError("this case takes more than 30 s")

    signal.signal(signal.SIGALRM, late)
    yield lambda: signal.setitimer(signal.ITIMER_REAL, 30.0) and None
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def spans(shard_set: ShardSet) -> list[tuple[int, int]]:
    """Bytes of each sample that its reading may look at."""
    arrays = shard_set.arrays
    starts = [min(arrays["image_offset"][i], arrays["json_offset"][i]) - 512 for i in range(SAMPLES)]
    ends = [max(arrays[f"{p}_offset"][i] + arrays[f"{p}_size"][i] for p in ("image", "json")) for i in range(SAMPLES)]
    return [(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]


def bad_samples(shard_set: ShardSet) -> dict[int, str]:
    """Read one by one, failing: which samples are bad, and what is said."""
    reader, bad = Reader([shard_set], 16, "fail"), {}
    for i in range(SAMPLES):
        try:
            reader.item(Slot(0, i, 0, i), STRONG, 0)
        except SampleError as error:
            bad[i] = str(error)
    return bad


def check_case(folder: Path, good: dict[int, Item], whole: bytes, damaged: bytes) -> int:
    """Everything that must hold for one damaged tar; how many samples it lost."""
    shard_set = open_set(folder)
    tar = next(folder.glob("*.tar"))
    bad = bad_samples(shard_set)
    for i, said in bad.items():
        assert f"{tar.name}, key {shard_set.key(i)}: " in said and "\n" not in said
    stream = Stream([shard_set], Plan([SAMPLES], [1.0], 0, SAMPLES), 0, 1, 16, on_bad_sample="skip", augment=STRONG)
    found = {item.slot.sample: item for _, items in islice(stream, 1) for item in items}
    assert {i for i, item in found.items() if item.record is None} == set(bad) and stream.skipped == len(bad)
    for i, (start, end) in enumerate(spans(shard_set)):
        if damaged[start:end] == whole[start:end]:
            assert found[i].record == good[i].record and torch.equal(found[i].image, good[i].image)  # type: ignore[arg-type]
    findings = verify([folder], single())
    assert bool(findings) == (damaged != whole)
    assert all(str(folder) in finding and "\n" not in finding for finding in findings)
    assert all(any(f"key {shard_set.key(i)}" in finding for finding in findings) for i in bad)
    return len(bad)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_thousand_damaged_tars(tiny_set: Callable[..., Path], no_hang: Callable[[], None], number: int) -> None:
    folder = tiny_set(samples=SAMPLES, samples_per_shard=SAMPLES, extension="jpg" if number % 2 else "png")
    tar, outside = next(folder.glob("*.tar")), sorted(folder.parent.iterdir())
    inside, whole = sorted(folder.iterdir()), tar.read_bytes()
    shard_set = open_set(folder)
    plan = Plan([SAMPLES], [1.0], 0, SAMPLES)
    first = next(iter(Stream([shard_set], plan, 0, 1, 16, augment=STRONG)))[1]
    good = {item.slot.sample: item for item in first}
    lost = 0
    for case in range(PER_ROUND):
        no_hang()
        rng = random.Random(number * PER_ROUND + case)
        damaged = bytes(MUTATIONS[case % len(MUTATIONS)](rng, bytearray(whole), shard_set))
        tar.unlink()
        tar.write_bytes(damaged)
        lost += check_case(folder, good, whole, damaged)
        assert sorted(folder.parent.iterdir()) == outside and sorted(folder.iterdir()) == inside
        assert not (folder.parent.parent / "evil.jpg").exists() and not Path("/tmp/evil.json").exists()
    assert PER_ROUND < lost < PER_ROUND * SAMPLES


def paths(value: Any) -> Iterator[list[Any]]:
    """Every place in a JSON value."""
    for name in list(value) if isinstance(value, dict) else range(len(value)):
        yield [name]
        if isinstance(value[name], dict | list):
            yield from ([name, *rest] for rest in paths(value[name]))


def test_every_value_of_a_record_may_be_odd(tiny_set: Callable[..., Path]) -> None:
    """Each place with each odd value: the record is refused, or all that is done to records works."""
    value = json.loads(open_set(tiny_set(samples=2)).read(1).json)
    value["image"]["camera"] = {"fx": 50.0, "fy": 50.0, "cx": 24.0, "cy": 18.0}
    refused = taken = 0
    for path in paths(value):
        for odd in ODD:
            changed = json.loads(json.dumps(value))
            place = changed
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = odd
            try:
                known = from_json(json.dumps(changed))
            except RecordError as error:
                assert "\n" not in str(error)
                refused += 1
                continue
            taken += 1
            for position in range(4):
                assert from_json(STRONG.at(1, position, known).record(known).to_json())
    assert refused > 500 and taken > 20


def verified(folder: Path) -> list[str]:
    """What verify finds, or the one line that it ends with."""
    try:
        return verify([folder], single())
    except UserError as error:
        return [str(error)]


@pytest.mark.slow
def test_damaged_indexes_are_refused_or_their_samples_named(
    tiny_set: Callable[..., Path], no_hang: Callable[[], None]
) -> None:
    folder = tiny_set(samples=SAMPLES, samples_per_shard=SAMPLES)
    names = ("index.npz", "index.json")
    whole = {name: (folder / name).read_bytes() for name in names}
    refused = 0
    for case in range(400):
        no_hang()
        rng = random.Random(case)
        for name in names:
            (folder / name).write_bytes(whole[name])
        name = names[case % 2]
        (folder / name).write_bytes(rng.choice([bit_flips, bit_flips, truncation, shift])(
            rng, bytearray(whole[name]), None  # type: ignore[arg-type]
        ))  # fmt: skip
        try:
            bad = bad_samples(open_set(folder))
        except UserError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert all(".tar, key " in said for said in bad.values())
            found = verified(folder)
            assert all(str(folder) in finding and "\n" not in finding for finding in found)
            assert found or name == "index.json", "every byte of index.npz is under its hash"
    assert 100 < refused < 400


@pytest.mark.parametrize("name", ["../other.tar", "/etc/passwd", "a/b.tar", "..tar", "x.tar\n", ""])
def test_an_index_cannot_name_files_outside_its_folder(tiny_set: Callable[..., Path], name: str) -> None:
    folder = tiny_set(samples=3)
    info = json.loads((folder / "index.json").read_text())
    info["shards"][0]["file"] = name
    (folder / "index.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="its index is damaged .ValueError: .* is no name of a tar"):
        open_set(folder)
