"""`cogvlm-hpe predict`: images, folders or videos in; poses as JSON or CSV, and pictures with their axes, out."""

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cogvlm_hpe.evaluate.command import DTYPES, DTYPES_HELP
from launcher.errors import EXIT_FAILURE, UsageError, UserError

if TYPE_CHECKING:
    import numpy as np

    from cogvlm_hpe.headpose import Box, HeadPose
    from cogvlm_hpe.pictures import Picture

HELP = "read the pose of heads in images, folders and videos"
_COLUMNS = ("image", "frame", "x0", "y0", "x1", "y1", "yaw", "pitch", "roll", "confidence", "reason", "answer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of predict."""
    add = parser.add_argument
    add(
        "image", type=Path, nargs="*", metavar="IMAGE",
        help="image (anything Pillow reads), folder of images, or video (needs the extra `video`); "
        "with --gradio: images that the page offers besides uploads",
    )  # fmt: skip
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--box", action="append", metavar="X0,Y0,X1,Y1",
        help="a head's box in pixels of the one image, or of each frame of the one video; give one for each head",
    )  # fmt: skip
    where.add_argument(
        "--detect", nargs="?", const="head", metavar="EXPRESSION",
        help="let the model find the heads itself, by asking where the EXPRESSION is (default: head)",
    )  # fmt: skip
    where.add_argument(
        "--gradio", action="store_true",
        help="show a page on this machine, where heads are boxed by clicks or found (needs the extra `gradio`)",
    )  # fmt: skip
    add("--port", type=int, default=7860, metavar="N", help="of the page; 0: any that is free (default: %(default)s)")
    add("--model", required=True, metavar="DIR", help="base folder, adapter folder (it names its base) or merged model")
    add("--adapter", type=Path, metavar="DIR", help="adapter to put on --model")
    add("--tokenizer", type=Path, metavar="DIR", help="where neither the base nor the adapter knows it")
    add(
        "--decode", choices=("greedy", "expectation"), default="greedy",
        help="expectation: a pose is the mean over the distribution of its digits, with a confidence",
    )  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="auto", help=DTYPES_HELP)
    add("--every", type=int, default=1, metavar="N", help="of a video, every N-th frame (default: %(default)s)")
    add("--format", choices=("json", "csv"), default="json", help="what is printed (default: %(default)s)")
    add(
        "--out", type=Path, metavar="PATH",
        help="also draw the poses' axes: onto a picture (for one image), or into a folder (for several, or a video)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print one object per head. Raises UserError or UsageError for the user's mistakes.

    Of several pictures one that cannot be read is named and left out, and the exit code is 1.
    """
    if args.gradio:
        if args.out is not None:
            raise UsageError(f"--out {args.out}: the page of --gradio draws for itself; leave one of the two out")
        from cogvlm_hpe import page

        return page.run(args)
    from cogvlm_hpe import pictures

    if not args.image:
        raise UsageError("IMAGE: there is none; name images, folders or videos, or ask for the page with --gradio")
    if args.every < 1:
        raise UsageError(f"--every {args.every}: must be at least 1")
    boxes = [parse_box(text) for text in args.box] if args.box else None
    paths = pictures.find(args.image)
    alone = len(paths) == 1 and paths[0].suffix.lower() not in pictures.VIDEOS
    _check(args, len(paths), alone)
    if args.out is not None:
        _check_kept(paths, args.out, alone)
    if boxes or alone:  # what is no image, or not in it, is told before the model is read
        height, width = next(pictures.read(paths[0])).pixels.shape[:2]
        for box in boxes or ():
            check_inside(box, width, height)
    from cogvlm_hpe.headpose import HeadPose
    from launcher.progress import track

    total = sum(pictures.count(path, args.every) for path in paths)
    model = HeadPose.from_pretrained(
        args.model, args.adapter, device=args.device, dtype=args.dtype, tokenizer=args.tokenizer, decode=args.decode
    )
    writer, names = Rows(args.format, sys.stdout), pictures.names(paths)
    unread: list[Path] = []
    for picture in track(_read_all(paths, args.every, unread), "predict", total):
        rows = judge(model, picture, boxes, args.detect)
        if args.detect and not rows:
            print(f"{picture.path}: no {args.detect} found", file=sys.stderr)
        writer.write(rows)
        if args.out is not None:
            frame = "" if picture.frame is None else f"-{picture.frame:06d}"
            drawn = args.out if alone else args.out / f"{names[picture.path]}{frame}.png"
            write_picture(drawn, picture.pixels, rows)
    writer.close()
    return EXIT_FAILURE if unread else 0


def _check(args: argparse.Namespace, n_paths: int, alone: bool) -> None:
    if args.box and n_paths > 1:
        raise UsageError("--box: boxes are of one image; give one IMAGE, or --detect")
    if args.out is None:
        return
    if alone and not args.out.suffix:
        raise UsageError(f"--out {args.out}: needs an ending that names a picture format, such as .png")
    if not alone:
        if args.out.exists() and not args.out.is_dir():
            raise UsageError(f"--out {args.out}: is a file; several pictures need a folder")
        args.out.mkdir(parents=True, exist_ok=True)


def _check_kept(paths: Sequence[Path], out: Path, alone: bool) -> None:
    """Raise UsageError where a picture would be drawn over one that is read."""
    from cogvlm_hpe import pictures

    drawn = out.resolve()
    for path, name in pictures.names(paths).items():
        is_video = path.suffix.lower() in pictures.VIDEOS
        ours = re.compile(re.escape(name) + (r"-\d{6,}" if is_video else "") + r"\.png")
        for given in (one.resolve() for one in paths):
            if given == drawn if alone else given.parent == drawn and ours.fullmatch(given.name):
                raise UsageError(f"--out {out}: would draw over {given}, which is read; choose another place")


def _read_all(paths: Sequence[Path], every: int, unread: list[Path]) -> "Iterator[Picture]":
    from cogvlm_hpe import pictures

    for path in paths:
        try:
            yield from pictures.read(path, every)
        except UserError as error:
            if len(paths) == 1:
                raise
            print(error, file=sys.stderr)
            unread.append(path)


def judge(
    model: "HeadPose", picture: "Picture", boxes: "Sequence[Box] | None", expression: str | None
) -> list[dict[str, Any]]:
    """`{image, frame?, box, answer, yaw, pitch, roll, reason, confidence?}` of each head of a picture."""
    place: dict[str, Any] = {"image": str(picture.path)}
    if picture.frame is not None:
        place["frame"] = picture.frame
    readings = model(picture.pixels, boxes, expression=expression or "head")
    return [place | reading.as_dict() for reading in readings]


class Rows:
    """Prints rows as they come: a JSON list, or CSV with a heading."""

    def __init__(self, kind: str, file: TextIO) -> None:
        self._file, self._first = file, True
        self._csv = csv.DictWriter(file, _COLUMNS, restval="", extrasaction="ignore") if kind == "csv" else None
        if self._csv:
            self._csv.writeheader()
        else:
            file.write("[")

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Print some more."""
        for row in rows:
            if self._csv:
                self._csv.writerow(row | dict(zip(("x0", "y0", "x1", "y1"), row["box"], strict=True)))
            else:
                self._file.write(("\n  " if self._first else ",\n  ") + json.dumps(row, ensure_ascii=False))
            self._first = False
        self._file.flush()

    def close(self) -> None:
        """Nothing more comes."""
        if not self._csv:
            self._file.write("\n]\n")


def parse_box(text: str) -> "Box":
    """`x0,y0,x1,y1` in pixels. Raises UsageError."""
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"box {text}: four numbers x0,y0,x1,y1 in pixels are needed, with commas between") from None
    if not (x0 < x1 and y0 < y1):
        raise UsageError(f"box {text}: x0 < x1 and y0 < y1 are needed; the corners are left-top and right-bottom")
    return (x0, y0, x1, y1)


