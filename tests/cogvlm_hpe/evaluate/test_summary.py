"""metrics.json from rows: nothing dropped, nothing hidden."""

import json
import math

import numpy as np
import pytest

from cogvlm_hpe.evaluate import summary


def pose_row(i: int, truth: tuple, parsed: tuple | None, kind: str | None = None) -> dict:
    def named(values: tuple | None) -> dict | None:
        return dict(zip(summary.ANGLES, values, strict=True)) if values else None

    return {
        "id": f"{i:04d}/head-0",
        "key": f"{i:04d}",
        "task": "pose",
        "truth": named(truth),
        "parsed": named(parsed),
        "kind": kind or ("pose" if parsed else "other"),
        "head_height": 0.25,
        "text": "",
        "errors": None,
    }


@pytest.fixture
def poses() -> list[dict]:
    generator = np.random.default_rng(0)
    rows = []
    for i in range(40):
        truth = (*generator.uniform((-180, -60), (180, 60)).tolist(), float(generator.uniform(-40, 40)))
        rows.append(pose_row(i, truth, tuple(v + 5.0 for v in truth)))
    return rows


def test_perfect_answers_score_zero(poses: list[dict]) -> None:
    for row in poses:
        row["parsed"] = row["truth"]
    got = summary.summarise(poses)["pose"]
    assert got["valid"]["geodesic"]["mean"] == got["all"]["mae"]["mean"] == 0.0
    assert got["n"] == got["n_valid"] == 40


def test_a_known_offset_gives_that_mae(poses: list[dict]) -> None:
    got = summary.summarise(poses)["pose"]["valid"]["mae"]
    assert got["yaw"] == got["pitch"] == got["roll"] == pytest.approx(5.0)


def test_invalid_answers_cost_the_constant_pose_and_are_counted(poses: list[dict]) -> None:
    for row in poses[:10]:
        row.update(parsed=None, kind="blended")
    for row in poses[10:15]:
        row.update(parsed=None, kind="box")
    got = summary.summarise(poses)["pose"]
    assert (got["n"], got["n_valid"]) == (40, 25)
    assert got["format"] == {"pose": 0.625, "box": 0.125, "blended": 0.25, "out_of_range": 0.0, "other": 0.0}
    truth, constant = _rotations(poses, "truth"), _rotation(got["constant_pose"]["pose"])
    charged = [
        _angle(constant if row["parsed"] is None else _rotation(row["parsed"]), t)
        for row, t in zip(poses, truth, strict=True)
    ]
    assert got["all"]["geodesic"]["mean"] == pytest.approx(np.mean(charged), abs=1e-4)
    assert got["valid"]["geodesic"]["mean"] == pytest.approx(np.mean(charged[15:]), abs=1e-4)


def test_no_valid_answer_gives_nulls_and_the_constant_poses_score(poses: list[dict]) -> None:
    for row in poses:
        row.update(parsed=None, kind="box")
    got = summary.summarise(poses)["pose"]
    assert got["valid"]["geodesic"]["mean"] is None and got["valid"]["mae"]["yaw"] is None
    assert got["all"]["geodesic"] == got["constant_pose"]["geodesic"]
    assert "NaN" not in json.dumps(got)


def test_bins_hold_every_head_once(poses: list[dict]) -> None:
    got = summary.summarise(poses)["pose"]
    assert sum(b["n"] for b in got["by_yaw"]) == sum(b["n"] for b in got["by_size"]) == 40
    assert [b["from"] for b in got["by_yaw"]] == [0, 45, 90, 135]


def test_a_set_of_aflw2000_is_the_published_one_where_it_was_filtered() -> None:
    for source, scope, wanted in (
        ("aflw2000", {"max_angle_deg": 99.0}, True),
        ("aflw2000", {"max_angle_deg": 180.0}, False),
        ("aflw2000", {}, False),
        ("300w-lp", {"max_angle_deg": 99.0}, False),
    ):
        assert summary.is_aflw2000({"source": source, "scope": scope}) is wanted


