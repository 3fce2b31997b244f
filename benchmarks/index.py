"""What a set of a million samples costs: to open, to look samples up in, to plan over, to send to a reader process.

python benchmarks/index.py [--samples 1000000]
"""

import argparse
import json
import multiprocessing
import pickle
import tempfile
import time
from pathlib import Path

import numpy as np

_PER_SHARD = 1000
_BATCH, _BATCHES = 64, 200


def write_index(folder: Path, count: int) -> None:
    """The index of so many samples, as a build writes it; there are no tars."""
    numbers = np.arange(count)
    ones = np.ones(count, np.int32)
    arrays = {
        "shard": (numbers // _PER_SHARD).astype(np.int32),
        "image_offset": numbers % _PER_SHARD * 80_000 + 512,
        "image_size": np.full(count, 78_000, np.int32),
        "json_offset": numbers % _PER_SHARD * 80_000 + 79_000,
        "json_size": np.full(count, 600, np.int32),
        "n_heads": ones,
        "n_objects": ones,
        "key": np.char.mod("photo-%08d", numbers).astype("S"),
        "subject": ones,
        "head_subject": ones,
        "subjects": np.array([b"", b"somebody"]),
    }
    np.savez(folder / "index.npz", **arrays)
    shards = [
        {"file": f"photo-{k:06d}.tar", "samples": _PER_SHARD, "bytes": 80_010_240, "sha256": "0" * 64}
        for k in range(count // _PER_SHARD)
    ]
    info = {"format": "hpe-shards-1", "counts": {"samples": count}, "shards": shards}
    (folder / "index.json").write_text(json.dumps(info))


def memory_mib() -> tuple[float, float]:
    """This process's own memory, and mapped pages of files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    options = parser.parse_args()
    count = max(_PER_SHARD, options.samples // _PER_SHARD * _PER_SHARD)
    from shards.index import open_set
    from shards.plan import Plan

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # In a process of its own: what it needs and gives back would hide what opening needs.
        writer = multiprocessing.get_context("spawn").Process(target=write_index, args=(folder, count))
        writer.start()
        writer.join()
        size_mib = (folder / "index.npz").stat().st_size / 2**20
        own, mapped = memory_mib()
        start_s = time.perf_counter()
        shard_set = open_set(folder)
        opened_s = time.perf_counter() - start_s
        plan = Plan.of([shard_set], [1.0], 0, _BATCH, block_shards=64)
        start_s = time.perf_counter()
        for n in range(_BATCHES):
            for slot in plan.batch_at(n):
                shard_set.key(slot.sample)
                shard_set.shard_name(slot.sample)
        looked_us = 1e6 * (time.perf_counter() - start_s) / (_BATCHES * _BATCH)
        own_after, mapped_after = memory_mib()
        print(
            f"{count:,} samples, index of {size_mib:.0f} MiB: opened in {1e3 * opened_s:.0f} ms; "
            f"{_BATCHES * _BATCH:,} samples planned and looked up in {looked_us:.1f} us each; "
            f"{own_after - own:.1f} MiB of own memory and {mapped_after - mapped:.1f} MiB of mapped pages more; "
            f"{len(pickle.dumps(shard_set))} bytes to send it"
        )


if __name__ == "__main__":
    main()
