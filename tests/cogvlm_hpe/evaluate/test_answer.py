"""The expected pose behind an answer's digits, and where an answer is cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvlm_hpe.evaluate.answer import expected_pose, longest_answer
from cogvlm_hpe.model.folders import resolve_base
from cogvlm_hpe.model.tokenizer import load_tokenizer


def probabilities(*weights: dict[int, float]) -> np.ndarray:
    """(3, 361) from {code: weight} of yaw, pitch and roll."""
    out = np.zeros((3, 361))
    for row, codes in zip(out, weights, strict=True):
        for code, weight in codes.items():
            row[code] = weight
    return out


@given(st.integers(0, 360), st.integers(0, 180), st.integers(0, 360))
def test_all_weight_on_one_code_is_that_pose_for_certain(yaw: int, pitch: int, roll: int) -> None:
    pose_deg, confidence = expected_pose(probabilities({yaw: 1.0}, {pitch: 1.0}, {roll: 1.0}))
    turned = [180.0 if code % 360 == 0 else code % 360 - 180.0 for code in (yaw, roll)]
    assert pose_deg == pytest.approx((turned[0], pitch - 90.0, turned[1]), abs=1e-6)
    assert -180.0 < pose_deg[0] <= 180.0
    assert confidence == pytest.approx(1.0)


def test_codes_on_both_sides_of_the_back_of_the_head_do_not_average_to_its_front() -> None:
    pose_deg, confidence = expected_pose(probabilities({1: 0.5, 359: 0.5}, {90: 1.0}, {180: 1.0}))
    assert abs(pose_deg[0]) == pytest.approx(180.0)
    assert confidence == pytest.approx(np.cos(np.deg2rad(1.0)))


def test_pitch_is_a_plain_mean_over_its_own_range() -> None:
    pose_deg, confidence = expected_pose(probabilities({180: 1.0}, {60: 0.25, 120: 0.25, 300: 0.5}, {180: 1.0}))
    assert pose_deg[1] == pytest.approx(0.0)
    assert confidence == pytest.approx(np.cos(np.deg2rad(30.0)))


def test_a_flat_distribution_has_no_confidence() -> None:
    flat = np.zeros((3, 361))
    flat[:, :360] = 1 / 360
    assert expected_pose(flat)[1] < 1e-9


def test_a_cut_leaves_room_for_both_formats_and_never_exceeds_the_limit() -> None:
    tokenizer = load_tokenizer(resolve_base("tiny"))
    blend = len(tokenizer.encode("{{123,090,270}}[[100,200,300,400]]", add_special_tokens=False).ids)
    assert blend < longest_answer(tokenizer, "pose", 1000) < 3 * blend
    assert longest_answer(tokenizer, "pose", 5) == 5
    assert longest_answer(tokenizer, "what", 77) == 77
