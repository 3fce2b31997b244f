"""BIWI Kinect Head Pose Database (Fanelli et al., IJCV 2013): 24 sequences of people who turn their heads.

The tree `hpdb` holds `01` … `24` with `frame_XXXXX_rgb.png`, `_depth.bin`, `_pose.txt` (rotation and head centre in mm,
depth camera's axes) and the cameras `rgb.cal` and `depth.cal`.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.write import Source

HEAD_RADIUS_MM = 120.0
"""A sphere of this size about the head centre is our head: BIWI has no boxes. Eyes to crown or chin is 11 to 12 cm."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hpe-shards build biwi`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="hpdb of the official archive, with 01 in it")
    parser.add_argument(
        "--protocol",
        choices=("all", "70-30"),
        default="all",
        help="all: every frame; 70-30: 16 sequences to train on and 8 to test, nobody in both (default: all)",
    )
    parser.add_argument("--split", choices=("train", "test"), default="test", help="what the set is (default: test)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another 70-30 (default: 0)")
    parser.add_argument(
        "--rgb-axes",
        action="store_true",
        help="poses in the RGB camera's axes, not the depth camera's as in published work: 1 degree apart",
    )
    parser.add_argument(
        "--head-radius-mm",
        type=float,
        default=HEAD_RADIUS_MM,
        metavar="MM",
        help=f"sphere about the head centre whose picture is the box (default: {HEAD_RADIUS_MM:g})",
    )


def from_args(options: argparse.Namespace) -> "Source":
    """BIWI Kinect: 15,678 frames of 20 people, yaw within ±75 degrees; a test set, or split 70-30."""
    from shards.sources.biwi.source import Biwi

    return Biwi(options.folder, options.protocol, options.split, options.seed, options.rgb_axes, options.head_radius_mm)
