"""The published AGORA-HPE labels: DirectMHP's JSON of 1280x720 images."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from shards.record import Camera
from shards.sources import posed
from shards.sources.agora.scenes import camera_of

NAME = "agora"
LICENCE = "AGORA: non-commercial scientific research (see its licence)"
_FRAMES_IN_ID = 100_000
_CAMERA = re.compile(r"_cam0\d$")


def from_coco(options: argparse.Namespace) -> posed.PosedImages:
    """All images of the JSON. Raises UserError."""
    return posed.from_coco(options, NAME, LICENCE, f"*{options.split}*.json", _subject, _camera)


def subject_of_sequence(sequence: str) -> str:
    """The four cameras of one sequence see the same people, so they are one subject."""
    return f"agora/{_CAMERA.sub('', sequence)}"


def _subject(path: Path, image: Mapping[str, Any]) -> str:
    if "seq_key" in image:
        return subject_of_sequence(str(image["seq_key"]))
    number = str(image["id"])
    if not (number.isdigit() and len(number) == 10):
        rule = "it tells which images must stay together"
        raise UserError(f"{path}: image {number} has neither seq_key nor an id of ten digits; {rule}")
    return subject_of_sequence(str(int(number) // _FRAMES_IN_ID))


def _camera(image: Mapping[str, Any]) -> Camera | None:
    if "seq_key" not in image:
        return None
    return camera_of(str(image["seq_key"]), (int(image["width"]), int(image["height"])))
