"""What the synthetic source promises: pure samples, exact labels, disjoint identities, one name for one thing."""

import argparse
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg

from launcher.errors import UsageError, UserError
from shards import pose
from shards.record import Record, from_json
from shards.sources import SOURCES
from shards.sources.synthetic import SPLITS, domains, words
from shards.sources.synthetic.scene import sample_rotations
from shards.sources.synthetic.source import SyntheticSource, remake, scene_seed

COUNT = 24


@pytest.fixture(scope="module", params=["A", "B", "C", "W"])
def source(request: pytest.FixtureRequest) -> SyntheticSource:
    return SyntheticSource(request.param, COUNT, seed=3, split="test")


@pytest.fixture(scope="module")
def records(source: SyntheticSource) -> list[Record]:
    return [source.sample(i).record for i in range(COUNT)]


def test_a_sample_depends_on_its_number_alone(source: SyntheticSource) -> None:
    late = source.sample(7)
    fresh = SyntheticSource(source.scope["domain"], 8, seed=3, split="test").sample(7)
    assert (late.image, late.record, late.key) == (fresh.image, fresh.record, fresh.key)
    assert source.sample(6).image != late.image
    with pytest.raises(IndexError):
        source.sample(COUNT)


def test_an_image_is_made_again_from_its_record(source: SyntheticSource) -> None:
    sample = source.sample(2)
    stored = from_json(sample.record.to_json())
    assert remake(stored.image) == sample.image
    with pytest.raises(UserError, match="synthetic source"):
        remake(replace(stored.image, source="agora"))


def test_records_are_valid_and_images_have_their_size(source: SyntheticSource, records: list[Record]) -> None:
    for i, known in enumerate(records):
        assert from_json(known.to_json()).to_json() == known.to_json()
        height, width, _ = simplejpeg.decode_jpeg(source.sample(i).image).shape
        assert (width, height) == (known.image.width, known.image.height) == (140, 140)
        for x0, y0, x1, y1 in [thing.bbox for thing in [*known.heads, *known.objects]]:
            assert 0 <= x0 < x1 <= 140
            assert 0 <= y0 < y1 <= 140
        assert all(abs(head.pose_deg[2]) < 90 for head in known.heads)


def test_heads_can_be_read(records: list[Record]) -> None:
    heads = [head for known in records for head in known.heads]
    assert len(heads) >= COUNT
    assert np.mean([known.heads == [] for known in records]) < 0.1
    heights = [head.bbox[3] - head.bbox[1] for head in heads]
    assert np.percentile(heights, 10) > 28
    assert np.mean([head.visible for head in heads]) > 0.85


def test_an_expression_names_one_thing_in_known_words(records: list[Record]) -> None:
    for known in records:
        expressions = [thing.expression for thing in known.objects]
        assert len(set(expressions)) == len(expressions)
        assert {word for text in expressions for word in text.split()} <= words.VOCABULARY


def test_expressions_of_heads() -> None:
    left, right, large = (5.0, 5.0, 25.0, 30.0), (80.0, 5.0, 100.0, 30.0), (40.0, 10.0, 75.0, 60.0)
    assert words.head_expressions([right], 112) == [("head", 0)]
    assert words.head_expressions([right, left], 112) == [("left head", 1), ("right head", 0)]
    assert set(words.head_expressions([large, left, right], 112)) == {
        ("left head", 1),
        ("right head", 2),
        ("largest head", 0),
    }
    above = (6.0, 40.0, 26.0, 65.0)
    assert words.head_expressions([left, above], 112) == []
    assert words.head_expressions([], 112) == []


def test_no_two_splits_share_an_identity_or_a_scene() -> None:
    pools = [domains.identities(domain, split) for domain in domains.DOMAINS.values() for split in SPLITS]
    everyone = [subject for pool in pools for subject in pool]
    assert len(set(everyone)) == len(everyone)
    assert all(len(pool) % domains.GROUP == 0 for pool in pools)
    seeds = {scene_seed(d, s, 0, i) for d in domains.DOMAINS for s in SPLITS for i in range(50)}
    assert len(seeds) == 50 * len(pools)
    assert max(seeds) < 2**53  # readable by JSON readers that know only doubles


def test_subjects_say_who_is_in_the_image(records: list[Record]) -> None:
    for known in records:
        group = int(known.image.subject[-3:])
        for head in known.heads:
            domain, split, number = head.subject.split("-")
            assert known.image.subject.startswith(f"{domain}-{split}-group")
            assert int(number) // domains.GROUP == group


def test_headings_are_even_and_labels_within_range() -> None:
    rotations, busts = sample_rotations(4000, np.random.default_rng(0), -8.0)
    yaw, pitch, roll = pose.pose_from_rotation(rotations).T
    counts, _ = np.histogram(yaw, bins=8, range=(-180, 180))
    assert counts.min() > 0.7 * 4000 / 8
    assert np.abs(roll).max() < 90
    assert np.abs(pitch).max() <= 90
    assert all(pose.is_rotation(m) for m in [*rotations[:20], *busts[:20]])


def test_a_camera_above_sees_a_level_frontal_head_look_down() -> None:
    rotations, _ = sample_rotations(3000, np.random.default_rng(1), -20.0)
    yaw, pitch, _ = pose.pose_from_rotation(rotations).T
    assert np.mean(pitch[np.abs(yaw) < 20]) == pytest.approx(-20, abs=3)
    crown_depth = -rotations[:, 2, 1]  # of the axis from the head's centre to its crown
    assert np.mean(crown_depth < 0) > 0.85


@pytest.mark.parametrize("size", [64, 224])
def test_sizes_scale_with_the_image(size: int) -> None:
    made = [SyntheticSource("A", 6, split="val", image_size=size).sample(i).record for i in range(6)]
    heights = [(head.bbox[3] - head.bbox[1]) / size for known in made for head in known.heads]
    assert 0.25 < np.median(heights) < 0.6
    assert made[0].image.camera is not None
    assert 45 <= 2 * np.degrees(np.arctan(size / 2 / made[0].image.camera.fx)) <= 60


@pytest.mark.parametrize("wrong", [{"domain": "Z"}, {"split": "all"}, {"image_size": 8}, {"scenes": 0}, {"seed": -1}])
def test_wrong_options_are_the_users(wrong: dict) -> None:
    options = {"domain": "A", "scenes": 3, "seed": 0, "split": "val", "image_size": 112, **wrong}
    with pytest.raises(UsageError):
        SyntheticSource(**options)


def test_the_registry_makes_a_source_from_its_options() -> None:
    add_arguments, make = SOURCES["synthetic"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    made = make(
        parser.parse_args(["--domain", "B", "--split", "base", "--scenes", "5", "--seed", "2", "--image-size", "96"])
    )
    assert (made.name, made.split, len(made)) == ("synthetic-B", "base", 5)
    assert made.scope["image_size"] == 96


def test_help_needs_no_renderer() -> None:
    code = "import sys, shards.sources; assert not {'numba', 'numpy', 'scipy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
