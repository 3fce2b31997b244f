"""Two losses for training a small model; a pretrained CogVLM needs neither.

Dense: what stands at each patch, where its box lies and how it is turned. A tower learns to see much sooner when every
patch has something to say, and the decoder finds the digits and words it needs ready made. Head axes are given as the
nine numbers of the rotation, never as degrees.
Guidance: some heads of one decoder layer should look, while answering, at the patches of what the question is about.

Shapes: I images, N patches, C vision width, D decoder width, R branches, L tokens, A heads, P prefix tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cogvlm_hpe.dialogue import SECTORS, TILTS, facing_choices
from shards.record import Record

KINDS = ("background", "head", "cube", "ball", "cone", "cylinder", "ring", "vase")
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black")
_BOX_WEIGHT, _AXES_WEIGHT = 5.0, 5.0
_DIGITS = 8  # hundreds, then tens, of x0, y0, x1, y1
_OUTPUTS = [len(KINDS), len(COLOURS), 4, 9, 10 * _DIGITS, len(SECTORS), len(TILTS)]


@dataclass
class DenseTargets:
    """What each patch is part of; -100 where there is nothing to say."""

    kind: Tensor  # (I, N)
    colour: Tensor  # (I, N)
    box: Tensor  # (I, N, 4) offsets of the box from the patch's centre, in image sides; nan without a box
    axes: Tensor  # (I, N, 9) rotation of the head; nan where there is none
    digits: Tensor  # (I, N, 8) the box as it is written: hundreds, then tens, of its thousandths
    facing: Tensor  # (I, N, 2) which sector and which tilt a head faces


def dense_targets(records: Sequence[Record | None], side: int) -> DenseTargets:
    """Targets on a side × side grid of patches; of several boxes over a patch the smallest counts."""
    n = side * side
    kind = torch.zeros(len(records), n, dtype=torch.long)
    colour = torch.full((len(records), n), -100)
    box = torch.full((len(records), n, 4), torch.nan)
    axes = torch.full((len(records), n, 9), torch.nan)
    digits = torch.full((len(records), n, _DIGITS), -100)
    facing = torch.full((len(records), n, 2), -100)
    steps = (torch.arange(side) + 0.5) / side
    centre = torch.stack([steps.repeat(side), steps.repeat_interleave(side)], dim=1)
    for number, record in enumerate(records):
        if record is None:
            kind[number] = -100
            continue
        for corners, kind_index, colour_index, rotation in _things(record):
            inside = ((centre >= corners[:2]) & (centre <= corners[2:])).all(dim=1)
            kind[number, inside] = kind_index
            colour[number, inside] = colour_index
            box[number, inside] = corners - centre[inside].repeat(1, 2)
            axes[number, inside] = rotation
            if rotation.isfinite().all():
                facing[number, inside] = torch.tensor(facing_choices((-rotation[2::3]).tolist()))
            digits[number, inside] = _written(corners)
    return DenseTargets(kind, colour, box, axes, digits, facing)


def _written(corners: Tensor) -> Tensor:
    hundredths = (100 * corners).long().clamp(0, 99)
    return torch.cat([hundredths // 10, hundredths % 10])


def _things(record: Record) -> list[tuple[Tensor, int, int, Tensor]]:
    scale = torch.tensor([record.image.width, record.image.height] * 2, dtype=torch.float)
    unknown = (math.nan,) * 9
    out = [
        (
            torch.tensor(head.bbox, dtype=torch.float) / scale,
            1,
            -100,
            torch.tensor(head.rotation or unknown, dtype=torch.float),
        )
        for head in record.heads
    ]
    for thing in record.objects:
        words = thing.expression.split()
        if words[-1] in KINDS[2:]:
            colour = next((COLOURS.index(w) for w in words if w in COLOURS), -100)
            corners = torch.tensor(thing.bbox) / scale
            out.append((corners, KINDS.index(words[-1]), colour, torch.full((9,), torch.nan)))
    return sorted(out, key=lambda t: -float((t[0][2:] - t[0][:2]).prod()))


class DenseHeads(nn.Module):
    """Linear read-outs of the vision tower's patches and of the adapter's image tokens, both trained alike."""

    def __init__(self, vision_width: int, decoder_width: int) -> None:
        super().__init__()
        self.tower = nn.Linear(vision_width, sum(_OUTPUTS))
        self.glue = nn.Linear(decoder_width, sum(_OUTPUTS))

    def forward(self, patches: Tensor, image_tokens: Tensor, targets: DenseTargets) -> Tensor:
        """(I, N, C) and (I, N, D) to the mean loss of an image."""
        return _dense_loss(self.tower(patches), targets) + _dense_loss(self.glue(image_tokens), targets)


def guidance_loss(scores_RALP: Tensor, labels_RL: Tensor, boxes_R4: Tensor, side: int) -> Tensor:
    """Minus the log of the attention that falls on a question's own box, mean over heads and answering tokens."""
    rows, columns = (labels_RL[:, 1:] != -100).nonzero(as_tuple=True)
    if len(rows) == 0:
        return 0.0 * scores_RALP.sum()
    own_RN = _patches_of(boxes_R4, side).to(scores_RALP.device)
    log_share = scores_RALP[rows, :, columns].float().log_softmax(dim=-1)[..., 2:-1]  # bos, boi and eoi are outside
    return -log_share.masked_fill(~own_RN[rows][:, None], -torch.inf).logsumexp(dim=-1).mean()


def _patches_of(boxes_R4: Tensor, side: int) -> Tensor:
    """(R, N) patches that a box touches, so that the smallest box has one."""
    low = (boxes_R4[:, :2] * side).floor().clamp(0, side - 1)
    high = (boxes_R4[:, 2:] * side - 1e-4).floor().clamp(0, side - 1)
    place = torch.arange(side)
    inside = (place >= low[..., None]) & (place <= high[..., None])  # (R, xy, side)
    return (inside[:, 1, :, None] & inside[:, 0, None, :]).flatten(1)


def _dense_loss(outputs: Tensor, targets: DenseTargets) -> Tensor:
    kind, colour, box, axes, digits, sector, tilt = outputs.float().split(_OUTPUTS, dim=-1)
    return (
        _choice_loss(kind, targets.kind)
        + _choice_loss(colour, targets.colour)
        + _BOX_WEIGHT * _known_mean(box, targets.box, torch.abs)
        + _AXES_WEIGHT * _known_mean(axes, targets.axes, torch.square)
        + 2 * _choice_loss(digits.unflatten(-1, (_DIGITS, 10)), targets.digits)
        + _choice_loss(sector, targets.facing[..., 0])
        + _choice_loss(tilt, targets.facing[..., 1])
    )


def _choice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


def _known_mean(outputs: Tensor, targets: Tensor, penalty: Callable[[Tensor], Tensor]) -> Tensor:
    known = targets.isfinite()
    # Unknown targets are replaced before the difference: a nan masked after it would still have a nan gradient.
    gaps = torch.where(known, outputs - targets.nan_to_num(), 0.0)
    return penalty(gaps).sum() / known.sum().clamp(min=1)
