"""Streams: the same samples in the same order for any ranks and workers, exact resume, flips, and bad samples."""

import contextlib
import io
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage

from launcher.errors import UsageError, UserError
from shards import pose
from shards.augment import Augment
from shards.index import ShardSet, open_set
from shards.pixels import decode_image
from shards.plan import Plan, is_mirrored
from shards.stream import Item, Stream, read_all


@pytest.fixture
def sets(tiny_set: Callable[..., Path]) -> list[ShardSet]:
    return [open_set(tiny_set(samples=17)), open_set(tiny_set(samples=6, split="more"))]


def plan_of(sets: list[ShardSet], batch: int = 8) -> Plan:
    return Plan([len(s) for s in sets], [3.0, 1.0][: len(sets)], seed=5, batch=batch)


def keys(items: list[Item]) -> list[str]:
    return [item.key for item in items]


def global_batches(sets: list[ShardSet], size: int, count: int = 4, **options: object) -> list[list[str]]:
    streams = [Stream(sets, plan_of(sets), rank, size, 24, **options) for rank in range(size)]  # type: ignore[arg-type]
    batches = []
    for parts in islice(zip(*streams, strict=True), count):
        assert len({n for n, _ in parts}) == 1
        batches.append([key for _, items in parts for key in keys(items)])
    return batches


def test_delivers_what_the_plan_says(sets: list[ShardSet]) -> None:
    plan = plan_of(sets)
    for n, items in islice(Stream(sets, plan, 0, 1, 24), 6):
        assert [item.slot for item in items] == plan.batch_at(n)
        assert keys(items) == [sets[item.slot.set].key(item.slot.sample) for item in items]
        assert all(item.image is not None and item.image.shape == (3, 24, 24) for item in items)


def test_one_two_and_four_ranks_get_the_same_global_batches(sets: list[ShardSet]) -> None:
    alone = global_batches(sets, 1)
    assert global_batches(sets, 2) == alone
    assert global_batches(sets, 4) == alone


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(sets: list[ShardSet], workers: int) -> None:
    plan = plan_of(sets)
    here = list(islice(Stream(sets, plan, 1, 2, 24, start=3, augment=Augment(flip=True)), 5))
    there = list(islice(Stream(sets, plan, 1, 2, 24, start=3, augment=Augment(flip=True), workers=workers), 5))
    for one, other_one in zip(here, there, strict=True):
        (n, items), (m, others) = one, other_one
        assert n == m and keys(items) == keys(others)
        assert one.images is not None and other_one.images is not None and torch.equal(one.images, other_one.images)
        for item, other in zip(items, others, strict=True):
            assert item.image is not None and other.image is not None and item.record is not None
            assert torch.equal(item.image, other.image)
            assert (item.record, item.slot, item.mirrored) == (other.record, other.slot, other.mirrored)


@pytest.mark.slow
def test_resume_on_other_ranks_and_workers_goes_on_exactly(sets: list[ShardSet]) -> None:
    whole = global_batches(sets, 1, count=7)
    assert global_batches(sets, 2, count=4, start=3, workers=1) == whole[3:]


def test_flip_mirrors_image_boxes_poses_and_words_by_a_coin_of_the_position(sets: list[ShardSet]) -> None:
    plan = plan_of(sets)
    plain = [item for _, items in islice(Stream(sets, plan, 0, 1, 24), 4) for item in items]
    flipped = [
        item for _, items in islice(Stream(sets, plan, 0, 1, 24, augment=Augment(flip=True)), 4) for item in items
    ]
    assert {item.mirrored for item in flipped} == {True, False}
    for before, after in zip(plain, flipped, strict=True):
        assert after.mirrored == is_mirrored(plan.seed, after.slot.position)
        assert before.image is not None and after.image is not None
        assert before.record is not None and after.record is not None
        if not after.mirrored:
            assert torch.equal(before.image, after.image) and before.record == after.record
            continue
        assert torch.equal(before.image.flip(-1), after.image)
        assert after.record.objects[0].expression == "the red box on the right"
        x0, y0, x1, y1 = before.record.heads[0].bbox
        assert after.record.heads[0].bbox == (48 - x1, y0, 48 - x0, y1)
        mirrored = pose.flip_rotation(before.record.heads[0].matrix)
        np.testing.assert_array_equal(after.record.heads[0].matrix, mirrored)


STRONG = Augment(flip=True, rotate_deg=25.0, crop=0.6, colour=0.3)


