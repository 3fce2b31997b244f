"""From prediction rows to metrics.json: a pure function of the rows, whatever the ranks that made them.

A row is one line of predictions.jsonl: `{id, task, key, …, truth, text, kind, parsed, errors}`. No answer is left
out: every share is of all questions, and `all` charges an answer that is no pose with the constant pose's error.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvlm_hpe.evaluate import metrics
from cogvlm_hpe.evaluate.metrics import Array
from shards import pose

Row = dict[str, Any]
Mask = NDArray[np.bool_]
KINDS = ("pose", "box", "blended", "out_of_range", "other")
ANGLES = ("yaw", "pitch", "roll")
IOU_HIT = 0.5
_DIGITS = 6
_NARROW_DEG = 90.0
_AFLW2000_DEG = 99.0


def is_aflw2000(info: Mapping[str, Any]) -> bool:
    """Whether a set, by its index.json, is AFLW2000 without the faces that published numbers leave out."""
    scope = info.get("scope") or {}
    return info.get("source") == "aflw2000" and bool(scope.get("max_angle_deg", np.inf) <= _AFLW2000_DEG)


def summarise(rows: Iterable[Row], aflw2000: bool = False) -> dict[str, Any]:
    """Scores per task: `{"pose": …, "where": …, "what": …, "facing": …, "tags": …}` for the tasks that were asked.

    aflw2000: the protocol of that name is the whole set, which was chosen by the angles in its files. Those of the
    stored rotations are other ones where the file's pitch is beyond 90 degrees.
    """
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    scorers: dict[str, Callable[[list[Row]], dict[str, Any]]] = {
        "pose": partial(_pose_scores, aflw2000=aflw2000),
        "where": _where_scores,
        "what": _exact_scores,
        "facing": _exact_scores,
        "tags": _exact_scores,
    }
    return {task: _rounded(scorers[task](by_task[task])) for task in scorers if task in by_task}


def format_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Share of each kind (docs/answers.md) among all answers."""
    return {kind: sum(row["kind"] == kind for row in rows) / len(rows) for kind in KINDS}


def pose_triples(rows: Sequence[Row], field: str) -> Array:
    """(n, 3) degrees of `truth` or `parsed`; rows without one give NaN."""
    empty = dict.fromkeys(ANGLES, np.nan)
    return np.array([[(row[field] or empty)[angle] for angle in ANGLES] for row in rows], dtype=float).reshape(-1, 3)


def charged_triples(rows: Sequence[Row]) -> tuple[Array, Array]:
    """(n, 3) predictions with the constant pose where there is none, and that (3,) constant pose, in degrees."""
    truth, predicted = pose_triples(rows, "truth"), pose_triples(rows, "parsed")
    constant = pose.pose_from_rotation(metrics.constant_pose(metrics.rotations(truth)))
    return np.where(np.isnan(predicted), constant, predicted), constant


def _pose_scores(rows: list[Row], aflw2000: bool) -> dict[str, Any]:
    groups = [row["key"] for row in rows]
    truth, predicted = pose_triples(rows, "truth"), pose_triples(rows, "parsed")
    charged, constant = charged_triples(rows)
    valid = np.isfinite(predicted.sum(axis=1))
    error = metrics.geodesic_errors_deg(charged, truth)
    floor = metrics.geodesic_errors_deg(np.broadcast_to(constant, truth.shape), truth)
    sizes = np.array([row["head_height"] for row in rows])
    return {
        "n": len(rows),
        "n_valid": int(valid.sum()),
        "format": format_shares(rows),
        "valid": _errors(predicted[valid], truth[valid], _chosen(groups, valid)),
        "all": _errors(charged, truth, groups),
        "constant_pose": {
            "pose": dict(zip(ANGLES, constant.tolist(), strict=True)),
            **_errors(np.broadcast_to(constant, truth.shape), truth, groups),
        },
        "protocols": _protocols(charged, truth, valid, groups, aflw2000),
        "aligned": _aligned(predicted[valid], truth[valid], _chosen(groups, valid)),
        "front_back": _front_back(predicted, truth),
        "by_yaw": _bins(np.abs(truth[:, 0]), metrics.YAW_EDGES_DEG, error, floor, groups),
        "by_size": _bins(sizes, metrics.SIZE_EDGES, error, floor, groups),
    }


def _protocols(charged: Array, truth: Array, valid: Mask, groups: list[str], aflw2000: bool) -> dict[str, Any]:
    """Errors on the parts of a set that published numbers are about; all of it is DirectMHP's `full`."""
    yaw = np.abs(truth[:, 0])
    parts = {
        "narrow": yaw < _NARROW_DEG,
        "backward": yaw > _NARROW_DEG,
        "aflw2000": np.full(len(truth), True) if aflw2000 else np.abs(truth).max(axis=1) <= _AFLW2000_DEG,
    }
    return {
        name: {
            "n": int(part.sum()),
            "n_valid": int((part & valid).sum()),
            "valid": _errors(charged[part & valid], truth[part & valid], _chosen(groups, part & valid)),
            "all": _errors(charged[part], truth[part], _chosen(groups, part)),
        }
        for name, part in parts.items()
    }


