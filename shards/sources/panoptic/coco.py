"""The published CMU-HPE labels: DirectMHP's JSON of frames it took from the HD videos."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from shards.sources import posed

NAME = "panoptic"
LICENCE = "CMU Panoptic Studio: non-commercial research (see its site)"
_NUMBERED = (
    *("171204_pose3", "171026_pose3", "170221_haggling_b3", "170221_haggling_m3", "170224_haggling_a3"),
    *("170228_haggling_b1", "170404_haggling_a1", "170407_haggling_a2", "170407_haggling_b2", "171026_cello3"),
    *("161029_piano4", "160422_ultimatum1", "160224_haggling1", "170307_dance5", "160906_ian1", "170915_office1"),
    "160906_pizza1",
)
_FIRST_ID, _IDS_PER_SEQUENCE = 10_000_000_000, 100_000_000


def from_coco(options: argparse.Namespace) -> posed.PosedImages:
    """All images of the JSON, which knows no cameras. Raises UserError."""
    return posed.from_coco(options, NAME, LICENCE, f"*_{options.split}*.json", _subject, lambda image: None)


def subject_of_sequence(sequence: str) -> str:
    """Who is in a sequence is not known across sequences."""
    return f"panoptic/{sequence}"


def _subject(path: Path, image: Mapping[str, Any]) -> str:
    if "seq" in image:
        return subject_of_sequence(str(image["seq"]))
    number = (int(image["id"]) - _FIRST_ID) // _IDS_PER_SEQUENCE - 1
    if not 0 <= number < len(_NUMBERED):
        rule = "it tells which images must stay together"
        raise UserError(f"{path}: image {image['id']} has neither seq nor an id of CMU-HPE; {rule}")
    return subject_of_sequence(_NUMBERED[number])
