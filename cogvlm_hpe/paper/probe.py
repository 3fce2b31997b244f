"""How much of a head's pose the base's image tokens hold: a linear read-out.

Shapes: N heads, S points a side, T tokens of an image, D width of a token.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cogvlm_hpe.config import MIN_VISIBLE
from cogvlm_hpe.model.load import load_base
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.pixels import normalise
from launcher.files import write_json_atomic
from shards.index import open_set
from shards.pose import geodesic_deg
from shards.stream import Item, read_all

_BATCH = 16
_POINTS = 3
"""A side: the tokens are read at so many points across a head's box and down it."""
_RIDGE = (1.0, 10.0, 100.0, 1000.0)
_HELD_OUT = 5
"""One head in so many chooses the ridge."""

Features = dict[str, np.ndarray]


def probe(base: Path, train: Path, on: Sequence[Path], out: Path) -> None:
    """Write mean geodesic errors in degrees, by set, of what is read behind the tower and behind the adapter.

    The read-out is fitted on the heads of `train` and judged on those of each set of `on`.
    """
    model = load_base(base)
    seen, truth = read_tokens(model, train)
    judged = {folder.name: read_tokens(model, folder) for folder in on}
    errors: dict[str, dict[str, float]] = {}
    for where, given in seen.items():
        weights = fit(given, truth)
        errors[where] = {
            name: float(geodesic_deg(read_out(features[where], weights), rotations).mean())
            for name, (features, rotations) in judged.items()
        }
    write_json_atomic(out, errors)


@torch.no_grad()
def read_tokens(model: CogVLMForCausalLM, folder: Path) -> tuple[Features, np.ndarray]:
    """Of each head with a pose that is asked about: its tokens (N, S·S·D) by place, and its rotation (N, 3, 3)."""
    parts: dict[str, list[np.ndarray]] = {"tower": [], "adapter": []}
    rotations = []
    side_px = model.config.vision_config["image_size"]
    for _, items in read_all(open_set(folder), 0, 1, _BATCH, side_px):
        heads = list(_heads(items))
        if not heads:
            continue
        images = torch.stack([item.image for item in items if item.image is not None])
        tokens, patches = model.model.vision(normalise(images, model.dtype))
        index, boxes = [number for number, _, _ in heads], torch.tensor([box for _, box, _ in heads])
        for name, grid in (("tower", patches), ("adapter", tokens[:, 1:-1])):
            parts[name].append(_sample(grid[index], boxes).numpy())
        rotations += [rotation for _, _, rotation in heads]
    return {name: np.concatenate(given).astype(float) for name, given in parts.items()}, np.array(rotations)


def _heads(items: list[Item]) -> Iterator[tuple[int, list[float], np.ndarray]]:
    """Number of the image, box in image sides, rotation."""
    for number, item in enumerate(items):
        assert item.record is not None, "bad samples are not skipped"
        size = (item.record.image.width, item.record.image.height) * 2
        for head in item.record.heads:
            if head.rotation is not None and head.visible >= MIN_VISIBLE:
                yield number, np.divide(head.bbox, size).tolist(), head.matrix


def _sample(tokens: Tensor, boxes: Tensor) -> Tensor:
    """Tokens (N, T, D) of a square grid, read between its points inside boxes (N, 4): (N, S·S·D)."""
    n, count, width = tokens.shape
    side = round(count**0.5)
    grid = tokens.transpose(1, 2).reshape(n, width, side, side)
    at = (torch.arange(_POINTS) + 0.5) / _POINTS
    x = boxes[:, None, 0] + at * (boxes[:, None, 2] - boxes[:, None, 0])
    y = boxes[:, None, 1] + at * (boxes[:, None, 3] - boxes[:, None, 1])
    points = torch.stack(
        [x[:, None, :].expand(-1, _POINTS, -1), y[:, :, None].expand(-1, -1, _POINTS)], dim=-1
    )  # (N, S, S, 2)
    return F.grid_sample(grid, 2 * points - 1, align_corners=False, padding_mode="border").flatten(1)


def fit(features: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Ridge regression (…, 9) of the rotations' numbers; how strong a ridge, heads that are held out decide."""
    held = np.arange(len(features)) % _HELD_OUT == 0
    trials = [_ridge(features[~held], rotations[~held], ridge) for ridge in _RIDGE]
    errors = [geodesic_deg(read_out(features[held], weights), rotations[held]).mean() for weights in trials]
    return _ridge(features, rotations, _RIDGE[int(np.argmin(errors))])


def _ridge(features: np.ndarray, rotations: np.ndarray, ridge: float) -> np.ndarray:
    x = _with_one(features)
    squares = x.T @ x + ridge * np.eye(x.shape[1])
    return np.linalg.solve(squares, x.T @ rotations.reshape(-1, 9))


def read_out(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(N, 3, 3) the rotation nearest to the nine numbers that are read."""
    u, _, vt = np.linalg.svd((_with_one(features) @ weights).reshape(-1, 3, 3))
    u[:, :, 2] *= np.linalg.det(u @ vt)[:, None]
    return u @ vt


def _with_one(features: np.ndarray) -> np.ndarray:
    return np.concatenate([features, np.ones((len(features), 1))], axis=1)
