"""Sets that are elsewhere: read over a real HTTP server, by commands and by fsspec, through a bounded cache."""

import hashlib
import pickle
import re
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
from tiny_source import TinySource

from launcher.comm import single
from launcher.errors import UsageError, UserError
from shards import cache as caches
from shards import remote
from shards.cache import Cache, Damaged
from shards.derive import Shuffled
from shards.index import open_set
from shards.plan import Plan
from shards.remote import as_url
from shards.stream import Stream, read_all
from shards.write import build

ROOT = Path(__file__).parents[2]


class Server(ThreadingHTTPServer):
    """Serves `folder`; counts what was asked for, and can be told to fail."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, Counter[str]()
        self.failures, self.code = 0, 503
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
            self.send_error(self.server.code)
        else:
            super().do_GET()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Clock:
    """Nobody really waits between tries."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, wait_s: float) -> None:
        self.now_s += wait_s


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("HPE_SHARDS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HPE_SHARDS_CACHE_GB", "0.001")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(remote, "time", Clock())
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


@pytest.fixture
def many_shards(tiny_set: Callable[..., Path]) -> Iterator[Server]:
    """30 shards of 4 samples each."""
    folder = tiny_set(samples=120, samples_per_shard=4)
    server = Server(folder)
    yield server
    server.shutdown()
    server.server_close()


REFUSED = "GB of remote shards are read at a time, the cache may hold"


