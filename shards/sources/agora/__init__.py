"""AGORA (Patel et al., CVPR 2021): scanned people rendered into scenes, 5 to 15 in an image, heads of every pose.

Read are the Camera tables with SMPL-X joints that the project page offers (fields: docs/gt_dataframe.md of
github.com/pixelite1201/agora_evaluation), also as `project_joints` or DirectMHP's version of it writes them; and the
COCO-style JSON that DirectMHP (github.com/hnuzhy/DirectMHP) makes of them, which is the published AGORA-HPE.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shards.sources import directmhp

if TYPE_CHECKING:
    from shards.write import Source

SPLITS = ("train", "validation")
MOST_OCCLUDED_PERCENT = 90.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hpe-shards build agora`."""
    holds = "holds images and Cam (the official files), or images and annotations (what DirectMHP makes)"
    images = "folder of the images (default: FOLDER/images/SPLIT; for tables FOLDER/images, subfolders too)"
    directmhp.add_arguments(parser, holds, SPLITS, "the official one", images)
    own = parser.add_argument_group("tables")
    text = "folder of the tables SPLIT_*.pkl (default: FOLDER/Cam, subfolders too)"
    own.add_argument("--cams", type=Path, metavar="DIR", help=text)
    directmhp.add_reference(own)
    text = f"drop people hidden to this part or more (default: {MOST_OCCLUDED_PERCENT:g})"
    own.add_argument("--max-occlusion", type=float, default=MOST_OCCLUDED_PERCENT, metavar="PERCENT", help=text)


def from_args(options: argparse.Namespace) -> "Source":
    """AGORA: 15,500 rendered images with 112,000 heads of every pose, from its tables or DirectMHP's JSON."""
    from launcher.errors import UsageError

    if options.annotations and options.cams:
        raise UsageError("--annotations and --cams: give one of them, they are two forms of the same labels")
    if not options.cams and directmhp.is_meant(options):
        others = {"reference": None, "max_occlusion": MOST_OCCLUDED_PERCENT}
        directmhp.refuse_others(options, others, ", or name the tables by --cams")
        from shards.sources.agora.coco import from_coco

        return from_coco(options)
    from shards.sources.agora.tables import from_tables

    return from_tables(options)
