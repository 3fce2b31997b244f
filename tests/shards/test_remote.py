"""Sets that are elsewhere: read over a real HTTP server, by commands and by fsspec, through a bounded cache."""

import hashlib
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest

from launcher.errors import UsageError, UserError
from shards import remote
from shards.cache import Cache, Damaged
from shards.index import open_set
from shards.plan import Plan
from shards.remote import as_url
from shards.stream import Stream

ROOT = Path(__file__).parents[2]


class Server(ThreadingHTTPServer):
    """Serves `folder`; counts what was asked for, and can be told to fail."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, Counter[str]()
        self.failures = 0
        self.slow_s = 0.0
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments, directory=str(arguments[2].folder))  # type: ignore[arg-type, attr-defined]

    def do_GET(self) -> None:
        self.server.asked[self.path.rpartition("/")[2]] += 1
        time.sleep(self.server.slow_s)
        if self.server.failures > 0:
            self.server.failures -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("HPE_SHARDS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HPE_SHARDS_CACHE_GB", "0.001")
    monkeypatch.setattr(remote, "_WAIT_S", 0.01)
    return Cache.from_environment()


@pytest.fixture
def server(tiny_set: Callable[..., Path]) -> Iterator[Server]:
    folder = tiny_set(samples=30)
    server = Server(folder.parent)
    server.set_url = f"{server.url}/{folder.name}"  # type: ignore[attr-defined]
    server.set_folder = folder  # type: ignore[attr-defined]
    yield server
    server.shutdown()
    server.server_close()


def test_every_kind_of_address_gives_the_samples_of_the_folder(server: Server, cache: Cache) -> None:
    folder = server.set_folder
    plain = open_set(folder)
    for url in (server.set_url, f"pipe:cat {folder}/{{}}", f"file://{folder}"):
        there = open_set(url)
        assert [there.read(i) for i in range(30)] == [plain.read(i) for i in range(30)]
    assert set(server.asked.values()) == {1}
    assert len(server.asked) == 2 + 6


def test_the_index_is_fetched_once_and_tars_when_they_are_read(server: Server, cache: Cache) -> None:
    open_set(server.set_url)
    assert server.asked == {"index.json": 1, "index.npz": 1}
    again = open_set(server.set_url)
    assert server.asked == {"index.json": 2, "index.npz": 1}
    again.read(7)
    again.read(8)
    assert server.asked["tiny-train-000001.tar"] == 1 and len(server.asked) == 3


def test_a_set_travels_to_other_processes_without_asking_again(server: Server, cache: Cache) -> None:
    there = open_set(server.set_url)
    before = server.asked.copy()
    again = pickle.loads(pickle.dumps(there))
    assert again.key(3) == there.key(3) and server.asked == before


def test_a_set_that_was_built_anew_does_not_meet_the_tars_of_the_old(
    server: Server, cache: Cache, tiny_set: Callable[..., Path]
) -> None:
    old = open_set(server.set_url).read(0)
    shutil.rmtree(server.set_folder)
    tiny_set(samples=30, seed=4).rename(server.set_folder)
    assert open_set(server.set_url).read(0) != old


@pytest.mark.slow
def test_streams_over_ranks_and_workers_read_a_remote_set_like_a_local_one(server: Server, cache: Cache) -> None:
    local, there = open_set(server.set_folder), open_set(server.set_url)

    def keys(shard_set: object, workers: int, ranks: int, block_shards: int) -> list[str]:
        plan = Plan.of([shard_set], [1.0], 3, 6, block_shards=block_shards)
        streams = [Stream([shard_set], plan, rank, ranks, 16, workers=workers) for rank in range(ranks)]
        parts = islice(zip(*streams, strict=True), 9)
        return [item.key for part in parts for _, items in part for item in items]

    for block_shards in (0, 2):
        assert keys(local, 0, 1, block_shards) == keys(there, 0, 1, block_shards) == keys(there, 2, 2, block_shards)
    tars = {name: times for name, times in server.asked.items() if name.endswith(".tar")}
    assert len(tars) == 6 and set(tars.values()) == {1}, "one copy serves all processes"


def test_the_cache_never_holds_more_than_its_limit_and_drops_what_was_read_longest_ago(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.cache._TOUCH_EVERY_S", 0.0)
    sizes = [shard["bytes"] for shard in open_set(server.set_folder).info["shards"]]
    monkeypatch.setenv("HPE_SHARDS_CACHE_GB", str(3.5 * max(sizes) / 1e9))
    there = open_set(server.set_url)
    for turn, i in enumerate((0, 5, 10, 1, 15)):
        time.sleep(0.02)
        there.read(i)
        assert there.remote is not None and there.remote.cache.held_bytes() <= 3.5 * max(sizes), turn
    held = sorted(path.name for path in cache.folder.glob("*/*.tar"))
    assert held == [f"tiny-train-00000{k}.tar" for k in (0, 2, 3)], "shard 1 was read longest ago"
    assert there.read(6).key == "tiny-train-000006"


def test_a_plan_that_the_cache_cannot_hold_is_refused(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [shard["bytes"] for shard in open_set(server.set_folder).info["shards"]]
    monkeypatch.setenv("HPE_SHARDS_CACHE_GB", str((sum(sizes) - 1) / 1e9))
    there = open_set(server.set_url)
    with pytest.raises(UsageError, match="GB of remote shards are read at a time, the cache may hold"):
        Stream([there], Plan.of([there], [1.0], 0, 4), 0, 1, None)
    Stream([there], Plan.of([there], [1.0], 0, 4, block_shards=1), 0, 1, None)


def test_a_tar_larger_than_the_cache(server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPE_SHARDS_CACHE_GB", "0.000001")
    with pytest.raises(UserError, match="tiny-train-000000.tar: .* do not fit into the cache .*HPE_SHARDS_CACHE_GB"):
        open_set(server.set_url).read(0)


def test_a_passing_failure_is_tried_again_and_a_lasting_one_is_said_in_one_line(server: Server, cache: Cache) -> None:
    there = open_set(server.set_url)
    server.failures = 2
    assert there.read(0).key == "tiny-train-000000"
    server.failures = 9
    with pytest.raises(UserError) as caught:
        there.read(9)
    said = str(caught.value)
    assert "tiny-train-000001.tar cannot be fetched (HTTP Error 503: Service Unavailable; tried 3 times)" in said
    assert "\n" not in said and not list(cache.folder.glob("*/*.part"))


def test_a_tar_with_other_bytes_than_the_index_says_is_not_kept(server: Server, cache: Cache) -> None:
    there = open_set(server.set_url)
    tar = server.set_folder / "tiny-train-000002.tar"
    data = tar.read_bytes()
    for bad, said in ((data[:-1] + b"x", "sha256"), (data[:-7], "bytes, "), (data + b"more", "more than")):
        tar.write_bytes(bad)
        with pytest.raises(UserError, match=f"tiny-train-000002.tar cannot be fetched .*{said}"):
            there.read(11)
    assert not list(cache.folder.glob("*/*000002*"))
    tar.write_bytes(data)
    assert there.read(11).key == "tiny-train-000011"


def test_addresses_that_lead_nowhere(server: Server, cache: Cache, tmp_path: Path) -> None:
    for url, said in (
        (f"{server.url}/nothing", "index.json cannot be fetched .HTTP Error 404"),
        ("http://127.0.0.1:9/set", "index.json cannot be fetched"),
        (f"pipe:cat {tmp_path}/nothing/{{}}", "index.json cannot be fetched"),
        (f"file://{tmp_path}/nothing", "index.json cannot be fetched"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            open_set(url)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="not a kind of address"):
        open_set("carrier-pigeon://coop/set")
    with pytest.raises(UsageError, match="the command needs {}"):
        open_set("pipe:cat somewhere")


class OddError(Exception):
    """As botocore has them: no OSError."""


def test_errors_of_libraries_are_tried_again_and_said(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

    failures = {LocalFileSystem.open: 2, LocalFileOpener.read: 2}

    def failing(right: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            failures[right] -= 1
            if failures[right] >= 0:
                raise OddError("the token has expired\nand more")
            return right(*arguments, **options)

        return call

    monkeypatch.setattr(LocalFileSystem, "open", failing(LocalFileSystem.open))
    there = open_set(f"file://{server.set_folder}")
    monkeypatch.setattr(LocalFileOpener, "read", failing(right := LocalFileOpener.read))
    assert there.read(0).key == "tiny-train-000000"
    failures[right] = 99
    with pytest.raises(UserError, match=r"cannot be fetched \(OddError: the token has expired; tried 3 times\)"):
        there.read(9)
    assert not list(there.path.glob("*.part"))


def test_missing_packages_are_named(cache: Cache) -> None:
    pytest.importorskip("fsspec")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="s3:// needs a package that is not installed .*s3fs"):
            open_set("s3://bucket/set")
    else:
        pytest.skip("s3fs is installed")


def test_secrets_in_addresses_are_not_shown(server: Server, cache: Cache) -> None:
    url = server.url.replace("//", "//user:secret@") + "/nothing?signature=secret"
    with pytest.raises(UserError) as caught:
        open_set(url)
    assert "secret" not in str(caught.value) and "/nothing" in str(caught.value)


def test_queries_stay_behind_the_name_of_the_file(server: Server, cache: Cache) -> None:
    assert open_set(f"{server.set_url}?version=3").read(0).key == "tiny-train-000000"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://host/set", "http://host/set"),
        (str(Path("http://host/set")), "http://host/set"),
        (str(Path("s3://bucket/a/b")), "s3://bucket/a/b"),
        ("file:///data/set", "file:///data/set"),
        (str(Path("file:///data/set")), "file:///data/set"),
        ("pipe:ssh host cat /data/{}", "pipe:ssh host cat /data/{}"),
        ("data/set", None),
        ("/data/run:3/set", None),
        ("run:3", None),
    ],
)
def test_what_is_an_address(text: str, url: str | None) -> None:
    assert as_url(text) == url


def test_settings_that_cannot_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("much", "-1", "0", "nan", "inf"):
        monkeypatch.setenv("HPE_SHARDS_CACHE_GB", wrong)
        with pytest.raises(UserError, match=f"HPE_SHARDS_CACHE_GB '{wrong}'"):
            Cache.from_environment()


READER = """
import sys
from shards.index import open_set
shard_set = open_set(sys.argv[1])
order = [i * 7 % 30 for i in range(30)] if sys.argv[2] == "1" else [i * 11 % 30 for i in range(30)]
for _ in range(4):
    for i in order:
        assert shard_set.read(i).key.endswith(f"{i:06d}")
        assert shard_set.remote.cache.held_bytes() <= shard_set.remote.cache.most_bytes
