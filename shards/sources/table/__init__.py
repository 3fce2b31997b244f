"""Any data set as a table: a CSV, TSV or JSONL file with one head a line.

Columns: `image` (a path), the box, the pose, and as wished `subject`, `split`, `weak`, `confidence`, `visible` and
`convention`. The box is x0, y0, x1, y1, or with `--box xywh` x, y, width, height, in pixels; the columns of the pose
depend on the convention. JSONL may give `box` as a list of 4 and `rotation` as a list of 9, row by row.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shards.sources.files import add_split_arguments

if TYPE_CHECKING:
    from shards.write import Source

CONVENTIONS = {
    "hpe-v1": "yaw, pitch, roll in degrees, as WHENet and DirectMHP have them too",
    "300w-lp": "yaw, pitch, roll in radians",
    "rotation": "our matrix M, 9 columns r00 to r22, as in BIWI's pose.txt and img2pose",
    "6drepnet": "the matrix of 6DRepNet, 9 columns",
    "3ddfa": "the matrix of 3DDFA's RotationMatrix.m, 9 columns",
    "head-to-camera": "head axes (y up, z out of the face) to OpenCV camera axes, 9 columns",
    "none": "no pose is known",
}
BOXES = {"xyxy": ("x0", "y0", "x1", "y1"), "xywh": ("x", "y", "width", "height")}
LEAST_PX = 8.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hpe-shards build table`."""
    parser.add_argument("table", type=Path, metavar="TABLE", help="a .csv, .tsv or .jsonl file")
    text = "folder that the column image starts from (default: the table's own)"
    parser.add_argument("--images", type=Path, metavar="DIR", help=text)
    text = "columns of the box: x0 y0 x1 y1, or x y width height (default: xyxy)"
    parser.add_argument("--box", choices=tuple(BOXES), default="xyxy", help=text)
    conventions = "; ".join(f"{name}: {what}" for name, what in CONVENTIONS.items())
    text = f"of lines without a column convention (default: hpe-v1). {conventions}"
    parser.add_argument("--convention", choices=tuple(CONVENTIONS), default="hpe-v1", help=text)
    text = f"drop heads with a shorter side inside the image (default: {LEAST_PX:g})"
    parser.add_argument("--least-px", type=float, default=LEAST_PX, metavar="PX", help=text)
    parser.add_argument("--licence", default="not stated", metavar="TEXT", help="what the set records as its licence")
    add_split_arguments(parser, "train")


def from_args(options: argparse.Namespace) -> "Source":
    """A CSV, TSV or JSONL file of your own: image, box, yaw, pitch, roll; one head a line."""
    from shards.sources.table.source import Table

    return Table(
        options.table,
        options.images or options.table.parent,
        box=options.box,
        convention=options.convention,
        split=options.split,
        shares=options.shares,
        seed=options.seed,
        least_px=options.least_px,
        licence=options.licence,
    )
