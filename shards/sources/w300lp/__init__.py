"""300W-LP and AFLW2000-3D: one face an image, with the pose of a 3D face model fitted to it (Zhu et al., CVPR 2016).

Both come as `X.jpg` beside `X.mat` (MATLAB version 5). `Pose_Para` holds pitch, yaw and roll in radians, in our own
convention; landmarks are `pt2d` (300W-LP: 68 points, AFLW2000: 21, -1 where not visible) and `pt3d_68` (AFLW2000).
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shards.sources.files import Part, add_split_arguments

if TYPE_CHECKING:
    from shards.write import Source

SUBSETS = ("AFW", "HELEN", "IBUG", "LFPW")
MAX_ANGLE_DEG = 99.0
"""Largest yaw, pitch and roll of Hopenet's protocol, which others follow: 1,969 of AFLW2000's 2,000 images are left."""


def add_300wlp_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hpe-shards build 300w-lp`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="300W_LP of the official archive, with AFW in it")
    everything = " ".join(SUBSETS)
    parser.add_argument(
        "--subsets", nargs="+", choices=SUBSETS, default=SUBSETS, help=f"folders to take (default: {everything})"
    )
    parser.add_argument("--no-flips", action="store_true", help="leave out the mirrored pictures, the folders *_Flip")
    _add_common(parser, "train", "300w-lp")


def add_aflw2000_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hpe-shards build aflw2000`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="AFLW2000 of the official archive")
    _add_common(parser, "test", "aflw2000")


def _add_common(parser: argparse.ArgumentParser, split: str, crop: str) -> None:
    parser.add_argument(
        "--max-angle-deg",
        type=float,
        default=MAX_ANGLE_DEG,
        metavar="DEG",
        help=f"drop faces with a larger yaw, pitch or roll (default: {MAX_ANGLE_DEG:g}; 360 keeps all)",
    )
    parser.add_argument(
        "--crop",
        choices=("300w-lp", "aflw2000"),
        default=crop,
        help=f"whose rule makes a head's box of its landmarks (default: {crop})",
    )
    add_split_arguments(parser, split)


def from_300wlp_args(options: argparse.Namespace) -> "Source":
    """300W-LP: 122,450 synthesised views of faces, with mirror images; training data."""
    from shards.sources.w300lp.source import w300lp

    return w300lp(
        options.folder,
        Part.from_args(options),
        options.subsets,
        not options.no_flips,
        options.max_angle_deg,
        options.crop,
    )


def from_aflw2000_args(options: argparse.Namespace) -> "Source":
    """AFLW2000-3D: 2,000 faces in the wild; the usual test of what was trained on 300W-LP."""
    from shards.sources.w300lp.source import aflw2000

    return aflw2000(options.folder, Part.from_args(options), options.max_angle_deg, options.crop)
