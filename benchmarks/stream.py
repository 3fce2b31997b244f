"""Our stream beside plain webdataset, wids, megatron-energon and MosaicML streaming on the same samples, in one run.

  raw       image bytes and parsed JSON arrive in the training process; nothing is decoded. Each parses JSON as it does
            by itself: the peers by Python's json, ours by pydantic_core, and ours checks the record too
  decoded   490 x 490 x 3 uint8 RGB arrive as one tensor a batch of 8, by the same decoder for all, and the JSON
  ceiling   that decoder alone, on bytes in memory, into the same memory again and again

CPU is user + system time of the loop's process and its readers; each figure the least of alternating repeats, each in a
fresh process, after a warm-up; decoded without readers the least of twenty parts of them, which other work on the
machine disturbs less.

python benchmarks/stream.py [--samples 4000] [--decoded 320] [--repeats 2] [--workers 0,1,2] [--data DIR]

megatron-energon is measured where it can be imported. It is not in the extra `bench`: its dependency s3fs needs
python-dateutil < 3 and multi-storage-client tzdata < 2026, older than what this project is tested with. In a folder of
its own it disturbs nothing:

pip install --target DIR multi-storage-client s3fs mfusepy rapidyaml braceexpand filetype click
pip install --target DIR --no-deps megatron-energon
PYTHONPATH=DIR python benchmarks/stream.py

MosaicML streaming too is measured where it can be imported: in an environment of its own, since it needs transformers
< 5 and torchvision, with this project by `pip install --no-deps` and simplejpeg, scipy, pydantic_core, webdataset,
wids, psutil and rich. There it reads the same samples from its own format.
"""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIZE_PX, BATCH = 490, 8
NEEDED = {"ours": "shards", "wids": "wids", "webdataset": "webdataset"}
NEEDED |= {"energon": "megatron.energon", "mosaic": "streaming"}
_WARM_UP = {"raw": 1200, "decoded": 48}
_SHUFFLE_BUFFER = 1000
_DISTINCT_IMAGES = 100
_PARTS = 20


class Photos:
    """640 x 480 JPEGs of about 78 KB with one to three heads each; the images repeat, the records do not."""

    name, licence, split = "benchmark", "CC0-1.0", "train"

    def __init__(self, samples: int) -> None:
        self.scope = {"samples": samples}
        self._samples = samples
        self._images = [_photo(k) for k in range(_DISTINCT_IMAGES)]

    def __len__(self) -> int:
        return self._samples

    def sample(self, i: int) -> Any:
        """Sample i."""
        from shards import pose
        from shards.record import Camera, Head, Image, Object, Record
        from shards.write import Sample

        rng = np.random.default_rng(i)
        heads = [
            Head((10.0 + 90 * k, 20.0, 90.0 + 90 * k, 120.0), tuple(pose.rotation_from_pose(*angles).flat), subject="p")
            for k, angles in enumerate(rng.uniform((-180, -90, -180), (180, 90, 180), (1 + i % 3, 3)))
        ]
        camera = Camera(500.0, 500.0, 320.0, 240.0)
        record = Record(
            Image(640, 480, self.name, str(i), f"s{i % 50}", camera), heads, [Object("the mug", (1.0, 1.0, 99.0, 99.0))]
        )
        return Sample(f"photo-{i:07d}", self._images[i % len(self._images)], "jpg", record)


def _photo(seed: int) -> bytes:
    import simplejpeg

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:480, :640]
    waves = [127 + 70 * np.sin(x / (9 + 4 * c + seed % 5) + y / (13 + seed % 7)) for c in range(3)]
    grain = rng.normal(0, 4.2, (480, 640, 1))
    pixels = np.ascontiguousarray(np.clip(np.stack(waves, axis=-1) + grain, 0, 255).astype(np.uint8))
    return simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420")


# Each loader gives, for ever or long enough, the number of samples that have just arrived.


def ours(folder: Path, mode: str, workers: int) -> Iterator[int]:
    from shards.index import open_set
    from shards.plan import Plan
    from shards.stream import Stream

    shard_set = open_set(folder)
    plan = Plan.of([shard_set], [1.0], 1, BATCH)
    for batch in Stream([shard_set], plan, 0, 1, SIZE_PX if mode == "decoded" else None, workers=workers):
        assert mode == "raw" or (batch.images is not None and batch.images.shape == (BATCH, 3, SIZE_PX, SIZE_PX))
        yield len(batch[1])


def _decoded(sample: dict[str, Any]) -> tuple[Any, Any]:
    import torch

    image = torch.empty(SIZE_PX, SIZE_PX, 3, dtype=torch.uint8)
    _decode(sample["jpg"], image)
    return image, json.loads(sample["json"])


def _decode(data: bytes, out: Any, scratch: Any = None) -> None:
    """A JPEG into (S, S, 3) uint8."""
    from shards.pixels import decode_pixels, resize

    resize(decode_pixels(data, "jpg", scratch=scratch), SIZE_PX, out.permute(2, 0, 1))


