"""Scores of poses and boxes as pure functions of arrays. Angles in degrees, boxes (x0, y0, x1, y1) in one unit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from shards import pose

Array = NDArray[np.float64]

PERCENTILES = (50, 75, 90, 95)
YAW_EDGES_DEG = (0.0, 45.0, 90.0, 135.0, 180.0)
SIZE_EDGES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 1.0)
"""Edges of the head's height as a share of the image's height."""

RESAMPLES = 2000
NORMAL_ABOVE = 10_000
"""Above so many groups the normal interval says the same in a thousandth of the time."""
_NORMAL_95 = 1.959964
_SEED = 20240601
_CANDIDATES = 512
_TRIED_ON = 20_000
_WEISZFELD_STEPS = 50


def angle_errors_deg(predicted: Array, truth: Array) -> Array:
    """(n, 3) and (n, 3) triples to (n, 3) errors in [0, 180]: the difference modulo a full turn and nothing else."""
    return np.abs(pose.wrap_deg(np.asarray(predicted, dtype=float) - np.asarray(truth, dtype=float)))


def geodesic_errors_deg(predicted: Array, truth: Array) -> Array:
    """(n, 3) and (n, 3) triples (yaw, pitch, roll) to (n,) rotation angles between them."""
    return pose.geodesic_deg(rotations(predicted), rotations(truth))


def axis_errors_deg(predicted: Array, truth: Array) -> Array:
    """(n, 3, 3) and (n, 3, 3) rotations to (n,): mean angle between the three axes of the head, true and predicted.

    Its mean over heads is the MAEV of TriNet (Cao et al., A Vector-based Representation to Enhance Head Pose
    Estimation, WACV 2021).
    """
    cosines = np.einsum("nij,nij->nj", np.asarray(predicted, dtype=float), np.asarray(truth, dtype=float))
    return np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0))).mean(axis=1)


def alignment(predicted: Array, truth: Array) -> Array:
    """The one (3, 3) turn Q of the head's axes for which predicted · Q is nearest to truth, both (n, 3, 3).

    Two data sets rarely mean the same "straight ahead" (arXiv 2401.05807): Q takes out what is constant in that.
    """
    return constant_pose(np.swapaxes(np.asarray(predicted, dtype=float), 1, 2) @ np.asarray(truth, dtype=float))


def rotations(triples_deg: Array) -> Array:
    """(n, 3) yaw, pitch, roll to (n, 3, 3)."""
    triples = np.asarray(triples_deg, dtype=float).reshape(-1, 3)
    return pose.rotation_from_pose(triples[:, 0], triples[:, 1], triples[:, 2])


def iou(a: Array, b: Array) -> Array:
    """(…, 4) and (…, 4) boxes to (…,) intersection over union; a box without area overlaps nothing."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    overlap = np.prod(np.clip(sides, 0.0, None), axis=-1)
    union = _area(a) + _area(b) - overlap
    return np.where(overlap > 0, overlap / np.where(union > 0, union, 1.0), 0.0)


def _area(boxes: Array) -> Array:
    return np.prod(np.clip(boxes[..., 2:] - boxes[..., :2], 0.0, None), axis=-1)


def constant_pose(truth: Array) -> Array:
    """The (3, 3) rotation whose mean geodesic distance to (n, 3, 3) truths is smallest, to a fraction of a degree.

    Best of identity, chordal mean and a spread of the truths themselves, then refined by Weiszfeld steps (geometric
    median on the rotation group). Fitted on the very heads it is judged on, it is a floor that no honest constant
    answer beats: optimistic on purpose.
    """
    truth = np.asarray(truth, dtype=float)
    if len(truth) == 0:
        return np.eye(3)
    spread = _spread(truth, _CANDIDATES)
    candidates = np.concatenate([np.eye(3)[None], Rotation.from_matrix(truth).mean().as_matrix()[None], spread])
    some = _spread(truth, _TRIED_ON)
    best = min(candidates, key=lambda candidate: float(pose.geodesic_deg(candidate, some).mean()))
    cost, scale = pose.geodesic_deg(best, truth).mean(), 1.0
    for _ in range(_WEISZFELD_STEPS):
        step = best @ Rotation.from_rotvec(scale * _weiszfeld_step(best, truth)).as_matrix()
        step_cost = pose.geodesic_deg(step, truth).mean()
        if step_cost < cost:
            best, cost = step, step_cost
        else:
            scale /= 2.0  # too far for this curved and many-valleyed cost
    return best


