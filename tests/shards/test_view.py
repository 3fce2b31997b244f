"""A view in place of the resized image: any tensor of any shape, through worker processes too."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.errors import UsageError
from shards.augment import Augment
from shards.index import open_set
from shards.plan import Plan
from shards.record import Record
from shards.stream import Stream, read_all


def corners(pixels: np.ndarray, known: Record) -> torch.Tensor:
    """A few pixels, as many as the image has heads and objects."""
    return torch.from_numpy(pixels[0, : len(known.heads) + len(known.objects)].copy())


@pytest.mark.parametrize("workers", [0, 1])
def test_views_of_differing_shapes_arrive_whole(tiny_set: Callable[..., Path], workers: int) -> None:
    shard_set = open_set(tiny_set(samples=6))
    expected = {}
    for _, items in read_all(shard_set, 0, 1, 6, None):
        expected = {item.key: len(item.record.heads) + len(item.record.objects) for item in items}
    [(_, items)] = read_all(shard_set, 0, 1, 6, corners, workers=workers)
    assert {item.key: item.image.shape for item in items} == {key: (n, 3) for key, n in expected.items()}
    plain = {item.key: corners_of(shard_set, item.slot.sample) for item in items}
    assert all(torch.equal(item.image, plain[item.key]) for item in items)


def corners_of(shard_set, sample: int) -> torch.Tensor:
    from shards.pixels import decode_pixels

    stored = shard_set.read(sample)
    return corners(decode_pixels(stored.image, stored.extension), shard_set.record(sample))


def test_a_view_is_not_augmented(tiny_set: Callable[..., Path]) -> None:
    shard_set = open_set(tiny_set(samples=6))
    with pytest.raises(UsageError, match="leave augment out"):
        Stream([shard_set], Plan([6], [1.0], 0, 2), 0, 1, corners, augment=Augment(flip=True))