def test_protocols_are_the_parts_they_name(poses: list[dict]) -> None:
    poses += [pose_row(40 + i, (yaw, 0.0, roll), None) for i, (yaw, roll) in enumerate([(90.0, 0.0), (99.0, 99.0)])]
    poses += [pose_row(42, (0.0, 0.0, 99.5), (0.0, 0.0, 99.5))]
    got = summary.summarise(poses)["pose"]
    yaw = np.abs([row["truth"]["yaw"] for row in poses])
    assert got["protocols"]["narrow"]["n"] == (yaw < 90).sum()
    assert got["protocols"]["backward"]["n"] == (yaw > 90).sum()
    assert got["protocols"]["aflw2000"]["n"] == sum(max(map(abs, row["truth"].values())) <= 99 for row in poses)
    whole = summary.summarise(poses, aflw2000=True)["pose"]
    assert whole["protocols"]["aflw2000"]["n"] == len(poses)
    assert whole["protocols"]["narrow"] == got["protocols"]["narrow"]
    narrow = [row for row in poses if abs(row["truth"]["yaw"]) < 90 and row["parsed"]]
    assert got["protocols"]["narrow"]["n_valid"] == len(narrow)
    alone = summary.summarise(narrow)["pose"]["valid"]
    assert got["protocols"]["narrow"]["valid"]["geodesic"] == alone["geodesic"]
    # Who is charged the constant pose is charged the set's one, whatever the part.
    charged = summary.charged_triples(poses)[0][yaw > 90]
    truth = summary.pose_triples(poses, "truth")[yaw > 90]
    assert any(abs(row["truth"]["yaw"]) > 90 and not row["parsed"] for row in poses)
    errors = summary.metrics.geodesic_errors_deg(charged, truth)
    assert got["protocols"]["backward"]["all"]["geodesic"]["mean"] == pytest.approx(errors.mean(), abs=1e-4)


def test_alignment_takes_out_a_constant_turn_and_only_that(poses: list[dict]) -> None:
    turn = _rotation({"yaw": 20.0, "pitch": 5.0, "roll": 0.0})
    for row in poses:
        turned = summary.pose.pose_from_rotation(_rotation(row["truth"]) @ turn)
        row["parsed"] = dict(zip(summary.ANGLES, turned.tolist(), strict=True))
    poses[0].update(parsed=None, kind="other")
    got = summary.summarise(poses)["pose"]
    assert got["valid"]["geodesic"]["mean"] == pytest.approx(_angle(turn, np.eye(3)), abs=1e-3)
    assert got["aligned"]["turn_deg"] == pytest.approx(_angle(turn, np.eye(3)), abs=0.01)
    assert got["aligned"]["geodesic"]["mean"] < 0.01 < 5 < got["valid"]["maev"]["mean"]


def test_front_and_back_are_counted_with_the_answers_that_are_no_pose() -> None:
    rows = [
        pose_row(i, (t, 0.0, 0.0), p and (p, 0.0, 0.0)) for i, (t, p) in enumerate([(5, 170), (5, 10), (175, None)])
    ]
    got = summary.summarise(rows)["pose"]["front_back"]
    assert got == {"front": {"front": 1, "back": 1, "none": 0}, "back": {"front": 0, "back": 0, "none": 1}}


def test_grounding_counts_a_missing_box_as_a_miss() -> None:
    def row(i: int, iou: float | None) -> dict:
        return {
            "id": str(i),
            "key": str(i),
            "task": "where",
            "kind": "other" if iou is None else "box",
            "errors": None if iou is None else {"iou": iou},
        }

    got = summary.summarise([row(0, 0.9), row(1, 0.5), row(2, 0.2), row(3, None)])["where"]
    assert got["accuracy"]["mean"] == 0.5
    assert got["iou"]["mean"] == pytest.approx(0.4)
    assert (got["n"], got["n_valid"]) == (4, 3)


def test_order_of_rows_does_not_change_the_summary(poses: list[dict]) -> None:
    shuffled = [poses[i] for i in np.random.default_rng(1).permutation(40)]
    a, b = summary.summarise(poses)["pose"], summary.summarise(shuffled)["pose"]
    assert a["all"]["geodesic"]["median"] == b["all"]["geodesic"]["median"]
    for first, second in zip(a["by_yaw"], b["by_yaw"], strict=True):
        assert first["n"] == second["n"] and first["ci95"] == second["ci95"]
        assert first["constant_pose"] == pytest.approx(second["constant_pose"], abs=1e-3)


def _rotation(pose_deg: dict) -> np.ndarray:
    y, p, r = (math.radians(pose_deg[a]) for a in summary.ANGLES)
    rx = np.array([[1, 0, 0], [0, math.cos(-p), -math.sin(-p)], [0, math.sin(-p), math.cos(-p)]])
    ry = np.array([[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]])
    rz = np.array([[math.cos(r), -math.sin(r), 0], [math.sin(r), math.cos(r), 0], [0, 0, 1]])
    return rx @ ry @ rz


def _rotations(rows: list[dict], field: str) -> list[np.ndarray]:
    return [_rotation(row[field]) for row in rows]


def _angle(a: np.ndarray, b: np.ndarray) -> float:
    return math.degrees(math.acos(np.clip((np.trace(a.T @ b) - 1) / 2, -1, 1)))