def test_augmented_items_are_the_plain_ones_changed_as_their_position_says(sets: list[ShardSet]) -> None:
    plan = plan_of(sets)
    plain = [item for _, items in islice(Stream(sets, plan, 0, 1, 24), 3) for item in items]
    changed = [item for _, items in islice(Stream(sets, plan, 0, 1, 24, augment=STRONG), 3) for item in items]
    for before, after in zip(plain, changed, strict=True):
        assert before.record is not None and after.record is not None and after.image is not None
        change = STRONG.at(plan.seed, before.slot.position, before.record)
        assert after.record == change.record(before.record) and after.mirrored == change.mirrored
        assert after.image.shape == (3, 24, 24) and not torch.equal(after.image, before.image)


@pytest.mark.slow
def test_augmentation_does_not_see_ranks_workers_or_resumes(sets: list[ShardSet]) -> None:
    def images(size: int, **options: object) -> list[torch.Tensor]:
        streams = [Stream(sets, plan_of(sets), rank, size, 24, augment=STRONG, **options) for rank in range(size)]
        return [i.image for parts in islice(zip(*streams, strict=True), 2) for _, items in parts for i in items]

    alone = images(1, start=2)
    for other in (images(4, start=2), images(2, start=2, workers=1)):
        assert all(torch.equal(a, b) for a, b in zip(alone, other, strict=True))


def test_each_batch_carries_the_state_to_go_on_after_it(sets: list[ShardSet]) -> None:
    plan = plan_of(sets)
    batches = list(islice(Stream(sets, plan, 0, 1, None), 5))
    state = dict(batches[2].state)
    n = state.pop("step")
    assert n == 3 and state == {"seed": 5, "batch": 8, "sizes": [17, 6], "ratios": [3.0, 1.0]}
    resumed = Stream(sets, Plan(**state), 0, 1, None, start=n)
    assert [keys(items) for _, items in islice(resumed, 2)] == [keys(items) for _, items in batches[3:]]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_blocks_and_buckets_read_what_their_plan_says(sets: list[ShardSet], workers: int) -> None:
    plan = Plan.of(sets, [3.0, 1.0], 5, 8, block_shards=2, bucket_batches=3)
    for n, items in islice(Stream(sets, plan, 1, 2, None, start=2, workers=workers), 4):
        assert [item.slot for item in items] == plan.share_at(n, 1, 2)


def spoil(shard_set: ShardSet, i: int, find: bytes, put: bytes) -> None:
    tar = shard_set.path / shard_set.shard_name(i)
    start = int(min(shard_set.arrays["image_offset"][i], shard_set.arrays["json_offset"][i]))
    data = tar.read_bytes()
    tar.write_bytes(data[:start] + data[start:].replace(find, put, 1))