def _raw(sample: dict[str, Any]) -> tuple[bytes, Any]:
    return sample["jpg"], json.loads(sample["json"])


def webdataset(folder: Path, mode: str, workers: int) -> Iterator[int]:
    import webdataset as wds
    from torch.utils.data import DataLoader

    tars = sorted(map(str, folder.glob("*.tar")))
    dataset = wds.WebDataset(tars, shardshuffle=len(tars)).repeat().shuffle(_SHUFFLE_BUFFER)
    dataset = dataset.map(_decoded if mode == "decoded" else _raw)
    for batch in DataLoader(dataset.batched(BATCH, collation_fn=_collate), batch_size=None, num_workers=workers):
        yield len(batch[1])


def _collate(samples: list[tuple[Any, Any]]) -> list[Any]:
    """Records as they are, images as torch's own collation makes a batch of them."""
    from torch.utils.data import default_collate

    images, records = zip(*samples, strict=True)
    return [list(images) if isinstance(images[0], bytes) else default_collate(images), list(records)]


def wids(folder: Path, mode: str, workers: int) -> Iterator[int]:
    import wids as peer
    from torch.utils.data import DataLoader

    info = json.loads((folder / "index.json").read_text())["shards"]
    shards = [{"url": str(folder / shard["file"]), "nsamples": shard["samples"]} for shard in info]
    with open(os.devnull, "w") as quiet:
        stderr, sys.stderr = sys.stderr, quiet
        dataset = peer.ShardListDataset(shards, localname=lambda url: url, transformations=[])
        sys.stderr = stderr
    view = _WidsView(dataset, mode)
    for epoch in itertools.count():
        sampler = peer.ChunkedSampler(dataset, chunksize=1000, shuffle=True, seed=epoch)
        for batch in DataLoader(view, BATCH, sampler=sampler, num_workers=workers, collate_fn=_collate):
            yield len(batch[1])


class _WidsView:
    def __init__(self, dataset: Any, mode: str) -> None:
        self._dataset, self._mode = dataset, mode

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> Any:
        sample = self._dataset[i]
        data = {name[1:]: value.read() for name, value in sample.items() if name in (".jpg", ".json")}
        return _decoded(data) if self._mode == "decoded" else _raw(data)


def energon(folder: Path, mode: str, workers: int) -> Iterator[int]:
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset

    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    dataset = get_train_dataset(
        _energon_folder(folder),
        worker_config=config,
        batch_size=BATCH,
        shuffle_buffer_size=_SHUFFLE_BUFFER,
        max_samples_per_sequence=100,
        task_encoder=_energon_encoder(mode),
    )
    for batch in get_loader(dataset):
        yield len(batch[1])


def _energon_encoder(mode: str) -> Any:
    from megatron.energon import Cooker, DefaultTaskEncoder, basic_sample_keys, edataclass, stateless
    from megatron.energon import Sample as EnergonSample

    @edataclass
    class Arrived(EnergonSample):
        content: Any

    @stateless
    def cook(sample: dict[str, Any]) -> Arrived:
        content = _decoded(sample) if mode == "decoded" else _raw(sample)
        return Arrived(**basic_sample_keys(sample), content=content)

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(cook)]

        def batch(self, samples: list[Arrived]) -> Any:
            return _collate([sample.content for sample in samples])

    return Encoder()


def _energon_folder(folder: Path) -> Path:
    """The same tars by hard links, with energon's own index and description."""
    there = folder.parent / f"{folder.name}-energon"
    if (there / ".nv-meta" / "dataset.yaml").exists():
        return there
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    there.mkdir(exist_ok=True)
    for tar in folder.glob("*.tar"):
        (there / tar.name).unlink(missing_ok=True)
        os.link(tar, there / tar.name)
    names = sorted(tar.name for tar in there.glob("*.tar"))
    WebdatasetPreparator.prepare_dataset(there, names, split_parts_ratio=[("train", 1.0)], workers=1)
    text = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (there / ".nv-meta" / "dataset.yaml").write_text(text)
    return there


