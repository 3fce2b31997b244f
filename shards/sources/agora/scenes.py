"""Where AGORA's cameras and people are: the image's name tells the kind of scene, the scene tells the camera.

The table of scenes and the order of the rotations are those of agora_evaluation/projection.py of AGORA's authors. The
world is Unreal's (x forward, y right, z up, cm); here it has axes as a camera's (x right, y down, z forward, m).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from shards.record import Camera

Array = NDArray[np.float64]

SENSOR_MM = (36.0, 20.25)
SMPL_TO_CAMERA_AXES = np.diag([1.0, -1.0, -1.0])
_SCAN_YAW_DEG = -90.0


@dataclass(frozen=True)
class Scene:
    """Camera of a kind of scene; `ground_m` (x right, y down, z forward) is added to its position."""

    focal_mm: float
    position_cm: tuple[float, float, float]
    yaw_deg: float
    pitch_deg: float
    ground_m: tuple[float, float, float] = (0.0, 0.0, 0.0)


_BY_NAME = {
    "hdri": Scene(50, (0, 0, 170), 0, 0),
    "cam00": Scene(18, (400, -275, 265), 135, 30),
    "cam01": Scene(18, (400, 225, 265), -135, 30),
    "cam02": Scene(18, (-490, 170, 265), -45, 30),
    "cam03": Scene(18, (-490, -275, 265), 45, 30),
    "ag2": Scene(28, (0, 0, 170), 0, 15),
}
_FOCAL_MM = 28.0
_GROUND_M = (0.0, -1.7, 0.0)


def scene_of(image_name: str, row: Mapping[str, Any]) -> Scene:
    """The scene of an image; row: its camX, camY, camZ (cm) and camYaw (degrees), used where the name tells nothing."""
    for word, scene in _BY_NAME.items():
        if word in image_name:
            return scene
    x, y, z = (float(row[name]) for name in ("camX", "camY", "camZ"))
    return Scene(_FOCAL_MM, (x, y, z), float(row["camYaw"]), 0.0, _GROUND_M)


def camera_of(image_name: str, size: tuple[int, int]) -> Camera:
    """Intrinsics in pixels for an image of (width, height)."""
    focal_mm = next((scene.focal_mm for word, scene in _BY_NAME.items() if word in image_name), _FOCAL_MM)
    (width, height), (sensor_width, sensor_height) = size, SENSOR_MM
    return Camera(focal_mm / sensor_width * width, focal_mm / sensor_height * height, width / 2, height / 2)


def person_to_camera(scene: Scene, yaw_deg: float, position_cm: tuple[float, float, float]) -> tuple[Array, Array]:
    """Rotation (3, 3) and shift (3,) in m that take a scan's points to camera axes.

    The points are SMPL-X's times (1, -1, -1), as in the column cam_j3d; the result is DirectMHP's camR and camT.
    """
    view = Rotation.from_euler("x", scene.pitch_deg, degrees=True) * Rotation.from_euler(
        "y", -scene.yaw_deg, degrees=True
    )
    rotation = view * Rotation.from_euler("y", yaw_deg + _SCAN_YAW_DEG, degrees=True)
    shift = view.apply(_turned(position_cm) - (_turned(scene.position_cm) + scene.ground_m))
    return rotation.as_matrix(), shift


def _turned(position_cm: tuple[float, float, float]) -> Array:
    x, y, z = position_cm
    return np.array([y, -z, x], dtype=float) / 100
