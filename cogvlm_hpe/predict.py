"""`cogvlm-hpe predict`: one image and head boxes in; poses as JSON, and a picture with their axes, out."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UsageError, UserError

if TYPE_CHECKING:
    import numpy as np

    from cogvlm_hpe.dialogue import Parsed
    from cogvlm_hpe.evaluate.answer import Answer, Decode
    from cogvlm_hpe.model.load import Loaded

HELP = "read the pose of heads in one image"
_REASONS = {
    "box": "the model answered with a box, not with a pose",
    "blended": "the answer mixes box and pose formats",
    "out_of_range": "the answer is written as a pose, but its numbers are no angles",
    "other": "the answer is no pose",
}

Box = tuple[float, float, float, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of predict."""
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="JPEG, PNG or anything else Pillow reads")
    add(
        "--box", action="append", required=True, metavar="X0,Y0,X1,Y1",
        help="a head's box in pixels of the image; give one for each head",
    )  # fmt: skip
    add("--model", required=True, metavar="DIR", help="base folder, adapter folder (it names its base) or merged model")
    add("--adapter", type=Path, metavar="DIR", help="adapter to put on --model")
    add(
        "--decode", choices=("greedy", "expectation"), default="greedy",
        help="expectation: a pose is the mean over the distribution of its digits, with a confidence",
    )  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: %(default)s)")
    add("--out", type=Path, metavar="PICTURE", help="also write the image with the poses' axes drawn on it")


def run(args: argparse.Namespace) -> int:
    """Print one JSON object per box. Raises UserError or UsageError for the user's mistakes."""
    boxes = [parse_box(text) for text in args.box]
    if args.out is not None and not args.out.suffix:
        raise UsageError(f"--out {args.out}: needs an ending that names a picture format, such as .png")
    pixels = read_image(args.image)
    height, width = pixels.shape[:2]
    for box in boxes:
        check_inside(box, width, height)
    import torch

    from cogvlm_hpe.evaluate.command import device_of
    from cogvlm_hpe.model.load import load

    device = device_of(args.device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    answers = predict(load(args.model, args.adapter, device=device, dtype=dtype), pixels, boxes, args.decode)
    print("[\n" + ",\n".join("  " + json.dumps(answer, ensure_ascii=False) for answer in answers) + "\n]")
    if args.out is not None:
        write_picture(args.out, pixels, answers)
    return 0


def parse_box(text: str) -> Box:
    """`x0,y0,x1,y1` in pixels. Raises UsageError."""
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--box {text}: four numbers x0,y0,x1,y1 in pixels are needed, with commas between") from None
    if not (x0 < x1 and y0 < y1):
        raise UsageError(f"--box {text}: x0 < x1 and y0 < y1 are needed; the corners are left-top and right-bottom")
    return (x0, y0, x1, y1)


def check_inside(box: Box, width: int, height: int) -> None:
    """Raises UsageError unless the box lies within the image."""
    x0, y0, x1, y1 = box
    if not (x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height):
        said = ",".join(f"{v:g}" for v in box)
        raise UsageError(f"--box {said}: outside the image, which is {width} x {height} pixels; give a box within it")


def read_image(path: Path) -> "np.ndarray":
    """(H, W, 3) uint8 RGB. Raises UserError where there is no image."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            # Turned as its EXIF data say, as every viewer shows it and so as boxes are read off it.
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not an image that can be read ({reason})") from None


def predict(
    loaded: "Loaded", pixels: "np.ndarray", boxes: list[Box], decode: "Decode" = "greedy"
) -> list[dict[str, Any]]:
    """For each box: `{box, answer, yaw, pitch, roll, reason}`, degrees, or nulls and the reason why.

    With expectation decoding also `confidence`, 0..1.
    """
    from cogvlm_hpe import dialogue
    from cogvlm_hpe.evaluate.answer import Decoding, answer
    from cogvlm_hpe.train.batch import normalise
    from shards.stream import resize

    height, width = pixels.shape[:2]
    model, notes = loaded.model, loaded.notes
    weight = next(model.parameters())
    image = normalise(resize(pixels, model.config.vision_config["image_size"])[None]).to(weight.device, weight.dtype)
    questions = [dialogue.ask("pose", notes["prompts"], box=dialogue.format_box(box, width, height)) for box in boxes]
    n = len(boxes)
    answers = answer(loaded, image, [0] * n, ["pose"] * n, questions, Decoding(decode=decode))
    return [
        {"box": list(box), "answer": given.text, **_reading(given, dialogue.parse(given.text, notes["answer_format"]))}
        for box, given in zip(boxes, answers, strict=True)
    ]


def _reading(given: "Answer", parsed: "Parsed") -> dict[str, Any]:
    yaw, pitch, roll = given.pose_deg or parsed.pose_deg or (None, None, None)
    reading = {"yaw": yaw, "pitch": pitch, "roll": roll, "reason": _REASONS.get(parsed.kind)}
    return reading if given.confidence is None else reading | {"confidence": round(given.confidence, 4)}


def write_picture(path: Path, pixels: "np.ndarray", answers: list[dict[str, Any]]) -> None:
    """The image with each box and, where there is a pose, its axes. Raises UserError where it cannot be written."""
    from PIL import Image

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
    try:
        Image.fromarray(pixels).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {path}: cannot be written ({error})") from None