"""


@pytest.mark.slow
def test_processes_that_drop_each_others_tars_all_read_right(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [shard["bytes"] for shard in open_set(server.set_folder).info["shards"]]
    monkeypatch.setenv("HPE_SHARDS_CACHE_GB", str(3.2 * max(sizes) / 1e9))
    command = [sys.executable, "-c", READER, server.set_url]
    readers = [subprocess.Popen([*command, str(k % 2)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for k in range(4)]
    for reader in readers:
        assert reader.wait(300) == 0, reader.communicate()[1]


@pytest.mark.slow
def test_a_reader_killed_while_it_fetches_leaves_nothing_in_the_way(server: Server, cache: Cache) -> None:
    there = open_set(server.set_url)
    part = there.path / "tiny-train-000000.tar.part"
    server.slow_s = 2.0
    code = "import sys; from shards.index import open_set; open_set(sys.argv[1]).read(0)"
    fetcher = subprocess.Popen([sys.executable, "-c", code, server.set_url], cwd=ROOT)
    deadline_s = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    fetcher.send_signal(signal.SIGKILL)
    fetcher.wait()
    assert part.stat().st_size > 0, "its room is still taken"
    server.slow_s = 0.0
    assert there.read(0).key == "tiny-train-000000" and not part.exists()


def test_room_taken_by_the_killed_is_given_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    (tmp_path / "a").mkdir()
    dead = tmp_path / "a" / "old.tar.part"
    dead.write_bytes(bytes(900))
    data = bytes(600)
    cache.bring(tmp_path / "a" / "new.tar", lambda: _Bytes(data), 600, hashlib.sha256(data).hexdigest())
    assert not dead.exists() and cache.held_bytes() == 600
    with pytest.raises(Damaged):
        cache.bring(tmp_path / "a" / "bad.tar", lambda: _Bytes(data), 600, "0" * 64)
    assert cache.held_bytes() == 0 or not (tmp_path / "a" / "bad.tar").exists()


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def __enter__(self) -> "_Bytes":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, count: int) -> bytes:
        data, self._data = self._data[:count], self._data[count:]
        return data
