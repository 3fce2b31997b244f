"""Head pose and box from a face's 3-D landmarks: how AGORA-HPE and CMU-HPE were labelled (WHENet, DirectMHP).

A reference face is laid over the landmarks by the similarity that fits best (Horn 1987, Umeyama 1991); its rotation is
the head's. The box is the picture of a sphere about the reference's head, a "helmet". The reference face of those
works is not ours to pass on. Ours is measured on the mean adult of the CC0 head asset of the synthetic scenes, and
then tilted by `TILT_DEG` so that it looks where theirs looks; whoever has theirs can name its file.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from launcher.errors import UserError
from shards import pose
from shards.record import Camera
from shards.sources.files import Box, clip_box

Array = NDArray[np.float64]

OPENPOSE = (17, 21, 26, 22, 45, 42, 39, 36, 35, 31, 54, 48, 57, 8)
"""Our landmarks by OpenPose's and iBUG's numbers: ends of the brows, corners of the eyes, sides of the nose, corners of
the mouth, lower edge of the lower lip, chin. Right and left are the subject's; 17 is the right brow's outer end."""
SMPLX = tuple(76 + k - 17 for k in OPENPOSE[:13])
"""The same among SMPL-X's 127 joints, of which 76 to 126 are iBUG's landmarks 17 to 67. It has no chin."""

TILT_DEG = 3.1
"""The published reference looks so much further up than ours before it is tilted, as measured on our 13 points."""
_PUBLISHED = (38, 34, 33, 29, 13, 17, 25, 21, 54, 50, 43, 39, 45, 6)
_PUBLISHED_POINTS = 58
_PUBLISHED_CENTRE, _PUBLISHED_RADIUS = (0.0, 5.0, -5.0), 18.0
_OURS_CM = (
    *((-4.96, 1.58, 7.62), (-1.51, 2.07, 9.53), (4.96, 1.58, 7.62), (1.51, 2.07, 9.53)),
    *((4.03, 0.41, 7.82), (1.59, 0.21, 8.16), (-1.59, 0.21, 8.16), (-4.03, 0.41, 7.82)),
    *((1.70, -3.67, 8.62), (-1.70, -3.67, 8.62), (2.47, -6.14, 8.41), (-2.47, -6.14, 8.41)),
    *((0.0, -7.27, 9.23), (0.0, -9.88, 7.63)),
)
_OUR_RADIUS_CM = 14.9  # DirectMHP's sphere, in the scale of our face
_RIM_POINTS = 72
_WIDEST_RATIO, _LARGEST_SHARE = 1.5, 0.7

BEHIND = "behind or at the camera"
ROLLED = "roll of 90 degrees or more"
OUTSIDE = "outside the image"
CUT = "box out of proportion (cut off)"
LARGE = "box too large"


@dataclass(frozen=True)
class Face:
    """A reference: (14, 3) landmarks in the order of OPENPOSE in head axes (x to the subject's left, y up, z out of the
    face), and the sphere about the head, (3,) centre and radius, in the same unit."""

    points: Array
    centre: Array
    radius: float


def reference(path: Path | None = None) -> Face:
    """Our reference face; or the published one from a .npy of (58, 3) or (3, 58) numbers. Raises UserError."""
    if path is None:
        return Face(np.array(_OURS_CM), np.zeros(3), _OUR_RADIUS_CM)
    try:
        points = np.asarray(np.load(path, allow_pickle=False), dtype=float)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --reference names a .npy of the published reference face") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: not a .npy of numbers ({str(error).splitlines()[0]}); save it by numpy.save"
        ) from None
    if points.shape == (3, _PUBLISHED_POINTS):
        points = points.T
    if points.shape != (_PUBLISHED_POINTS, 3) or not np.isfinite(points).all():
        rule = f"the reference face of WHENet and DirectMHP is ({_PUBLISHED_POINTS}, 3), all finite"
        raise UserError(f"{path}: an array of {points.shape}; {rule}")
    return Face(points[list(_PUBLISHED)], np.array(_PUBLISHED_CENTRE), _PUBLISHED_RADIUS)


@dataclass(frozen=True)
class Placed:
    """Where a head is in the landmarks' world: rotation (3, 3) of head axes to the world's, and its sphere."""

    rotation: Array
    centre: Array
    radius: float


def lay(face: Face, landmarks: Array, used: tuple[int, ...] | None = None) -> Placed | None:
    """The similarity that best takes the reference to (K, 3) landmarks, its points `used` (K places) or the first K.

    None where the landmarks do not tell one: not finite, in one line, turned inside out.
    """
    from scipy.spatial.transform import Rotation

    places = list(used) if used is not None else list(range(len(landmarks)))
    model, seen = face.points[places], np.asarray(landmarks, dtype=float)
    if not np.isfinite(seen).all():
        return None
    model_mean, seen_mean = model.mean(0), seen.mean(0)
    model, seen = model - model_mean, seen - seen_mean
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            rotation = Rotation.align_vectors(seen, model)[0].as_matrix()
        except (UserWarning, ValueError):
            return None
    scale = float((seen * (model @ rotation.T)).sum() / (model**2).sum())
    if scale <= 0:
        return None
    centre = seen_mean + scale * rotation @ (face.centre - model_mean)
    return Placed(rotation, centre, scale * face.radius)


@dataclass(frozen=True)
class Lens:
    """Intrinsics K (3, 3) in pixels and OpenCV's distortion (k1, k2, p1, p2, k3)."""

    intrinsics: Array
    distortion: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)

    def project(self, points: Array) -> Array:
        """(N, 3) camera axes to (N, 2) pixels (calib3d of OpenCV's manual)."""
        k1, k2, p1, p2, k3 = self.distortion
        x, y = (points[:, :2] / points[:, 2:]).T
        square = x * x + y * y
        radial = 1 + square * (k1 + square * (k2 + square * k3))
        bent_x = x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x)
        bent_y = y * radial + 2 * p2 * x * y + p1 * (square + 2 * y * y)
        bent = np.stack([bent_x, bent_y, np.ones_like(x)])
        return (self.intrinsics @ bent)[:2].T

    def sees(self, points: Array) -> bool:
        """False where a point is so far off the axis that the distortion's polynomial would fold it back inwards."""
        k1, k2, _, _, k3 = self.distortion
        radius = np.linalg.norm(points[:, :2] / points[:, 2:], axis=1).max()
        square = np.linspace(0.0, radius, 32) ** 2
        return bool((1 + square * (3 * k1 + square * (5 * k2 + square * 7 * k3)) > 0).all())

    @property
    def pinhole(self) -> Camera:
        """The record's camera, which knows no distortion."""
        k = self.intrinsics.tolist()
        return Camera(k[0][0], k[1][1], k[0][2], k[1][2])


