"""Building: the same bytes for any number of ranks, readable by anyone, complete or not there."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_source import TinySource

from launcher.comm import single
from launcher.errors import UsageError, UserError
from shards import write
from shards.index import open_set
from shards.part import TICK, pose_histogram, write_range
from shards.record import Head, Image, Record, from_json
from shards.verify import verify
from shards.write import WORK_FOLDER, Sample, build

SCRIPT = Path(__file__).with_name("build_ranks.py")
ROOT = SCRIPT.parents[2]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def clean_env() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PMI_", "SLURM_", "OMPI_"))}
    return env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(out: Path, samples: int, ranks: int) -> list[str]:
    start = [str(Path(sys.executable).with_name("mpirun")), "-np", str(ranks)] if ranks > 1 else []
    return [*start, sys.executable, str(SCRIPT), str(out), str(samples)]


def over_ranks(ranks: int, out: Path, samples: int = 43) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, samples, ranks), env=clean_env(), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_three_ranks_write_the_bytes_of_one(tmp_path: Path) -> None:
    """Two ranks do so below, after a kill."""
    build(TinySource(samples=43), tmp_path / "one", single(), samples_per_shard=10)
    alone = digests(tmp_path / "one")
    assert len(alone) == 5 + 2
    done = over_ranks(3, tmp_path / "of-3")
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "of-3") == alone


@pytest.mark.slow
def test_a_killed_build_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    out, first = tmp_path / "set", tmp_path / "set" / WORK_FOLDER / "000003.npz"
    with subprocess.Popen(command(out, 600, ranks=1), env=clean_env()) as process:
        while not first.exists() and process.poll() is None:
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    with pytest.raises(UserError, match="not a finished shard set"):
        open_set(out)
    done = over_ranks(2, out, 600)
    assert done.returncode == 0 and "of 60 parts are there already, kept" in done.stdout, done.stderr
    build(TinySource(samples=600), tmp_path / "whole", single(), samples_per_shard=10)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.slow
def test_what_is_wrong_with_the_folder_ends_all_ranks_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = over_ranks(2, tmp_path / "out")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and "holds files that are no shard set" in lines[0]


def test_a_set_holds_exactly_the_samples_of_the_source(tiny_set: Callable[..., Path]) -> None:
    shard_set = open_set(tiny_set(samples=23, samples_per_shard=10))
    source = TinySource(samples=23)
    assert len(shard_set) == 23
    for i in range(23):
        sample, stored = source.sample(i), shard_set.read(i)
        assert (stored.key, stored.extension, stored.image) == (sample.key, "jpg", sample.image)
        assert stored.json.decode() == sample.record.to_json()
    assert [shard["samples"] for shard in shard_set.info["shards"]] == [7, 8, 8]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_plain_webdataset_reads_the_tars(tiny_set: Callable[..., Path], extension: str) -> None:
    import webdataset

    folder = tiny_set(samples=12, samples_per_shard=5, extension=extension)
    tars = sorted(map(str, folder.glob("*.tar")))
    found = list(webdataset.WebDataset(tars, shardshuffle=False))
    source = TinySource(samples=12, extension=extension)
    assert [sample["__key__"] for sample in found] == [source.sample(i).key for i in range(12)]
    assert found[3][extension] == source.sample(3).image
    assert from_json(found[3]["json"]).to_json() == source.sample(3).record.to_json()


def test_index_json_tells_where_the_set_comes_from(tiny_set: Callable[..., Path]) -> None:
    folder = tiny_set(samples=20, split="val", seed=3)
    info = json.loads((folder / "index.json").read_text())
    index = (folder / "index.npz").read_bytes()
    assert info["index"] == {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    assert (info["name"], info["split"], info["licence"]) == ("tiny-val", "val", "CC0-1.0")
    assert info["scope"] == {"seed": 3, "samples": 20, "size_px": 48} and info["convention"] == "hpe-v1"
    assert info["counts"] | {"bytes": 0} == {
        "samples": 20,
        "heads": 30,
        "objects": 20,
        "subjects": 7,
        "shards": 4,
        "bytes": 0,
    }
    for shard in info["shards"]:
        data = (folder / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert [sum(info["poses"][angle]["heads"]) for angle in ("yaw", "pitch", "roll")] == [30, 30, 30]
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        "index.npz",
        *(f"tiny-val-{k:06d}.tar" for k in range(4)),
    ]


def test_pose_histogram_counts_the_ends() -> None:
    counts = pose_histogram(np.array([[180.0, 90.0, -179.9], [-165.0, -90.0, 0.0]]))
    assert counts["yaw"][23] == 1 and counts["yaw"][1] == 1
    assert counts["pitch"][11] == 1 and counts["pitch"][0] == 1
    assert counts["roll"][0] == 1 and counts["roll"][12] == 1


class Stops(TinySource):
    """Stops the build in the middle, and counts what was asked of it."""

    def __init__(self, stop_at: int) -> None:
        super().__init__(samples=20)
        self.stop_at, self.asked = stop_at, 0

    def sample(self, i: int) -> Sample:
        if i == self.stop_at:
            raise KeyboardInterrupt
        self.asked += 1
        return super().sample(i)


def test_a_stopped_build_is_not_visible_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(Stops(14), tmp_path / "set", single(), samples_per_shard=5)
    with pytest.raises(UserError, match="not a finished shard set"):
        open_set(tmp_path / "set")
    again = Stops(-1)
    build(again, tmp_path / "set", single(), samples_per_shard=5)
    assert again.asked == 10, "the two finished shards are kept"
    build(TinySource(samples=20), tmp_path / "whole", single(), samples_per_shard=5)
    assert digests(tmp_path / "set") == digests(tmp_path / "whole")


class Meets(TinySource):
    """Another build of the same set is started while sample 7 is made."""

    def __init__(self, out: Path) -> None:
        super().__init__(samples=20)
        self._out = out

    def sample(self, i: int) -> Sample:
        if i == 7:
            with pytest.raises(UserError, match="another build is writing into it; wait for its end, or stop it, or"):
                build(TinySource(samples=20), self._out, single(), samples_per_shard=5)
        return super().sample(i)


def test_two_builds_into_one_folder_do_not_meet(tmp_path: Path) -> None:
    build(Meets(tmp_path / "set"), tmp_path / "set", single(), samples_per_shard=5)
    build(TinySource(samples=20), tmp_path / "whole", single(), samples_per_shard=5)
    assert digests(tmp_path / "set") == digests(tmp_path / "whole")


def test_a_file_system_without_locks_is_built_on_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", without)
    build(TinySource(samples=20), tmp_path / "set", single(), samples_per_shard=5)
    assert verify([tmp_path / "set"], single()) == []


def test_where_no_lock_keeps_them_apart_two_writers_of_a_range_spoil_nothing(tmp_path: Path) -> None:
    for most_bytes in (None, 20_000):
        whole = tmp_path / f"whole-{most_bytes}"
        both = tmp_path / f"both-{most_bytes}"
        for folder in (whole, both):
            folder.mkdir()
        assert sum(write_range(TinySource(samples=40), whole, 0, (0, 40), most_bytes)) == 40
        one, other = (write_range(TinySource(samples=40), both, 0, (0, 40), most_bytes) for _ in range(2))
        next(one)
        assert sum(other) == 40 and sum(one) == 40 - TICK
        assert digests(both) == digests(whole)


def test_what_a_killed_build_left_half_written_is_removed(tmp_path: Path) -> None:
    work = tmp_path / "set" / WORK_FOLDER
    with pytest.raises(KeyboardInterrupt):
        build(Stops(14), tmp_path / "set", single(), samples_per_shard=5)
    before = digests(work)
    for name in (".000002.tar.tmp-0123abcd", ".000002.npz.tmp-0123abcd", ".000002-001.tar.tmp-0123abcd"):
        (work / name).write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        build(Stops(14), tmp_path / "set", single(), samples_per_shard=5)
    assert digests(work) == before


def test_parts_of_an_earlier_version_are_written_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(Stops(14), tmp_path / "set", single(), samples_per_shard=5)
    path = tmp_path / "set" / WORK_FOLDER / "000001.npz"
    arrays = dict(np.load(path))
    names = arrays.pop("subjects")
    np.savez(path, **arrays | {name: names[arrays[name]] for name in ("subject", "head_subject")})
    again = Stops(-1)
    build(again, tmp_path / "set", single(), samples_per_shard=5)
    assert again.asked == 15 and verify([tmp_path / "set"], single()) == []


class Bare(TinySource):
    """A hundred subjects with long names, and records of nothing else."""

    def sample(self, i: int) -> Sample:
        image = Image(1, 1, "bare", f"{i}", f"{i % 100:01000d}")
        return Sample(f"{i:08d}", b"", "jpg", Record(image, [Head((0.0, 0.0, 1.0, 1.0), None, subject="x" * 1000)] * 4))


def test_the_end_of_a_build_needs_little_memory_whatever_the_length_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = []

    def measured(work: Path, recipe: dict[str, Any]) -> Any:
        tracemalloc.start()
        try:
            return merged(work, recipe)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    merged = write._merged
    monkeypatch.setattr(write, "_merged", measured)
    build(Bare(samples=2000), tmp_path / "set", single(), samples_per_shard=1000)
    assert len(open_set(tmp_path / "set").subjects()) == 101
    assert peaks[0] < 2_000_000, "with names in place of numbers it is fifty"


@pytest.mark.slow
def test_a_build_killed_before_any_of_its_file_operations_ends_in_the_same_bytes() -> None:
    script = SCRIPT.with_name("build_killed.py")
    # In memory where that can be had: half of each of a hundred builds is waiting for a disk.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        done = subprocess.run(
            [sys.executable, str(script), folder], env=clean_env(), capture_output=True, text=True, timeout=500
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) > 40, "kills"


def test_a_kept_shard_that_was_damaged_is_written_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(Stops(14), tmp_path / "set", single(), samples_per_shard=5)
    tar = tmp_path / "set" / WORK_FOLDER / "000000-000.tar"
    tar.write_bytes(tar.read_bytes()[:-600])
    again = Stops(-1)
    build(again, tmp_path / "set", single(), samples_per_shard=5)
    assert again.asked == 15
    assert not (tmp_path / "set" / WORK_FOLDER).exists()


def test_a_complete_set_is_kept_and_said_to_be(
    tiny_set: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_set(samples=20)
    before = digests(folder)
    again = Stops(0)
    build(again, folder, single(), samples_per_shard=5)  # would stop at its first sample
    assert "complete already" in capsys.readouterr().out
    assert digests(folder) == before


def test_another_set_in_the_folder_is_refused(tiny_set: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_set(samples=20)
    with pytest.raises(UserError, match='holds a complete set with scope .*"seed": 0.* not .*"seed": 1'):
        build(TinySource(samples=20, seed=1), folder, single(), samples_per_shard=5)
    with pytest.raises(UserError, match="samples_per_shard 5, not 6"):
        build(TinySource(samples=20), folder, single(), samples_per_shard=6)
    with pytest.raises(KeyboardInterrupt):
        build(Stops(14), tmp_path / "half", single(), samples_per_shard=5)
    with pytest.raises(UserError, match="holds an unfinished build with name"):
        build(TinySource(samples=20, split="test"), tmp_path / "half", single(), samples_per_shard=5)


def test_an_out_that_is_no_folder_is_refused_in_one_line(
    tiny_source: TinySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "set"):
        with pytest.raises(UserError, match=f"^{out}: no folder that can be written to .Not a directory: .* --out"):
            build(tiny_source, out, single())

    def refused(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UserError, match="set: no folder that can be written to .Permission denied: "):
        build(tiny_source, tmp_path / "set", single())


class Spoilt(TinySource):
    def __init__(self, spoil: Callable[[Sample], Sample]) -> None:
        super().__init__(samples=8)
        self._spoil = spoil

    def sample(self, i: int) -> Sample:
        sample = super().sample(i)
        return self._spoil(sample) if i == 5 else sample


def with_key(key: str) -> Callable[[Sample], Sample]:
    return lambda sample: Sample(key, sample.image, sample.extension, sample.record)


def with_box(box: tuple[float, float, float, float]) -> Callable[[Sample], Sample]:
    def spoil(sample: Sample) -> Sample:
        from dataclasses import replace

        head = replace(sample.record.heads[0], bbox=box)
        return replace(sample, record=replace(sample.record, heads=[head]))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (with_key("a.b"), "sample 5: key 'a.b'"),
        (with_key("../up"), "sample 5: key '../up'"),
        (with_key("k" * 91), "1 to 90 letters"),
        (with_key("tiny-train-000002"), "key tiny-train-000002 comes 2 times"),
        (with_box((9.0, 9.0, 3.0, 12.0)), "sample 5, key tiny-train-000005: head 0: box"),
    ],
)
def test_samples_that_cannot_be_stored(tmp_path: Path, spoil: Callable[[Sample], Sample], said: str) -> None:
    with pytest.raises(UserError) as caught:
        build(Spoilt(spoil), tmp_path / "set", single(), samples_per_shard=3)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "set" / "index.json").exists()


def tar_sizes(folder: Path) -> list[int]:
    return [tar.stat().st_size for tar in sorted(folder.glob("*.tar"))]


@pytest.mark.filterwarnings("ignore")
def test_no_tar_is_larger_than_asked_and_they_are_about_equal(tmp_path: Path) -> None:
    import webdataset

    source = TinySource(samples=60)
    build(source, tmp_path / "whole", single(), samples_per_shard=30)
    build(source, tmp_path / "cut", single(), samples_per_shard=30, max_shard_mb=0.0333)
    assert min(tar_sizes(tmp_path / "whole")) > 2 * 33_300
    sizes = tar_sizes(tmp_path / "cut")
    assert len(sizes) > 4 and max(sizes) <= 33_300 and min(sizes) > max(sizes) / 2
    whole, cut = open_set(tmp_path / "whole"), open_set(tmp_path / "cut")
    assert [cut.read(i) for i in range(60)] == [whole.read(i) for i in range(60)]
    assert verify([tmp_path / "cut"], single()) == []
    tars = sorted(map(str, (tmp_path / "cut").glob("*.tar")))
    found = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [source.sample(i).key for i in range(60)]


def test_a_sample_larger_than_a_tar_may_be_has_one_to_itself(tmp_path: Path) -> None:
    build(TinySource(samples=7), tmp_path / "set", single(), samples_per_shard=5, max_shard_mb=0.001)
    assert [shard["samples"] for shard in open_set(tmp_path / "set").info["shards"]] == [1] * 7


@pytest.mark.parametrize(("samples", "shards"), [(5, 1), (40, 3), (300, 16)])
def test_small_sets_have_shards_to_share_too(tmp_path: Path, samples: int, shards: int) -> None:
    build(TinySource(samples=samples), tmp_path / "set", single())
    assert len(list((tmp_path / "set").glob("*.tar"))) == shards


def test_command_lines_that_cannot_be_meant(tmp_path: Path, tiny_source: TinySource) -> None:
    options: list[tuple[dict[str, Any], str]] = [
        ({"samples_per_shard": 0}, "0 samples per shard"),
        ({"name": "a/b"}, "name 'a/b'"),
        ({"max_shard_mb": 0.0}, "0.0 MB per shard"),
        ({"max_shard_mb": float("nan")}, "nan MB per shard"),
    ]
    for arguments, said in options:
        with pytest.raises(UsageError, match=said):
            build(tiny_source, tmp_path / "set", single(), **arguments)
    with pytest.raises(UserError, match="has no samples"):
        build(TinySource(samples=0), tmp_path / "set", single())
