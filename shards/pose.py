"""Rotation matrices and yaw, pitch, roll; augmentation on matrices, never on triples.

Camera frame as in OpenCV: x right, y down, z into the scene. `M` turns the head's axes into the camera's:
`M(yaw, pitch, roll) = Rx(-pitch) · Ry(yaw) · Rz(roll)`; M = I looks straight into the camera, upright. For small
angles yaw > 0 looks to the image's left, pitch > 0 up, roll > 0 tilts clockwise in the image. It is the convention of
300W-LP / AFLW2000 (3DDFA), WHENet, DirectMHP's AGORA-HPE and CMU-HPE labels and of `draw_axis`.

Ranges: yaw and roll in (-180, 180], |pitch| <= 90; each rotation has one such triple, apart from gimbal lock
(yaw = ±90), where roll is given as 0, or as 180 where pitch could not stay within ±90 otherwise.
Pitch is the outermost turn: seen from behind (|yaw| > 90) a head with pitch > 0 looks down, as in the public labels.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Array = NDArray[np.float64]

HEAD_TO_CAMERA = np.diag([1.0, -1.0, -1.0])
"""Head frame (x to the subject's left, y up, z out of the face) to camera axes for M = I."""

_GIMBAL = 1e-6
_FLIP = np.diag([-1.0, 1.0, 1.0])


def rotation_from_pose(yaw_deg: float | Array, pitch_deg: float | Array, roll_deg: float | Array) -> Array:
    """(…,) degrees each to (…, 3, 3): Rx(-pitch) · Ry(yaw) · Rz(roll)."""
    yaw, pitch, roll = np.broadcast_arrays(yaw_deg, pitch_deg, roll_deg)
    triples = np.stack([-pitch, yaw, roll], axis=-1).astype(float)
    matrices = Rotation.from_euler("XYZ", triples.reshape(-1, 3), degrees=True).as_matrix()
    return matrices.reshape(*triples.shape[:-1], 3, 3)


def pose_from_rotation(rotation: Array) -> Array:
    """(…, 3, 3) to (…, 3) degrees: yaw, pitch, roll over the full range."""
    m = np.asarray(rotation, dtype=float)
    sin_yaw = np.clip(m[..., 0, 2], -1.0, 1.0)
    cos_yaw = np.hypot(m[..., 0, 0], m[..., 0, 1])
    locked = cos_yaw < _GIMBAL
    pitch = np.where(locked, np.arctan2(-m[..., 2, 1], m[..., 1, 1]), np.arctan2(m[..., 1, 2], m[..., 2, 2]))
    # The second solution, yaw beyond ±90, is the one whose pitch stays within ±90.
    beyond = np.abs(pitch) > np.pi / 2
    pitch = np.where(beyond, pitch - np.copysign(np.pi, pitch), pitch)
    yaw = np.arctan2(sin_yaw, np.where(beyond, -cos_yaw, cos_yaw))
    yaw = np.where(locked, np.copysign(np.pi / 2, sin_yaw), yaw)
    # Roll is what is left of M once pitch is undone, not a second reading of row 0: near gimbal lock pitch is
    # mostly noise, and only so does roll take up the same noise and give the same matrix back.
    sin_roll = np.cos(pitch) * m[..., 1, 0] - np.sin(pitch) * m[..., 2, 0]
    cos_roll = np.cos(pitch) * m[..., 1, 1] - np.sin(pitch) * m[..., 2, 1]
    return wrap_deg(np.degrees(np.stack([yaw, pitch, np.arctan2(sin_roll, cos_roll)], axis=-1)))


def wrap_deg(angle_deg: float | Array) -> Array:
    """Any angle in degrees to (-180, 180]."""
    return 180.0 - np.mod(180.0 - np.asarray(angle_deg, dtype=float), 360.0)


def geodesic_deg(a: Array, b: Array) -> Array:
    """Angle in degrees of the rotation between (…, 3, 3) and (…, 3, 3), within [0, 180].

    2·asin(|A - B|_F / (2·√2)), which equals acos((tr(AᵀB) - 1) / 2) and keeps its digits near zero.
    """
    distance = np.linalg.norm(np.asarray(a) - np.asarray(b), axis=(-2, -1))
    return np.degrees(2.0 * np.arcsin(np.clip(distance / (2.0 * np.sqrt(2.0)), 0.0, 1.0)))


def is_rotation(matrix: Array, tolerance: float = 1e-4) -> NDArray[np.bool_]:
    """(…,) whether each of the (…, 3, 3) matrices is orthonormal with determinant +1; not finite: False."""
    m = np.asarray(matrix, dtype=float)
    with np.errstate(invalid="ignore"):
        gaps = np.abs(m @ np.swapaxes(m, -1, -2) - np.eye(3)).max(axis=(-1, -2))
        return np.asarray((gaps <= tolerance) & (np.linalg.det(m) > 0))


def flip_rotation(rotation: Array) -> Array:
    """The pose of a head in the image mirrored left to right: F · M · F, that is (-yaw, pitch, -roll). Exact."""
    return _FLIP @ rotation @ _FLIP


def rotate_rotation(rotation: Array, clockwise_deg: float) -> Array:
    """The pose of a head in the image turned clockwise about its ray: Rz(a) · M (not "roll += a")."""
    return Rotation.from_euler("Z", clockwise_deg, degrees=True).as_matrix() @ rotation


def ray_relative(rotation: Array, ray: Array) -> Array:
    """(…, 3, 3) in camera axes and the head's viewing ray (…, 3) to the pose relative to that ray.

    The smallest rotation that turns the ray into the optical axis is put before M: what a crop of the head shows.
    """
    unit = np.asarray(ray, dtype=float)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    axis = np.cross(unit, [0.0, 0.0, 1.0])
    sine = np.linalg.norm(axis, axis=-1, keepdims=True)
    angle = np.arctan2(sine, unit[..., 2:3])
    turn = Rotation.from_rotvec((axis / np.maximum(sine, 1e-12) * angle).reshape(-1, 3)).as_matrix()
    return turn.reshape(*unit.shape[:-1], 3, 3) @ rotation


def from_3ddfa(rotation: Array) -> Array:
    """Matrices of 3DDFA / 300W-LP and of WHENet's and DirectMHP's `rotate_zyx` (y up) to M: S · R · S."""
    return HEAD_TO_CAMERA @ rotation @ HEAD_TO_CAMERA


def from_6drepnet(rotation: Array) -> Array:
    """6DRepNet's Rz(r) · Ry(y) · Rx(p) to M: S · Rᵀ · S. Its own inverse: the same call turns M into 6DRepNet's."""
    return HEAD_TO_CAMERA @ np.swapaxes(rotation, -1, -2) @ HEAD_TO_CAMERA


def from_head_to_camera(rotation: Array) -> Array:
    """Rotation of head axes (y up, z out of the face; FLAME, DAD-3DHeads) to OpenCV camera axes, to M: R · S.

    BIWI's and img2pose's matrices are M already and need no call.
    """
    return np.asarray(rotation, dtype=float) @ HEAD_TO_CAMERA


def from_6d(columns: Array) -> Array:
    """(…, 6), the first two columns of a matrix in one row, not yet orthonormal, to (…, 3, 3)."""
    first, second = np.asarray(columns, dtype=float)[..., :3], np.asarray(columns, dtype=float)[..., 3:]
    x = first / np.linalg.norm(first, axis=-1, keepdims=True)
    z = np.cross(x, second)
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    return np.stack([x, np.cross(z, x), z], axis=-1)
