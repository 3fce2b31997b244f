"""Scenes made on this machine: posed heads and coloured solids, with exact boxes, poses and camera."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.write import Source

DOMAINS = ("A", "B", "C", "W")
SPLITS = ("train", "val", "test", "base")
DEFAULT_IMAGE_PX = 140


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hpe-shards build synthetic`."""
    parser.add_argument(
        "--domain",
        choices=DOMAINS,
        default="A",
        help="A: studio; B: other people, backgrounds, light and lens; C: dolls, a stress test; W: crowds, for weak "
        "labels (default: A)",
    )
    parser.add_argument("--split", choices=SPLITS, default="train", help="no two share an identity (default: train)")
    parser.add_argument("--scenes", type=int, default=2000, metavar="N", help="number of images (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other scenes (default: 0)")
    parser.add_argument(
        "--image-size",
        type=int,
        default=DEFAULT_IMAGE_PX,
        metavar="PX",
        help=f"side of the square image in pixels (default: {DEFAULT_IMAGE_PX})",
    )


def from_args(options: argparse.Namespace) -> "Source":
    """Rendered scenes: heads of any pose and coloured solids, with exact labels."""
    from shards.sources.synthetic.source import SyntheticSource

    return SyntheticSource(options.domain, options.scenes, options.seed, options.split, options.image_size)