def spoil_image(shard_set: ShardSet, i: int) -> None:
    image = shard_set.read(i).image
    spoil(shard_set, i, image, image[: len(image) // 3] + b"\0" * (len(image) - len(image) // 3))


def test_bad_shard_policies_fail(sets: list[ShardSet]) -> None:
    """And name shard and key, in one line."""
    spoil_image(sets[0], 4)
    with pytest.raises(UserError) as caught:
        list(islice(Stream(sets, plan_of(sets), 0, 1, 24), 6))
    said = str(caught.value)
    assert "tiny-train-000001.tar, key tiny-train-000004: the jpg does not decode" in said and "\n" not in said


@pytest.mark.slow
def test_errors_in_workers_stay_one_line(sets: list[ShardSet]) -> None:
    spoil_image(sets[0], 4)
    with pytest.raises(UserError) as caught:
        list(islice(Stream(sets, plan_of(sets), 0, 1, 24, workers=1), 6))
    assert "key tiny-train-000004" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_shard_policies_skip(sets: list[ShardSet]) -> None:
    """Skipped samples leave holes, which are counted and never filled."""
    whole = [items for _, items in islice(Stream(sets, plan_of(sets), 0, 1, 24), 6)]
    spoil_image(sets[0], 4)
    spoil(sets[0], 9, b'"visible":1.0', b'"visible":9.0')
    stream = Stream(sets, plan_of(sets), 0, 1, 24, on_bad_sample="skip")
    holes = 0
    for items, batch in zip(whole, islice(stream, 6), strict=True):
        _, found = batch
        assert batch.images is not None and batch.images.shape == (8, 3, 24, 24)
        for image, item in zip(batch.images, found, strict=True):
            assert not image.any() if item.image is None else image.data_ptr() == item.image.data_ptr()
        assert [item.slot for item in items] == [item.slot for item in found]
        assert keys(items) == keys(found)
        for item in found:
            bad = item.slot.set == 0 and item.slot.sample in (4, 9)
            assert (item.image is None) == (item.record is None) == bad
            assert bool(item.problem) == bad
            holes += bad
    assert stream.skipped == holes > 2


def test_a_hundred_bad_samples_in_a_row_are_no_bad_luck(sets: list[ShardSet]) -> None:
    for i in range(17):
        spoil_image(sets[0], i)
    stream = Stream(sets[:1], plan_of(sets[:1]), 0, 1, 24, on_bad_sample="skip")
    with pytest.raises(
        UserError, match="100 bad samples in a row are not skipped; the last: .*key tiny-train-0000"
    ) as e:
        list(stream)
    assert stream.skipped == 100 and "\n" not in str(e.value)


def test_one_good_sample_ends_the_row(sets: list[ShardSet]) -> None:
    for i in range(16):
        spoil_image(sets[0], i)
    stream = Stream(sets[:1], plan_of(sets[:1]), 0, 1, 24, on_bad_sample="skip")
    list(islice(stream, 40))
    assert stream.skipped > 250


def test_an_image_of_another_size_than_its_record_says(sets: list[ShardSet]) -> None:
    spoil(sets[0], 2, b'"width":48', b'"width":47')
    with pytest.raises(UserError, match="key tiny-train-000002: the image is 48x36, its record says 47x36"):
        list(islice(Stream(sets, plan_of(sets), 0, 1, 24), 6))


def test_streams_that_cannot_be_meant(sets: list[ShardSet]) -> None:
    with pytest.raises(UsageError, match="must be a multiple of the 3 ranks"):
        Stream(sets, plan_of(sets), 0, 3, 24)
    with pytest.raises(UsageError, match="the plan is for"):
        Stream(sets[:1], plan_of(sets), 0, 1, 24)
    with pytest.raises(UsageError, match="ranks count from 0"):
        Stream(sets, plan_of(sets), 2, 2, 24)


def test_evaluation_reads_everything_once_in_key_order_in_fixed_batches(sets: list[ShardSet]) -> None:
    alone = list(read_all(sets[0], 0, 1, 5, 24))
    assert [key for _, items in alone for key in keys(items)] == [f"tiny-train-{i:06d}" for i in range(17)]
    assert [len(items) for _, items in alone] == [5, 5, 5, 2]
    parts = [list(read_all(sets[0], rank, 3, 5, 24)) for rank in range(3)]
    merged = sorted((b, keys(items)) for part in parts for b, items in part)
    assert merged == [(b, keys(items)) for b, items in alone]
    assert [len(part) for part in parts] == [2, 1, 1]
    limited = [key for _, items in read_all(sets[0], 0, 1, 5, None, limit=7) for key in keys(items)]
    assert limited == [f"tiny-train-{i:06d}" for i in range(7)]


def encoded(pixels: np.ndarray, form: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(pixels).convert(mode).save(file, form, **({"quality": 90} if form == "JPEG" else {}))
    return file.getvalue()


def smooth_picture(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (7.0 + k) + y / (11.0 - k)) for k in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("size", [(48, 64), (200, 150), (96, 96)])
@pytest.mark.parametrize(("form", "extension"), [("JPEG", "jpg"), ("PNG", "png")])
def test_decoding_is_that_of_pillow_within_two_grey_levels(size: tuple[int, int], form: str, extension: str) -> None:
    data = encoded(smooth_picture(*size), form)
    ours = decode_image(data, extension, 96).permute(1, 2, 0).numpy().astype(int)
    with PillowImage.open(io.BytesIO(data)) as image:
        theirs = np.array(image.convert("RGB").resize((96, 96), PillowImage.Resampling.BICUBIC)).astype(int)
    assert ours.shape == (96, 96, 3) and np.abs(ours - theirs).max() <= 2
    if size == (96, 96):
        assert np.abs(ours - theirs).max() == 0


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_become_rgb(mode: str) -> None:
    image = decode_image(encoded(smooth_picture(40, 40), "JPEG", mode), "jpg", 32)
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_bytes_that_are_no_image(extension: str) -> None:
    whole = encoded(smooth_picture(64, 64), "JPEG" if extension == "jpg" else "PNG")
    for data in (b"", b"no image", whole[: len(whole) // 2]):
        with pytest.raises(ValueError):
            decode_image(data, extension, 32)


@given(st.data(), st.sampled_from([("JPEG", "jpg"), ("PNG", "png")]))
def test_damaged_bytes_decode_or_raise_value_error(data: st.DataObject, kind: tuple[str, str]) -> None:
    image = bytearray(encoded(smooth_picture(16, 16), kind[0]))
    for _ in range(3):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        assert decode_image(bytes(image), kind[1], 16).shape == (3, 16, 16)
