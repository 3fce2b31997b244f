"""Reading by offset, and what is said about sets that are missing, unfinished or damaged."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_source import TinySource

from launcher.errors import UserError
from shards import index
from shards.index import SampleError, map_npz, open_set


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


def test_arrays_are_mapped_and_are_what_numpy_loads(tiny_set: Callable[..., Path]) -> None:
    path = tiny_set(samples=14) / "index.npz"
    mapped = map_npz(path)
    loaded = np.load(path)
    assert set(mapped) == set(loaded.files)
    for name, array in mapped.items():
        np.testing.assert_array_equal(array, loaded[name])
        assert not array.flags.writeable and not array.flags.owndata


def test_empty_and_compressed_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "empty.npz", none=np.empty((0, 3), np.int32))
    assert map_npz(tmp_path / "empty.npz")["none"].shape == (0, 3)
    np.savez_compressed(tmp_path / "small.npz", some=np.arange(3))
    with pytest.raises(ValueError, match="compressed"):
        map_npz(tmp_path / "small.npz")


def test_every_sample_is_read_and_known_by_key_and_record(tiny_set: Callable[..., Path]) -> None:
    shard_set = open_set(tiny_set(samples=14))
    source = TinySource(samples=14)
    assert [shard_set.key(i) for i in range(14)] == [source.sample(i).key for i in range(14)]
    assert shard_set.n_heads.tolist() == [1, 2] * 7
    assert shard_set.head_starts.tolist()[:4] == [0, 1, 3, 4] and shard_set.head_starts[-1] == 21
    assert shard_set.record(5).to_json() == source.sample(5).record.to_json()
    assert shard_set.subjects() == {f"train-0-{k}" for k in range(5)} | {"train-0-person-0", "train-0-person-1"}
    with pytest.raises(IndexError):
        shard_set.read(14)


def test_a_set_travels_to_other_processes_without_its_index(tiny_set: Callable[..., Path]) -> None:
    shard_set = open_set(tiny_set(samples=14))
    shard_set.read(3)
    sent = pickle.dumps(shard_set)
    assert len(sent) < 1000
    assert pickle.loads(sent).read(3) == shard_set.read(3)


def test_few_tars_stay_open(tiny_set: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_OPEN_TARS", 2)
    shard_set = open_set(tiny_set(samples=14, samples_per_shard=2))
    for _ in range(2):
        assert [shard_set.read(i).key for i in range(14)] == [shard_set.key(i) for i in range(14)]
        assert len(shard_set._tars) == 2


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_set(tmp_path / "nowhere")
    assert "no such folder; build a set with `hpe-shards build" in one_line(caught.value)


def test_unfinished_set(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set()
    (folder / "index.json").unlink()
    with pytest.raises(UserError) as caught:
        open_set(folder)
    assert "not a finished shard set" in one_line(caught.value) and "again" in str(caught.value)


def test_damaged_indexes(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set()
    good = (folder / "index.npz").read_bytes()
    text = (folder / "index.json").read_text()
    for bad in (good[:-100], b"", good[:200]):
        (folder / "index.npz").write_bytes(bad)
        with pytest.raises(UserError, match="its index is damaged"):
            open_set(folder)
    (folder / "index.npz").unlink()
    with pytest.raises(UserError, match="its index is damaged"):
        open_set(folder)
    (folder / "index.npz").write_bytes(good)
    for bad_text in (text[:50], "[]", "{}"):
        (folder / "index.json").write_text(bad_text)
        with pytest.raises(UserError, match="its index is damaged"):
            open_set(folder)
    info = json.loads(text)
    (folder / "index.json").write_text(json.dumps(info | {"format": "hpe-shards-9"}))
    with pytest.raises(UserError, match="index format 'hpe-shards-9'"):
        open_set(folder)
    info["counts"]["samples"] += 1
    (folder / "index.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="not of one build"):
        open_set(folder)


def test_a_truncated_tar_names_shard_key_and_remedy_and_keeps_what_is_before_the_cut(
    tiny_set: Callable[..., Path],
) -> None:
    folder = tiny_set(samples=10)
    shard_set = open_set(folder)
    tar = folder / shard_set.shard_name(7)
    with tar.open("r+b") as file:
        file.truncate(int(shard_set.arrays["json_offset"][7]) + 10)
    assert shard_set.read(6).key == "tiny-train-000006"
    with pytest.raises(SampleError) as caught:
        shard_set.read(7)
    said = one_line(caught.value)
    assert "tiny-train-000001.tar, key tiny-train-000007: the tar ends at byte" in said
    assert "hpe-shards verify" in said
    assert caught.value.key == "tiny-train-000007"
    assert str(pickle.loads(pickle.dumps(caught.value))) == said


def test_shifted_bytes_are_noticed(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set(samples=10)
    tar = folder / "tiny-train-000000.tar"
    tar.write_bytes(b"\0" * 512 + tar.read_bytes()[:-512])
    with pytest.raises(SampleError, match="other bytes there than the index says"):
        open_set(folder).read(0)


def test_an_impossible_record_names_shard_key_and_rule(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set(samples=10)
    shard_set = open_set(folder)
    tar = folder / shard_set.shard_name(2)
    data = tar.read_bytes()
    at = int(shard_set.arrays["json_offset"][2])
    spoilt = data[at:].replace(b'"visible":1.0', b'"visible":7.0', 1)
    tar.write_bytes(data[:at] + spoilt)
    with pytest.raises(SampleError, match="tiny-train-000000.tar, key tiny-train-000002: head 0: visible 7.0"):
        shard_set.record(2)


def test_a_missing_tar_is_no_bad_sample_but_a_broken_set(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set(samples=10)
    (folder / "tiny-train-000001.tar").unlink()
    with pytest.raises(UserError, match="lists this shard but it is missing") as caught:
        open_set(folder).read(9)
    assert not isinstance(caught.value, SampleError)