def check_inside(box: "Box", width: int, height: int) -> None:
    """Raises UsageError unless the box lies within the image."""
    x0, y0, x1, y1 = box
    if not (x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height):
        said = ",".join(f"{v:g}" for v in box)
        raise UsageError(f"box {said}: outside the image, which is {width} x {height} pixels; give a box within it")


def draw(pixels: "np.ndarray", answers: list[dict[str, Any]]) -> "np.ndarray":
    """(H, W, 3) uint8: the image with each box and, where there is a pose, its axes."""
    from cogvlm_hpe.draw import draw_pose
    from shards.draw import draw_box
    from shards.pose import rotation_from_pose

    for answer in answers:
        readable = answer["reason"] is None
        text = " ".join(f"{answer[angle]:.0f}" for angle in ("yaw", "pitch", "roll")) if readable else "no pose"
        pixels = draw_box(pixels, answer["box"], text=text)
        if readable:
            rotation = rotation_from_pose(answer["yaw"], answer["pitch"], answer["roll"])
            pixels = draw_pose(pixels, answer["box"], rotation)
    return pixels


def write_picture(path: Path, pixels: "np.ndarray", answers: list[dict[str, Any]]) -> None:
    """The image, drawn on. Raises UserError where it cannot be written."""
    from PIL import Image

    try:
        Image.fromarray(draw(pixels, answers)).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {path}: cannot be written ({error})") from None