def _spread(rows: Array, n: int) -> Array:
    """At most `n` of the rows, evenly over them."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, n).astype(int))]


def _weiszfeld_step(centre: Array, truth: Array) -> Array:
    """(3,) rotation vector towards the geometric median; a truth at the centre itself has no direction to add."""
    towards = Rotation.from_matrix(centre.T @ truth).as_rotvec()
    distance = np.linalg.norm(towards, axis=1)
    away = distance > 1e-6
    if not away.any():
        return np.zeros(3)
    weights = 1.0 / distance[away]
    return (weights[:, None] * towards[away]).sum(axis=0) / weights.sum()


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval; `n` values went into it."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap_mean(values: Array, groups: Sequence[str], resamples: int = RESAMPLES, seed: int = _SEED) -> Estimate:
    """Mean of (n,) values and its 95 % percentile interval, resampling groups (images) rather than values.

    Heads of one image share light, camera and often a person: to draw them one by one would give too narrow an
    interval. The seed is fixed, so equal input gives equal output. Of more than NORMAL_ABOVE groups it is the normal
    interval of a ratio of sums (Cochran, Sampling Techniques, §6.4). Raises ValueError without values.
    """
    sums, counts = _per_group(values, groups)
    if len(sums) > NORMAL_ABOVE:
        mean = sums.sum() / counts.sum()
        half = _NORMAL_95 * np.sqrt(np.square(sums - mean * counts).sum()) / counts.sum()
        return Estimate(float(mean), float(mean - half), float(mean + half), int(counts.sum()))
    means = _resampled(lambda pick: sums[pick].sum(axis=1) / counts[pick].sum(axis=1), len(sums), resamples, seed)
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high), int(counts.sum()))


def paired_difference(
    a: Array, b: Array, groups: Sequence[str], resamples: int = RESAMPLES, seed: int = _SEED
) -> Estimate:
    """Mean of a - b and its 95 % interval; `a` and `b` are (n,) scores of two systems on the same n questions."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"paired scores need the same questions: {a.shape} and {b.shape}")
    return bootstrap_mean(a - b, groups, resamples, seed)


def _per_group(values: Array, groups: Sequence[str]) -> tuple[Array, Array]:
    values = np.asarray(values, dtype=float)
    if len(values) == 0 or len(values) != len(groups):
        raise ValueError(f"{len(values)} values and {len(groups)} groups: at least one value and one group for each")
    _, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return np.bincount(index, weights=values).astype(np.float64), np.bincount(index).astype(np.float64)


def _resampled(statistic: Callable[[NDArray[np.int64]], Array], n: int, resamples: int, seed: int) -> Array:
    """`statistic` of (b, n) index draws, in blocks so that a large set does not need resamples × n at once."""
    generator = np.random.Generator(np.random.PCG64(seed))
    block = max(1, min(resamples, 4_000_000 // n))
    parts = [
        statistic(generator.integers(0, n, size=(min(block, resamples - start), n)))
        for start in range(0, resamples, block)
    ]
    return np.concatenate(parts)


def bin_masks(values: Array, edges: Sequence[float]) -> list[tuple[float, float, NDArray[np.bool_]]]:
    """(low, high, mask) of each bin [low, high); the last takes all above: a head may be higher than its image."""
    values = np.asarray(values, dtype=float)
    last = len(edges) - 2
    return [
        (low, high, (values >= low) & (True if i == last else values < high))
        for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True))
    ]
