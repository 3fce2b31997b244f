"""CMU Panoptic Studio (Joo et al., ICCV 2015): people in a dome of cameras, with 3-D faces.

Read are its sequences as the Panoptic Toolbox (github.com/CMU-Perceptual-Computing-Lab/panoptic-toolbox) unpacks them:
calibration_SEQ.json, hdFace3d, and hdImgs or hdVideos; and the COCO-style JSON that DirectMHP makes of them
(github.com/hnuzhy/DirectMHP), the published CMU-HPE. The way from faces to poses and boxes is WHENet's and DirectMHP's.
"""

import argparse
from typing import TYPE_CHECKING

from shards.sources import directmhp

if TYPE_CHECKING:
    from shards.write import Source

TRAIN = (
    *("171204_pose3", "161029_piano4", "160422_ultimatum1", "170307_dance5", "160906_pizza1", "170221_haggling_b3"),
    *("170224_haggling_a3", "170404_haggling_a1", "170407_haggling_b2"),
)
VAL = (
    *("171026_pose3", "171026_cello3", "160224_haggling1", "160906_ian1", "170915_office1", "170221_haggling_m3"),
    *("170228_haggling_b1", "170407_haggling_a2"),
)
SPLITS = {"train": TRAIN, "val": VAL}
"""Sequences of each split, as DirectMHP's CMU-HPE has them."""
HD_CAMERAS = 31
EVERY_FRAMES, LONG_S, LONG_FACTOR = 60, 300.0, 3
LEAST_IMAGE_KB = 100.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hpe-shards build panoptic`."""
    holds = "holds sequences (the official files), or images and annotations (what DirectMHP makes)"
    images = "with DirectMHP's JSON: folder of the images (default: FOLDER/images/SPLIT)"
    directmhp.add_arguments(parser, holds, tuple(SPLITS), "that of CMU-HPE", images)
    own = parser.add_argument_group("sequences")
    text = "take these, whatever their split (default: those of the split that are there)"
    own.add_argument("--sequences", nargs="+", metavar="SEQ", help=text)
    own.add_argument("--cameras", nargs="+", type=int, metavar="N", help="HD cameras, of 0 to 30 (default: all)")
    text = f"one frame in so many, one in {LONG_FACTOR} times so many of sequences longer than {LONG_S / 60:g} minutes"
    own.add_argument("--every", type=int, default=EVERY_FRAMES, metavar="N", help=f"{text} (default: {EVERY_FRAMES})")
    text = f"leave out smaller image files, which are damaged frames (default: {LEAST_IMAGE_KB:g})"
    own.add_argument("--least-image-kb", type=float, default=LEAST_IMAGE_KB, metavar="KB", help=text)
    how = '.venv/bin/pip install -c constraints.txt -e ".[video]"'
    text = f"take frames from hdVideos instead of hdImgs; needs opencv ({how})"
    own.add_argument("--video", action="store_true", help=text)
    directmhp.add_reference(own)


def from_args(options: argparse.Namespace) -> "Source":
    """CMU Panoptic: people in a dome, seen from 31 sides, from its sequences or DirectMHP's JSON."""
    if directmhp.is_meant(options):
        others = {"sequences": None, "cameras": None, "every": EVERY_FRAMES, "least_image_kb": LEAST_IMAGE_KB}
        others |= {"video": False, "reference": None}
        directmhp.refuse_others(options, others, ", or move annotations elsewhere to read the sequences")
        from shards.sources.panoptic.coco import from_coco

        return from_coco(options)
    from shards.sources.panoptic.studio import from_sequences

    return from_sequences(options)