def mosaic(folder: Path, mode: str, workers: int) -> Iterator[int]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class View(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return _decoded(sample) if mode == "decoded" else _raw(sample)

    dataset = View(local=str(_mosaic_folder(folder)), batch_size=BATCH, shuffle=True, shuffle_algo="py1e")
    while True:
        for batch in DataLoader(dataset, BATCH, num_workers=workers, collate_fn=_collate):
            yield len(batch[1])


def _mosaic_folder(folder: Path) -> Path:
    """The same samples in streaming's own format."""
    there = folder.parent / f"{folder.name}-mosaic"
    if not (there / "index.json").exists():
        from streaming import MDSWriter

        from shards.index import open_set

        shard_set = open_set(folder)
        with MDSWriter(out=str(there), columns={"jpg": "bytes", "json": "bytes"}) as writer:
            for i in range(len(shard_set)):
                stored = shard_set.read(i)
                writer.write({"jpg": stored.image, "json": stored.json})
    return there


def ceiling(folder: Path, mode: str, workers: int) -> Iterator[int]:
    import torch

    from shards.index import open_set
    from shards.pixels import Scratch

    shard_set, scratch = open_set(folder), Scratch()
    images = [shard_set.read(i).image for i in range(_DISTINCT_IMAGES)]
    batch = torch.empty(BATCH, SIZE_PX, SIZE_PX, 3, dtype=torch.uint8)
    for i in itertools.count(0, BATCH):
        for k, place in enumerate(batch, i):
            _decode(images[k % len(images)], place, scratch)
        yield BATCH


def measure(loader: str, folder: Path, mode: str, workers: int, samples: int) -> dict[str, float]:
    """CPU ms a sample, samples/s and memory of one loader, in this process."""
    import psutil
    import torch

    torch.set_num_threads(1)
    me = psutil.Process()
    arrived = globals()[loader](folder, mode, workers)

    def take(count: int) -> int:
        taken = 0
        while taken < count:
            taken += next(arrived)
        return taken

    take(_WARM_UP[mode])
    family = [me, *me.children(recursive=True)]
    # Readers work ahead, and raw loaders have bursts (a shard is opened, a buffer filled): there only the whole tells.
    parts = _PARTS if mode == "decoded" and not workers else 1
    costs, taken, start_s = [], 0, time.perf_counter()
    for _ in range(parts):
        before, count = _cpu_s(family), take(samples // parts)
        costs.append((_cpu_s(family) - before) / count)
        taken += count
    wall_s = time.perf_counter() - start_s
    memory = [process.memory_full_info().uss / 2**20 for process in family if process.is_running()]
    return {
        "cpu_ms": 1e3 * min(costs),
        "rate": taken / wall_s,
        "uss_mib": memory[0],
        "worker_uss_mib": max(memory[1:], default=0.0),
    }


def _cpu_s(family: list[Any]) -> float:
    """CPU seconds of this process, the first of its family, and its children (these in hundredths)."""
    return time.process_time() + sum(sum(process.cpu_times()[:2]) for process in family[1:])


def run_one(arguments: list[str]) -> dict[str, float]:
    """measure() in a process of its own."""
    command = [sys.executable, __file__, "--one", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr.strip()[-600:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Measure and print all loaders."""
    from rich.console import Console
    from rich.table import Table

    loaders = [name for name, module in NEEDED.items() if _can_import(module)]
    for name in NEEDED.keys() - set(loaders):
        print(f"{name}: skipped, {NEEDED[name]} is not installed")
    cells = [("raw", 0), *(("decoded", workers) for workers in options.workers)]
    best: dict[tuple[str, str, int], dict[str, float]] = {}
    for turn in range(options.repeats):
        tasks = [(name, mode, workers) for mode, workers in cells for name in loaders] + [("ceiling", "decoded", 0)]
        for name, mode, workers in tasks:
            count = options.samples if mode == "raw" else options.decoded
            found = run_one([name, str(folder), mode, str(workers), str(count)])
            key = (name, mode, workers)
            rate = max(found["rate"], best[key]["rate"]) if key in best else found["rate"]
            best[key] = {**min(found, best.get(key, found), key=lambda f: f["cpu_ms"]), "rate": rate}
            print(f"  {turn + 1}/{options.repeats} {name} {mode} {workers}: {found['cpu_ms']:.3f} ms", file=sys.stderr)
    top = best["ceiling", "decoded", 0]["cpu_ms"]
    table = Table("mode", "readers", "loader", "CPU ms", "/s a core", "/s seen")
    for title in ("CPU of ours", "of ceiling", "MiB", "MiB a reader"):
        table.add_column(title)
    for mode, workers in cells:
        for name in loaders:
            found = best[name, mode, workers]
            share = f"{100 * top / found['cpu_ms']:.0f} %" if mode == "decoded" else ""
            ratio = f"{found['cpu_ms'] / best['ours', mode, workers]['cpu_ms']:.2f} x"
            table.add_row(
                *(mode, str(workers), name),
                *(f"{found['cpu_ms']:.3f}", f"{1e3 / found['cpu_ms']:.0f}", f"{found['rate']:.0f}"),
                *(ratio, share, f"{found['uss_mib']:.0f}", f"{found['worker_uss_mib']:.0f}" if workers else ""),
            )
    table.add_row("decoded", "", "ceiling", f"{top:.3f}", f"{1e3 / top:.0f}")
    Console(width=140).print(table)


def _can_import(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def main() -> None:
    if "--one" in sys.argv:
        loader, folder, mode, workers, samples = sys.argv[sys.argv.index("--one") + 1 :]
        print(json.dumps(measure(loader, Path(folder), mode, int(workers), int(samples))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000, help="raw samples of each measurement")
    parser.add_argument("--decoded", type=int, default=320, help="decoded samples of each measurement")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--workers", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--data", type=Path, help="folder for the data, kept (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = options.data or Path(temporary)
        from launcher.comm import single
        from shards.write import build

        build(Photos(5000), base / "photos", single(), 1000)
        compare(base / "photos", options)


if __name__ == "__main__":
    main()
