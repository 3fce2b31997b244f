"""A disk without room: said before the build where it can be told, and what is finished is kept where it fills."""

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_source import TinySource

from launcher.comm import single
from launcher.errors import UserError
from shards.index import open_set
from shards.verify import verify
from shards.write import Sample, build

MEGABYTE = 1_000_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTE}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("small disk: there is no mount command")
    if done.returncode:
        pytest.skip(f"small disk: this user may not mount one ({done.stderr.strip()})")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=30)


class Filling(TinySource):
    """Somebody else fills the disk while sample `at` is made."""

    def __init__(self, samples: int, disk: Path, at: int) -> None:
        super().__init__(samples)
        self._filler, self._at = disk / "somebody-elses", at

    def sample(self, i: int) -> Sample:
        if i == self._at:
            with self._filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        return super().sample(i)


def test_too_little_room_is_said_before_anything_is_written(small_disk: Path) -> None:
    with pytest.raises(UserError) as caught:
        build(TinySource(samples=2000), small_disk / "set", single(), samples_per_shard=50)
    assert "2,000 samples need about 0.00" in str(caught.value) and "GB are free" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((small_disk / "set").rglob("*.tar"))


def test_a_disk_that_fills_keeps_what_is_finished(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = small_disk / "set"
    with pytest.raises(UserError, match="set: the disk is full .No space left on device.; what is finished is kept"):
        build(Filling(120, small_disk, at=77), out, single(), samples_per_shard=20)
    assert sorted(path.name for path in out.rglob("*.tar")) == [f"00000{k}-000.tar" for k in range(3)]
    with pytest.raises(UserError, match="not a finished shard set"):
        open_set(out)
    (small_disk / "somebody-elses").unlink()
    build(TinySource(120), out, single(), samples_per_shard=20)
    assert "3 of 6 parts are there already, kept" in capsys.readouterr().out
    assert verify([out], single()) == [] and len(open_set(out)) == 120


def test_a_limit_on_the_size_of_files_is_said_like_a_full_disk(tmp_path: Path) -> None:
    """The limit is real but of a process, so the build runs in a child."""
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        said = ""
        try:
            build(TinySource(30), tmp_path / "set", single(), samples_per_shard=15)
        except UserError as error:
            said = str(error)
        except BaseException:  # or the child would go on with the tests
            os._exit(5)
        os._exit(0 if "the disk is full (File too large)" in said else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert not list(tmp_path.rglob("*.tar*"))