def test_a_plan_that_the_cache_cannot_hold_is_refused(
    many_shards: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [shard["bytes"] for shard in open_set(many_shards.folder).info["shards"]]
    monkeypatch.setenv("HPE_SHARDS_CACHE_GB", str((sum(sizes) - 1) / 1e9))
    there = open_set(many_shards.url)
    with pytest.raises(UsageError, match=REFUSED):
        Stream([there], Plan.of([there], [1.0], 0, 1), 0, 1, None)
    by_blocks = Plan.of([there], [1.0], 0, 1, block_shards=2)
    Stream([there], by_blocks, 0, 1, None)
    with pytest.raises(UsageError, match=REFUSED):
        Stream([there], by_blocks, 0, 1, None, workers=32)
    with pytest.raises(UsageError, match=REFUSED):
        Stream([there], Plan.of([there], [1.0], 0, 1, block_shards=2, bucket_batches=64), 0, 1, None)
    monkeypatch.setattr(Cache, "free_bytes", lambda self: 1000)
    with pytest.raises(UserError, match="its disk has room for 0.000 GB; free some space, name another folder in HPE_"):
        Stream([there], by_blocks, 0, 1, None)


@pytest.mark.parametrize("touch_every_s", [0.0, 5.0])
def test_a_cache_that_is_just_large_enough_has_each_shard_fetched_once_an_epoch(
    many_shards: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch, touch_every_s: float
) -> None:
    monkeypatch.setattr("shards.cache._TOUCH_EVERY_S", touch_every_s)
    largest = max(shard["bytes"] for shard in open_set(many_shards.folder).info["shards"])
    # Twice 16 batches of one sample are 8 shards; and 3 blocks of 2.
    monkeypatch.setenv("HPE_SHARDS_CACHE_GB", str(14 * largest / 1e9))
    there = open_set(many_shards.url)
    plan = Plan.of([there], [1.0], 0, 1, block_shards=2)
    for _ in islice(Stream([there], plan, 0, 1, None), 120 - 16):  # later it looks ahead into the next epoch
        time.sleep(0.005)  # so that the thread that fetches ahead is ahead
    tars = {name: times for name, times in many_shards.asked.items() if name.endswith(".tar")}
    assert len(tars) == 30 and set(tars.values()) == {1}
    monkeypatch.setenv("HPE_SHARDS_CACHE_GB", str(11 * largest / 1e9))
    with pytest.raises(UsageError, match=REFUSED):
        Stream([again := open_set(many_shards.url)], Plan.of([again], [1.0], 0, 1, block_shards=2), 0, 1, None)


def test_after_a_resume_nothing_of_the_past_is_fetched(many_shards: Server, cache: Cache) -> None:
    there = open_set(many_shards.url)
    plan = Plan.of([there], [1.0], 0, 1, block_shards=1)
    next(iter(Stream([there], plan, 0, 1, None, start=60)))
    wanted = {there.shard_name(slot.sample) for n in range(60, 76) for slot in plan.batch_at(n)}
    deadline_s = time.monotonic() + 30
    while not wanted <= set(many_shards.asked) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert {name for name in many_shards.asked if name.endswith(".tar")} == wanted


def test_an_evaluation_needs_room_for_all_shards_where_keys_mix_them(
    server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = server.folder / "mixed"
    build(Shuffled(TinySource(samples=30), 3), mixed, single(), samples_per_shard=5)
    sizes = [shard["bytes"] for shard in open_set(mixed).info["shards"]]
    monkeypatch.setenv("HPE_SHARDS_CACHE_GB", str((sum(sizes) - 1) / 1e9))
    there = open_set(f"{server.url}/mixed")
    with pytest.raises(UsageError, match=f"{REFUSED} .*or copy the set to a disk"):
        read_all(there, 0, 1, 4, None)
    assert len(list(read_all(there, 0, 1, 1, None, limit=2))) == 2
    assert len(list(read_all(there, 0, 1, 4, None, only=[0]))) == 1
    assert len(list(read_all(open_set(server.set_url), 0, 1, 4, None))) == 8, "shard after shard needs no room"


def test_a_tar_larger_than_the_cache(server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPE_SHARDS_CACHE_GB", "0.000001")
    with pytest.raises(UserError, match="tiny-train-000000.tar: .* do not fit into the cache .*HPE_SHARDS_CACHE_GB"):
        open_set(server.set_url).read(0)


def test_an_outage_is_waited_for_and_said_and_a_lasting_one_ends_in_one_line(
    server: Server, cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    there = open_set(server.set_url)
    server.failures = 5
    assert there.read(0).key == "tiny-train-000000"
    waits = capsys.readouterr().err.splitlines()
    told = f"{server.set_url}: tiny-train-000000.tar cannot be fetched (HTTP Error 503: Service Unavailable); trying"
    assert len(waits) == 5 and all(line.startswith(f"{told} again in ") for line in waits)
    server.failures, before_s = 99, remote.time.monotonic()
    with pytest.raises(UserError) as caught:
        there.read(9)
    said = str(caught.value)
    assert re.search(r"000001.tar cannot be fetched \(HTTP Error 503: [\w ]+; tried (9|1\d) times\);", said)
    assert "\n" not in said and not list(cache.folder.glob("*/*.part"))
    assert 300.0 < remote.time.monotonic() - before_s < 400.0


def test_an_index_is_not_waited_for(server: Server, cache: Cache) -> None:
    server.failures = 2
    open_set(server.set_url)
    server.failures = 3
    with pytest.raises(UserError, match="index.json cannot be fetched .*; tried 3 times"):
        open_set(server.set_url)
    assert remote.time.monotonic() < 10.0


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_what_is_not_there_is_not_asked_for_again(
    server: Server, cache: Cache, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    there = open_set(server.set_url)
    server.failures, server.code = 1, code
    with pytest.raises(UserError, match=rf"tiny-train-000000.tar cannot be fetched \(HTTP Error {code}: [\w ]+\); "):
        there.read(0)
    assert not capsys.readouterr().err
    gone = open_set(f"file://{server.set_folder}")
    (server.set_folder / "tiny-train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"tiny-train-000001.tar cannot be fetched \(\[Errno 2\] [^;]*\); check"):
        gone.read(9)


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
    with pytest.raises(UserError, match=r"cannot be fetched \(OddError: the token has expired; tried \d+ times\)"):
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


def test_queries_stay_behind_the_name_of_the_file_and_make_no_second_copy(server: Server, cache: Cache) -> None:
    assert open_set(f"{server.set_url}?version=3").read(0).key == "tiny-train-000000"
    assert open_set(f"{server.set_url}?sig=monday").path == open_set(f"{server.set_url}?sig=tuesday").path
    assert server.asked["index.npz?sig=monday"] == 0
    pipes = [open_set(f"pipe:cat {server.set_folder}/{{}}{end}").path for end in ("", " # ?")]
    assert pipes[0] != pipes[1]


def test_a_cached_index_that_was_damaged_is_fetched_again(server: Server, cache: Cache) -> None:
    folder = open_set(server.set_url).path
    for name in ("index.json", "index.npz"):
        data = (folder / name).read_bytes()
        for bad in (data[:-9], b"", data[:-1] + b"?"):
            (folder / name).write_bytes(bad)
            assert open_set(server.set_url).read(7).key == "tiny-train-000007"
            assert (folder / name).read_bytes() == data


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
    assert cache.held_bytes() == 0


def test_the_disk_may_have_less_room_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, 10_000)
    data, others = bytes(600), 500

    def free(self: Cache) -> int:
        return 2000 - others - sum(path.stat().st_size for path in tmp_path.glob("*/*.tar"))

    monkeypatch.setattr(Cache, "free_bytes", free)
    for k in range(4):
        cache.bring(tmp_path / "a" / f"{k}.tar", lambda: _Bytes(data), 600, None)
    assert sorted(path.name for path in tmp_path.glob("*/*.tar")) == ["2.tar", "3.tar"]
    others = 1500
    with pytest.raises(UserError, match="the disk has no room for 9.tar .*free some space, or name another folder"):
        cache.bring(tmp_path / "a" / "9.tar", lambda: _Bytes(data), 600, None)
    assert cache.held_bytes() == 0


def test_files_are_looked_at_only_where_the_cache_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, looks, look = Cache(tmp_path, 6000), [], caches._files

    def looking(folder: Path) -> list[caches._Held]:
        looks.append(folder)
        return look(folder)

    monkeypatch.setattr(caches, "_files", looking)
    for k in range(10):
        cache.bring(tmp_path / "a" / f"{k}.tar", lambda: _Bytes(bytes(600)), 600, None)
    assert len(looks) == 1, "a new cache once: what is there?"
    cache.bring(tmp_path / "a" / "10.tar", lambda: _Bytes(bytes(600)), 600, None)
    assert len(looks) == 2 and cache.held_bytes() == 6000


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
