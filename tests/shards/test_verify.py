"""verify finds each kind of damage, and people who are in two splits."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_source import TinySource

from launcher.comm import single
from launcher.errors import UsageError, UserError
from launcher.files import sha256
from shards.index import open_set
from shards.verify import lint, verify
from shards.write import Sample, build


def findings(*folders: Path, fast: bool = False) -> str:
    return "\n".join(verify(folders, single(), fast))


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_a_good_set_has_no_findings(tiny_set: Callable[..., Path], extension: str) -> None:
    folder = tiny_set(samples=13, extension=extension)
    assert findings(folder) == "" and findings(folder, fast=True) == ""


def test_a_missing_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        verify([tmp_path / "nowhere"], single())


def test_one_changed_byte_is_found_by_its_hash(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set(samples=13)
    tar = folder / "tiny-train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[-1] ^= 1  # padding after the last member: no sample is touched
    tar.write_bytes(data)
    assert findings(folder) == f"{tar}: sha256 differs from the index: the bytes have changed since it was built"
    assert findings(folder, fast=True) == ""


def test_a_cut_tar(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set(samples=13)
    tar = folder / "tiny-train-000001.tar"
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes()[:3000])
    assert findings(folder, fast=True) == f"{tar}: 3000 bytes, {size} were written"
    assert "the tar ends at byte 3000" in findings(folder)


def test_a_missing_tar_and_a_stranger(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set(samples=13)
    (folder / "tiny-train-000001.tar").rename(folder / "other.tar")
    for fast in (True, False):
        said = findings(folder, fast=fast)
        assert f"{folder / 'tiny-train-000001.tar'}: missing" in said
        assert f"{folder / 'other.tar'}: a tar that the index does not list" in said


def test_two_exchanged_tars(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set(samples=10)
    one, two = sorted(folder.glob("*.tar"))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    said = findings(folder)
    assert f"{one}, key tiny-train-000000: the header at byte 0 says 'tiny-train-000005.jpg' of " in said
    assert "other bytes there than the index says" in said


def harm_header(folder: Path, i: int, byte: int = 105) -> tuple[Path, int]:
    """Change one byte of the header of sample i's image; its tar and the header's place."""
    shard_set = open_set(folder)
    tar, at = folder / shard_set.shard_name(i), int(shard_set.arrays["image_offset"][i]) - 512
    data = bytearray(tar.read_bytes())
    data[at + byte] ^= 0x15
    tar.write_bytes(data)
    return tar, at


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_header_which_plain_webdataset_takes_for_the_end_is_named(tiny_set: Callable[..., Path]) -> None:
    import webdataset

    folder = tiny_set(samples=10, samples_per_shard=10)
    tar, at = harm_header(folder, 4)
    plain = [sample["__key__"] for sample in webdataset.WebDataset(str(tar), shardshuffle=False)]
    assert plain == [f"tiny-train-{i:06d}" for i in range(4)], "webdataset reads on: this test shows nothing any more"
    said = findings(folder)
    damage = f"{tar}, key tiny-train-000004: the header of tiny-train-000004.jpg at byte {at} is damaged"
    assert f"{damage} (its checksum is another one): plain readers of tars stop here" in said
    assert "and miss 12 members" in said and said.count("is damaged") == 1
    # By the index the samples behind it are there.
    assert open_set(folder).read(5).key == "tiny-train-000005"


def test_each_kind_of_damage_to_headers_is_told(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set(samples=10, samples_per_shard=10)
    shard_set = open_set(folder)
    tar = folder / shard_set.shard_name(0)
    data = bytearray(tar.read_bytes())
    at = [int(offset) - 512 for offset in shard_set.arrays["image_offset"]]
    data[at[2] : at[2] + 512] = bytes(512)
    data[at[3] : at[3] + 512] = data[at[5] : at[5] + 512]
    data[at[7] + 125] = ord("z")
    end = len(data) - data[::-1].index(next(byte for byte in reversed(data) if byte))
    data[end + 600] = 1
    tar.write_bytes(data)
    said = findings(folder)
    assert f"of tiny-train-000002.jpg at byte {at[2]} is damaged (it is empty, which readers take for the end)" in said
    assert f"key tiny-train-000003: the header at byte {at[3]} says 'tiny-train-000005.jpg' of " in said
    assert f"of tiny-train-000007.jpg at byte {at[7]} is damaged (" in said
    assert "behind the last sample, there is no end of a tar" in said


def test_members_that_the_index_does_not_know(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set(samples=10, samples_per_shard=10)
    arrays = dict(np.load(folder / "index.npz"))
    kept = np.arange(10) != 4
    per_sample = {name: array[kept] for name, array in arrays.items() if len(array) == 10 and name != "head_subject"}
    np.savez(folder / "index.npz", **(arrays | per_sample))
    info = json.loads((folder / "index.json").read_text())
    info["counts"]["samples"] = 9
    (folder / "index.json").write_text(json.dumps(info))
    changed = f"{folder / 'index.npz'}: sha256 differs"
    assert findings(folder).startswith(changed) and findings(folder, fast=True).startswith(changed)
    say_hash(folder)
    said = findings(folder)
    assert "belong to no sample of the index" in said and "sha256" not in said


def say_hash(folder: Path) -> None:
    """As if the index had been built as it is now: what is wrong in it must be seen without its hash."""
    info = json.loads((folder / "index.json").read_text())
    info["index"]["sha256"] = sha256(folder / "index.npz")
    (folder / "index.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("column", "number"),
    [("shard", -1), ("shard", 2**31 - 1), ("subject", -7), ("head_subject", 2**30), ("json_offset", -(2**62))],
)
def test_a_damaged_index_is_told_and_not_used(tiny_set: Callable[..., Path], column: str, number: int) -> None:
    folder = tiny_set(samples=10)
    arrays = dict(np.load(folder / "index.npz"))
    arrays[column][3] = number
    np.savez(folder / "index.npz", **arrays)
    tar = folder / "tiny-train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    changed = f"{tar}: sha256 differs from the index: the bytes have changed since it was built"
    first, second = findings(folder).splitlines()
    assert first.startswith(f"{folder / 'index.npz'}: sha256 differs from that in index.json") and second == changed
    say_hash(folder)
    first, second = findings(folder, tiny_set(samples=10, split="test")).splitlines()
    assert first.startswith(f"{folder / 'index.npz'}: column {column} holds a number outside [0, ")
    assert second == changed
    assert lint([folder], single()).sets[0]["poses"] == open_set(folder).info["poses"]


@pytest.mark.parametrize("name", ["split", "counts", "poses"])
def test_an_index_json_without_what_builds_write_is_an_error(tiny_set: Callable[..., Path], name: str) -> None:
    folder = tiny_set(samples=10)
    info = json.loads((folder / "index.json").read_text())
    info[name] = {"samples": 10}  # as a set needs it to be opened
    (folder / "index.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"index\.json: not as a build writes it: .* copy the set again"):
        findings(folder)


def test_a_report_tells_counts_findings_and_the_histogram_of_the_records(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set(samples=10)
    good = lint([folder], single()).to_json()
    assert good["good"] and good["findings"] == []
    assert good["sets"][0]["counts"]["samples"] == 10 and good["sets"][0]["path"] == str(folder)
    assert good["sets"][0]["poses"] == open_set(folder).info["poses"]
    tar, _ = harm_header(folder, 7)
    bad = lint([folder], single()).to_json()
    assert not bad["good"] and any(str(tar) in finding for finding in bad["findings"])
    json.dumps(bad)


def test_sets_elsewhere_are_not_verified(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="verified where they are"):
        lint([Path("http://host/set")], single())


class Changed(TinySource):
    """Sample 3 is not what a source should give."""

    def __init__(self, change: Callable[[Sample], Sample]) -> None:
        super().__init__(samples=10)
        self._change = change

    def sample(self, i: int) -> Sample:
        sample = super().sample(i)
        return self._change(sample) if i == 3 else sample


def no_image(sample: Sample) -> Sample:
    return replace(sample, image=b"no image")


def other_size(sample: Sample) -> Sample:
    record = replace(sample.record, image=replace(sample.record.image, width=50))
    return replace(sample, record=record)


def box_outside(sample: Sample) -> Sample:
    head = replace(sample.record.heads[0], bbox=(20.0, 5.0, 60.0, 30.0))
    return replace(sample, record=replace(sample.record, heads=[head]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_image, "the jpg does not decode"),
        (other_size, "the image is 48x36, its record says 50x36"),
        (box_outside, "head 0: box reaches 12.0 px outside the image"),
    ],
)
def test_samples_that_are_wrong_from_the_start(tmp_path: Path, change: Callable[[Sample], Sample], said: str) -> None:
    build(Changed(change), tmp_path / "set", single(), samples_per_shard=5)
    found = verify([tmp_path / "set"], single())
    assert len(found) == 1 and "tiny-train-000000.tar, key tiny-train-000003: " in found[0] and said in found[0]


def test_an_index_that_lies(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set(samples=10)
    arrays = dict(np.load(folder / "index.npz"))
    arrays["key"][4] = arrays["key"][5]
    arrays["n_heads"][2] = 3
    arrays["image_offset"][7] = 10**9
    np.savez(folder / "index.npz", **arrays)
    info = json.loads((folder / "index.json").read_text())
    info["shards"][0]["samples"] = 6
    (folder / "index.json").write_text(json.dumps(info))
    say_hash(folder)
    said = findings(folder)
    assert "key tiny-train-000005: comes more than once" in said
    assert "index.json counts 15 heads, there are 17" in said
    assert "key tiny-train-000007: the index puts its image outside the tar" in said
    assert "index.json says 6 samples, index.npz 5" in said
    assert "1 heads and 1 objects, the index says 3 and 1" in said


def test_a_histogram_that_is_not_that_of_the_records(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set(samples=10)
    info = json.loads((folder / "index.json").read_text())
    info["poses"]["yaw"]["heads"][0] += 1
    (folder / "index.json").write_text(json.dumps(info))
    assert findings(folder) == f"{folder}: the histogram of yaw in index.json is not that of the records"


def test_subjects_in_two_splits_are_a_leak(tmp_path: Path, tiny_set: Callable[..., Path]) -> None:
    class Leaky(TinySource):
        def sample(self, i: int) -> Sample:
            sample = TinySource(samples=10, split="train").sample(i)
            return replace(sample, key=f"leaky-{i}")

    train, more = tiny_set(samples=10), tiny_set(samples=12)
    build(Leaky(samples=10, split="test"), tmp_path / "test", single())
    for fast in (True, False):
        said = findings(train, tmp_path / "test", fast=fast)
        assert said.startswith(f"{train} (train) and {tmp_path / 'test'} (test): share 7 subjects: train-0-0, ")
    assert findings(train, more) == "", "two sets of one split may share"
    assert findings(train, tiny_set(samples=10, split="test")) == ""
    assert open_set(train).subjects() & open_set(tmp_path / "test").subjects()
