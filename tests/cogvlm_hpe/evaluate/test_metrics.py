"""Scores against independent maths: other formulas, other libraries, brute force."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from cogvlm_hpe.evaluate import metrics
from shards import pose

angle = st.floats(-180.0, 180.0, allow_nan=False)
triple = st.tuples(angle, st.floats(-90.0, 90.0), angle)


@given(st.lists(st.tuples(triple, triple), min_size=1, max_size=8))
def test_angle_errors_wrap_at_a_full_turn_only(pairs: list) -> None:
    predicted, truth = np.array([p for p, _ in pairs]), np.array([t for _, t in pairs])
    for got, p, t in zip(metrics.angle_errors_deg(predicted, truth), predicted, truth, strict=True):
        for value, a, b in zip(got, p, t, strict=True):
            assert value == pytest.approx(min(abs(a - b + turn) for turn in (-360, 0, 360)), abs=1e-9)


def test_front_and_back_are_not_confused_by_the_wrap() -> None:
    assert metrics.angle_errors_deg(np.array([[0.0, 0, 0]]), np.array([[180.0, 0, 0]]))[0, 0] == 180.0


@given(triple, triple)
def test_geodesic_equals_the_angle_of_the_relative_rotation(a: tuple, b: tuple) -> None:
    def matrix(t: tuple) -> Rotation:
        return Rotation.from_euler("zyx", [t[2], t[0], -t[1]], degrees=True)

    expected = math.degrees((matrix(a).inv() * matrix(b)).magnitude())
    assert metrics.geodesic_errors_deg(np.array([a]), np.array([b]))[0] == pytest.approx(expected, abs=1e-5)


@given(st.lists(st.tuples(triple, triple), min_size=1, max_size=8))
def test_axis_errors_equal_the_angles_between_axes_one_by_one(pairs: list) -> None:
    a, b = (
        Rotation.from_euler("zyx", [[t[2], t[0], -t[1]] for t in side], degrees=True)
        for side in zip(*pairs, strict=True)
    )
    expected = np.zeros(len(pairs))
    for axis in np.eye(3):
        u, v = a.apply(axis), b.apply(axis)
        expected += np.degrees(np.arctan2(np.linalg.norm(np.cross(u, v), axis=1), (u * v).sum(axis=1))) / 3
    got = metrics.axis_errors_deg(a.as_matrix(), b.as_matrix())
    assert np.allclose(got, expected, atol=1e-5)


def test_axis_errors_of_a_known_turn() -> None:
    turned = metrics.rotations(np.array([[0.0, 0.0, 30.0]]))  # about one axis: the two others move by 30 degrees
    assert metrics.axis_errors_deg(turned, np.eye(3)[None])[0] == pytest.approx(20.0)


def test_alignment_finds_the_turn_that_was_put_in_and_nothing_else() -> None:
    truth = Rotation.random(60, random_state=1)
    offset = Rotation.from_euler("XYZ", [12, -5, 3], degrees=True)
    noise = Rotation.from_rotvec(np.random.default_rng(0).normal(size=(60, 3)) * 0.05)
    found = metrics.alignment((truth * offset.inv() * noise).as_matrix(), truth.as_matrix())
    assert math.degrees((Rotation.from_matrix(found).inv() * offset).magnitude()) < 1.5
    exact = metrics.alignment((truth * offset.inv()).as_matrix(), truth.as_matrix())
    assert math.degrees((Rotation.from_matrix(exact).inv() * offset).magnitude()) < 1e-3


def test_geodesic_at_gimbal_lock_is_blind_to_how_the_lock_is_written() -> None:
    same = np.array([[90.0, 20.0, 0.0], [90.0, 0.0, -20.0], [-90.0, 20.0, 0.0], [-90.0, 0.0, 20.0]])
    assert metrics.geodesic_errors_deg(same[::2], same[1::2]) == pytest.approx([0.0, 0.0], abs=1e-5)
    assert metrics.angle_errors_deg(same[::2], same[1::2]).sum() == pytest.approx(80.0)


def test_the_pose_that_biwis_card_prints() -> None:
    matrix = np.array(
        [[0.980639, 0.109899, 0.162077], [-0.11023, 0.993882, -0.00697376], [-0.161851, -0.011027, 0.986754]]
    )
    said = np.array([[9.33, -0.40, -6.39]])
    assert metrics.geodesic_errors_deg(said, pose.pose_from_rotation(matrix)[None])[0] < 0.02


box = st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 20), st.integers(1, 20)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(box, box)
def test_iou_equals_counting_pixels(a: tuple, b: tuple) -> None:
    grid = np.zeros((2, 50, 50), dtype=bool)
    for layer, (x0, y0, x1, y1) in zip(grid, (a, b), strict=True):
        layer[y0:y1, x0:x1] = True
    expected = (grid[0] & grid[1]).sum() / (grid[0] | grid[1]).sum()
    assert metrics.iou(np.array(a), np.array(b)) == pytest.approx(expected)


def test_iou_of_boxes_without_area_is_zero() -> None:
    empty = np.array([3.0, 3, 3, 3])
    assert metrics.iou(empty, empty) == 0.0
    assert metrics.iou(np.array([5.0, 5, 1, 1]), np.array([0.0, 0, 9, 9])) == 0.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 25))
def test_no_constant_rotation_beats_the_constant_pose(seed: int, n: int) -> None:
    truth = Rotation.random(n, random_state=seed).as_matrix()
    found = metrics.constant_pose(truth)
    cost = _cost(found, truth)
    assert np.allclose(found @ found.T, np.eye(3), atol=1e-9)
    others = [np.eye(3), Rotation.from_matrix(truth).mean().as_matrix(), *truth]
    nearby = Rotation.from_rotvec(np.random.default_rng(seed).normal(size=(40, 3)) * 0.02).as_matrix()
    assert all(cost <= _cost(other, truth) + 1e-5 for other in others)
    assert all(cost <= _cost(found @ turn, truth) + 0.5 for turn in nearby)


def test_constant_pose_of_equal_truths_is_that_truth() -> None:
    truth = np.repeat(Rotation.from_euler("XYZ", [10, 150, -30], degrees=True).as_matrix()[None], 7, axis=0)
    assert _cost(metrics.constant_pose(truth), truth) == pytest.approx(0.0, abs=1e-6)


def _cost(rotation: np.ndarray, truth: np.ndarray) -> float:
    cosine = (np.einsum("ij,nij->n", rotation, truth) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean())


def test_bootstrap_covers_the_true_mean_about_95_times_of_100() -> None:
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        values = generator.gamma(2.0, 5.0, size=80)
        interval = metrics.bootstrap_mean(values, [str(i) for i in range(80)], resamples=400)
        hits += interval.low <= 10.0 <= interval.high
    assert 178 <= hits <= 199


def test_bootstrap_matches_the_normal_interval_of_a_large_sample() -> None:
    values = np.random.default_rng(0).normal(30, 8, size=4000)
    got = metrics.bootstrap_mean(values, [str(i) for i in range(4000)])
    half = 1.96 * values.std() / math.sqrt(4000)
    assert got.mean == pytest.approx(values.mean())
    assert got.low == pytest.approx(values.mean() - half, abs=0.05)
    assert got.high == pytest.approx(values.mean() + half, abs=0.05)


def test_the_normal_interval_of_many_groups_is_that_of_resampling(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    images = generator.integers(0, 2000, size=6000)  # some with one head, some with seven
    values = 20 + generator.gamma(2.0, 5.0, size=2000)[images] + generator.normal(size=6000)
    resampled = metrics.bootstrap_mean(values, images.astype(str).tolist())
    monkeypatch.setattr(metrics, "NORMAL_ABOVE", 1000)
    normal = metrics.bootstrap_mean(values, images.astype(str).tolist())
    width = resampled.high - resampled.low
    assert normal.mean == pytest.approx(resampled.mean) and normal.n == resampled.n
    assert abs(normal.low - resampled.low) < 0.05 * width and abs(normal.high - resampled.high) < 0.05 * width


def test_heads_of_one_image_are_resampled_together() -> None:
    values = np.repeat(np.random.default_rng(1).normal(size=50), 20)
    images = np.repeat(np.arange(50), 20).astype(str).tolist()
    together = metrics.bootstrap_mean(values, images)
    apart = metrics.bootstrap_mean(values, [str(i) for i in range(1000)])
    assert together.high - together.low > 3 * (apart.high - apart.low)


def test_bootstrap_is_the_same_every_time_and_for_any_order_of_rows() -> None:
    values = np.random.default_rng(2).integers(0, 100, size=60).astype(float)
    groups = [f"image-{i // 3}" for i in range(60)]
    first = metrics.bootstrap_mean(values, groups)
    order = np.random.default_rng(3).permutation(60)
    assert first == metrics.bootstrap_mean(values, groups)
    assert first == metrics.bootstrap_mean(values[order], [groups[i] for i in order])


def test_paired_difference_is_narrower_than_two_separate_intervals() -> None:
    generator = np.random.default_rng(4)
    hard = generator.gamma(2.0, 10.0, size=300)
    a, b = hard + generator.normal(0, 1, 300), hard + 1.0 + generator.normal(0, 1, 300)
    groups = [str(i) for i in range(300)]
    paired = metrics.paired_difference(a, b, groups)
    alone = metrics.bootstrap_mean(a, groups)
    assert paired.high < 0 and paired.high - paired.low < (alone.high - alone.low) / 4


def test_paired_difference_refuses_different_questions() -> None:
    with pytest.raises(ValueError, match="same questions"):
        metrics.paired_difference(np.zeros(3), np.zeros(4), ["a"] * 3)


@given(st.lists(st.floats(0, 180), max_size=50))
def test_every_value_is_in_exactly_one_bin(values: list[float]) -> None:
    masks = [mask for _, _, mask in metrics.bin_masks(np.array(values), metrics.YAW_EDGES_DEG)]
    assert (np.sum(masks, axis=0) == 1).all()


def test_a_head_that_is_higher_than_its_image_is_among_the_large_ones() -> None:
    *_, (_, _, last) = metrics.bin_masks(np.array([0.05, 1.0, 1.7]), metrics.SIZE_EDGES)
    assert last.tolist() == [False, True, True]