def picture_of_sphere(centre: Array, radius: float, lens: Lens) -> Box | None:
    """Bounds in pixels of a sphere in camera axes; None where it is not wholly before the camera or folded back."""
    distance = float(np.linalg.norm(centre))
    if not centre[2] > radius:
        return None
    # What is seen of a sphere ends at the circle where rays touch it.
    share = (radius / distance) ** 2
    across = np.cross(centre, np.eye(3)[np.argmin(np.abs(centre))])
    across /= np.linalg.norm(across)
    upward = np.cross(centre / distance, across)
    turn = 2 * math.pi * np.arange(_RIM_POINTS)[:, None] / _RIM_POINTS
    rim = centre * (1 - share) + radius * math.sqrt(1 - share) * (np.cos(turn) * across + np.sin(turn) * upward)
    if not lens.sees(rim):
        return None
    pixels = lens.project(rim)
    (x0, y0), (x1, y1) = pixels.min(0).tolist(), pixels.max(0).tolist()
    return (x0, y0, x1, y1)


def label(placed: Placed, rotation: Array, shift: Array, lens: Lens, size: tuple[int, int]) -> tuple[Array, Box] | str:
    """M (3, 3) and the clipped box in a camera with x_cam = rotation · x + shift, or why the head is left out.

    size: width and height of the image. The rules and their order are DirectMHP's; a head behind the camera is ours.
    """
    width, height = size
    matrix = pose.from_head_to_camera(rotation @ placed.rotation)
    centre = rotation @ placed.centre + shift
    if not centre[2] > placed.radius:
        return BEHIND
    if abs(float(pose.pose_from_rotation(matrix)[2])) >= 90:
        return ROLLED
    bounds = picture_of_sphere(centre, placed.radius, lens)
    box = bounds and clip_box(bounds, width, height, least_px=1.0)
    if not box:
        return OUTSIDE
    across, down = box[2] - box[0], box[3] - box[1]
    if max(across / down, down / across) >= _WIDEST_RATIO:
        return CUT
    if across >= _LARGEST_SHARE * width or down >= _LARGEST_SHARE * height:
        return LARGE
    return matrix, box