def _aligned(predicted: Array, truth: Array, groups: list[str]) -> dict[str, Any]:
    """Errors of valid answers after the one turn of the head's axes that suits them best, and that turn's angle."""
    if len(truth) == 0:
        return {"turn_deg": None, **_errors(predicted, truth, groups)}
    before = metrics.rotations(predicted)
    turn = metrics.alignment(before, metrics.rotations(truth))
    return {
        "turn_deg": float(pose.geodesic_deg(turn, np.eye(3))),
        **_errors(pose.pose_from_rotation(before @ turn), truth, groups),
    }


def _front_back(predicted: Array, truth: Array) -> dict[str, dict[str, int]]:
    """Heads that face the camera or not (rows), by what was answered (columns)."""
    answered = np.where(np.isnan(predicted[:, 0]), "none", _sides(predicted))
    true = _sides(truth)
    return {
        side: {said: int(((true == side) & (answered == said)).sum()) for said in ("front", "back", "none")}
        for side in ("front", "back")
    }


def _sides(triples: Array) -> NDArray[np.str_]:
    return np.where(np.abs(triples[:, 0]) <= _NARROW_DEG, "front", "back")


def _chosen(groups: list[str], mask: Mask) -> list[str]:
    return [group for group, inside in zip(groups, mask.tolist(), strict=True) if inside]


def _errors(predicted: Array, truth: Array, groups: list[str]) -> dict[str, Any]:
    """Geodesic and per-angle errors of (n, 3) triples; nulls when there is none."""
    if len(truth) == 0:
        empty = {"mean": None, "ci95": None}
        return {
            "geodesic": {**empty, "median": None, **{f"p{p}": None for p in metrics.PERCENTILES}},
            "mae": {**dict.fromkeys(ANGLES), **empty},
            "maev": empty,
        }
    geodesic = metrics.geodesic_errors_deg(predicted, truth)
    angles = metrics.angle_errors_deg(predicted, truth)
    percentiles = zip(metrics.PERCENTILES, np.percentile(geodesic, metrics.PERCENTILES), strict=True)
    return {
        "geodesic": {
            **_estimate(geodesic, groups),
            "median": float(np.median(geodesic)),
            **{f"p{p}": float(value) for p, value in percentiles},
        },
        "mae": {
            **dict(zip(ANGLES, angles.mean(axis=0).tolist(), strict=True)),
            **_estimate(angles.mean(axis=1), groups),
        },
        "maev": _estimate(metrics.axis_errors_deg(metrics.rotations(predicted), metrics.rotations(truth)), groups),
    }


def _bins(values: Array, edges: Sequence[float], error: Array, floor: Array, groups: list[str]) -> list[dict[str, Any]]:
    result = []
    for low, high, mask in metrics.bin_masks(values, edges):
        inside = _chosen(groups, mask)
        scores: dict[str, Any] = {"geodesic_mean": None, "ci95": None, "constant_pose": None}
        if inside:
            estimate = _estimate(error[mask], inside)
            scores = {
                "geodesic_mean": estimate["mean"],
                "ci95": estimate["ci95"],
                "constant_pose": float(floor[mask].mean()),
            }
        result.append({"from": low, "to": high, "n": len(inside), **scores})
    return result


def _where_scores(rows: list[Row]) -> dict[str, Any]:
    """An answer without a valid box overlaps nothing: IoU 0, counted."""
    groups = [row["key"] for row in rows]
    overlap = np.array([row["errors"]["iou"] if row["errors"] else 0.0 for row in rows])
    return {
        "n": len(rows),
        "n_valid": sum(row["kind"] == "box" for row in rows),
        "format": format_shares(rows),
        "iou": _estimate(overlap, groups),
        "accuracy": _estimate((overlap >= IOU_HIT).astype(float), groups),
    }


def _exact_scores(rows: list[Row]) -> dict[str, Any]:
    groups = [row["key"] for row in rows]
    exact = np.array([row["errors"]["exact"] for row in rows], dtype=float)
    return {"n": len(rows), "format": format_shares(rows), "accuracy": _estimate(exact, groups)}


def _estimate(values: Array, groups: list[str]) -> dict[str, Any]:
    estimate = asdict(metrics.bootstrap_mean(values, groups))
    return {"mean": estimate["mean"], "ci95": [estimate["low"], estimate["high"]]}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS) + 0.0
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value
