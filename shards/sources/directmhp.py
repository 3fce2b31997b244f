"""What AGORA and CMU Panoptic share on the command line: DirectMHP's COCO-style JSON, which is made of both."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser, holds: str, splits: Sequence[str], whose: str, images: str) -> None:
    """The folder, and where the JSON and its images are; `holds`, `whose` and `images` are the data set's words."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=holds)
    parser.add_argument("--split", choices=splits, default="train", help=f"{whose} (default: train)")
    text = "DirectMHP's JSON (default: FOLDER/annotations/*SPLIT*.json, where there is such a folder)"
    parser.add_argument("--annotations", type=Path, metavar="FILE", help=text)
    parser.add_argument("--images", type=Path, metavar="DIR", help=images)
    parser.add_argument("--allow-missing", action="store_true", help="leave out labelled images that are not there")


def add_reference(parser: argparse._ActionsContainer) -> None:
    """Whose face is laid over landmarks, where the labels are made here."""
    text = "the published reference face, a .npy of (58, 3) (default: ours, see docs/data.md)"
    parser.add_argument("--reference", type=Path, metavar="FILE", help=text)


def is_meant(options: argparse.Namespace) -> bool:
    """Whether the JSON is to be read, not the data set's own files."""
    return bool(options.annotations or (options.folder / "annotations").is_dir())


def refuse_others(options: argparse.Namespace, defaults: Mapping[str, Any], or_else: str) -> None:
    """Raise UsageError where the JSON is read but an option, not its default, is for the data set's own files only."""
    labels = options.annotations or options.folder / "annotations"
    for name, default in defaults.items():
        if getattr(options, name) != default:
            flag = "--" + name.replace("_", "-")
            said = f"{flag}: has no effect on DirectMHP's JSON, which is read ({labels})"
            raise UsageError(f"{said}; leave it out{or_else}")
