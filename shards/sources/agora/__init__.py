"""AGORA (Patel et al., CVPR 2021): scanned people rendered into scenes, 5 to 15 in an image, heads of every pose.

Read are the Camera tables with SMPL-X joints that the project page offers (fields: docs/gt_dataframe.md of
github.com/pixelite1201/agora_evaluation), also as `project_joints` or DirectMHP's version of it writes them; and the
COCO-style JSON that DirectMHP (github.com/hnuzhy/DirectMHP) makes of them, which is the published AGORA-HPE.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.write import Source

SPLITS = ("train", "validation")
MOST_OCCLUDED_PERCENT = 90.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hpe-shards build agora`."""
    text = "holds images and Cam (the official files), or images and annotations (what DirectMHP makes)"
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--split", choices=SPLITS, default="train", help="the official one (default: train)")
    text = "DirectMHP's JSON (default: FOLDER/annotations/*SPLIT*.json, where there is such a folder)"
    parser.add_argument("--annotations", type=Path, metavar="FILE", help=text)
    text = "folder of the tables SPLIT_*.pkl (default: FOLDER/Cam, subfolders too)"
    parser.add_argument("--cams", type=Path, metavar="DIR", help=text)
    text = "folder of the images (default: FOLDER/images/SPLIT; for tables FOLDER/images, subfolders too)"
    parser.add_argument("--images", type=Path, metavar="DIR", help=text)
    text = "tables: the published reference face, a .npy of (58, 3) (default: ours, see docs/data.md)"
    parser.add_argument("--reference", type=Path, metavar="FILE", help=text)
    parser.add_argument(
        "--max-occlusion",
        type=float,
        default=MOST_OCCLUDED_PERCENT,
        metavar="PERCENT",
        help=f"tables: drop people hidden to this part or more (default: {MOST_OCCLUDED_PERCENT:g})",
    )
    parser.add_argument("--allow-missing", action="store_true", help="leave out images that are not there")


def from_args(options: argparse.Namespace) -> "Source":
    """AGORA: 15,500 rendered images with 112,000 heads of every pose, from its tables or DirectMHP's JSON."""
    from launcher.errors import UsageError

    if options.annotations and options.cams:
        raise UsageError("--annotations and --cams: give one of them, they are two forms of the same labels")
    if options.annotations or (not options.cams and (options.folder / "annotations").is_dir()):
        from shards.sources.agora.coco import from_coco

        return from_coco(options)
    from shards.sources.agora.tables import from_tables

    return from_tables(options)
