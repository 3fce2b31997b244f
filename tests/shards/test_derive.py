"""Sources made of sources: another order, smaller images, other encodings; labels follow."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage
from tiny_source import TinySource

from launcher.comm import single
from launcher.errors import UsageError, UserError
from shards.derive import Reencoded, Shuffled
from shards.index import open_set
from shards.record import Camera
from shards.verify import verify
from shards.write import Sample, build


def test_a_shuffled_source_has_the_same_samples_in_an_order_of_its_seed(tmp_path: Path) -> None:
    plain = TinySource(samples=40)
    for seed in (0, 1):
        build(Shuffled(plain, seed), tmp_path / f"{seed}", single(), samples_per_shard=10)
    first, second = (open_set(tmp_path / f"{seed}") for seed in (0, 1))
    keys = [[s.key(i) for i in range(40)] for s in (first, second)]
    assert sorted(keys[0]) == sorted(keys[1]) == [plain.sample(i).key for i in range(40)]
    assert keys[0] != keys[1] and keys[0] != sorted(keys[0])
    assert first.info["scope"]["shuffle"] == 0 and first.info["scope"]["size_px"] == 48
    again = [Shuffled(plain, 0).sample(i).key for i in range(40)]
    assert again == keys[0]


def test_a_shuffle_spreads_sequences_over_the_shards() -> None:
    shuffled = Shuffled(TinySource(samples=400), 3)
    numbers = np.array([int(shuffled.sample(i).key.rpartition("-")[2]) for i in range(400)])
    assert abs(np.abs(np.diff(numbers)).mean() - 401 / 3) < 15


class WithCamera(TinySource):
    def sample(self, i: int) -> Sample:
        sample = super().sample(i)
        image = replace(sample.record.image, camera=Camera(120.0, 96.0, 24.0, 18.0))
        return replace(sample, record=replace(sample.record, image=image))


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_smaller_images_have_boxes_and_camera_scaled_along(extension: str) -> None:
    source = WithCamera(samples=4, size_px=240, extension=extension)
    small = Reencoded(source, None, 100)
    assert small.scope == {**source.scope, "max_side": 100}
    for i in range(4):
        before, after = source.sample(i), small.sample(i)
        assert after.extension == extension and after.key == before.key
        pixels = np.asarray(PillowImage.open(io.BytesIO(after.image)).convert("RGB")).astype(int)
        known = after.record
        assert pixels.shape == (75, 100, 3) and (known.image.width, known.image.height) == (100, 75)
        assert known.image.camera == Camera(120.0 * (100 / 240), 96.0 * (75 / 180), 10.0, 7.5)
        assert [h.rotation for h in known.heads] == [h.rotation for h in before.record.heads]
        np.testing.assert_allclose(known.heads[0].bbox, np.array(before.record.heads[0].bbox) * 100 / 240)
        # The red box that is drawn is where its label is.
        rows, columns = np.nonzero((pixels[..., 0] > 150) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90))
        seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        np.testing.assert_allclose(seen, known.objects[0].bbox, atol=1.5)


def test_images_that_need_no_change_keep_their_bytes() -> None:
    source = TinySource(samples=2, size_px=48)
    assert Reencoded(source, None, 48).sample(1) == source.sample(1)


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_images_as_jpeg_of_a_quality(tmp_path: Path, extension: str) -> None:
    source = TinySource(samples=6, size_px=240, extension=extension)
    poor, good = Reencoded(source, 20, None), Reencoded(source, 97, None)
    assert poor.sample(2).extension == good.sample(2).extension == "jpg"
    assert len(poor.sample(2).image) < len(good.sample(2).image) / 2
    assert poor.sample(2).record == source.sample(2).record
    build(poor, tmp_path / "set", single())
    assert verify([tmp_path / "set"], single()) == []


def test_an_image_that_does_not_decode_is_named() -> None:
    class Broken(TinySource):
        def sample(self, i: int) -> Sample:
            return replace(super().sample(i), image=b"no image")

    with pytest.raises(UserError, match="tiny-train sample 3, key tiny-train-000003: its image does not decode"):
        Reencoded(Broken(), 90, None).sample(3)


@pytest.mark.parametrize(("quality", "side", "said"), [(0, None, "quality 0"), (101, None, "101"), (None, 8, "8 px")])
def test_values_that_cannot_be_meant(quality: int | None, side: int | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Reencoded(TinySource(), quality, side)
