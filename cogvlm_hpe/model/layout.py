"""Which token goes where, and who sees whom: pure index work, done once a batch and on the host.

Branches: all questions about one image lie in one row, one after the other and without padding between them, so that
the keys of the image's prefix are read in place instead of copied for each question. A token sees its image's prefix
and what precedes it in its own branch. Given CPU tensors, a step never waits for the device.

Shapes: I images, R branches, L tokens of a branch, Q slots of an image's row, P prefix tokens, T labelled tokens,
B plain rows, K all tokens of a plain row, cached ones included.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

IGNORE = -100  # a label that carries no loss
FIRST_TEXT_POSITION = 4  # bos 0, boi 1, all image tokens 2, eoi 3


class _Movable:
    def to(self, device: torch.device) -> Self:
        """The same layout with its tensors on a device; the copy is not waited for."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        moved = {n: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for n, v in values.items()}
        return type(self)(**moved)


@dataclass
class BranchLayout(_Movable):
    """Branches (R, L) packed into rows (I, Q)."""

    token_of_slot: Tensor  # (I, Q) flat index into (R, L); 0 where a slot is empty
    branch_of_slot: Tensor  # (I, Q); -1 where a slot is empty
    position: Tensor  # (I, Q) rotary position
    slot_of_token: Tensor  # (R, L) flat index into (I, Q); 0 for padding
    last_slot: Tensor  # (R,) flat slot of a branch's last token

    @property
    def slots(self) -> int:
        """Q: the longest row."""
        return self.token_of_slot.shape[1]


@dataclass
class LabelLayout(_Movable):
    """Where answers are predicted. `n_answers` is the number of branches with a label."""

    slot: Tensor  # (T,) flat slot whose hidden state predicts the token
    target: Tensor  # (T,) the token
    branch: Tensor  # (T,) whose answer it belongs to
    weight: Tensor  # (T,) one over the tokens of that answer
    n_answers: int


def pack_branches(image_index: Tensor, mask_RL: Tensor, n_images: int) -> BranchLayout:
    """Rows of `n_images` images for right-padded branches, those of an image in the order given.

    Raises ValueError where a branch names no image, is empty, or has padding that is not on its right.
    """
    image, mask = image_index.cpu(), mask_RL.cpu().bool()
    lengths = mask.sum(dim=1)
    n_branches, length = mask.shape
    if n_branches and not (int(image.min()) >= 0 and int(image.max()) < n_images):
        raise ValueError(f"image_index {image.min()}..{image.max()}: must lie in 0..{n_images - 1}, the images given")
    if bool((lengths == 0).any()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("branch_attention_mask: every branch needs a token, and padding stands on the right only")
    start = _starts_in_rows(image, lengths, n_images)
    totals = torch.zeros(n_images, dtype=torch.long).index_add(0, image, lengths)
    slots = max(1, int(totals.max()))
    steps = torch.arange(length)
    slot_RL = (image * slots + start)[:, None] + steps
    token_of_slot = torch.zeros(n_images * slots, dtype=torch.long)
    branch_of_slot, position = torch.full_like(token_of_slot, -1), torch.zeros_like(token_of_slot)
    used = slot_RL[mask]
    token_of_slot[used] = torch.arange(n_branches * length).view(n_branches, length)[mask]
    branch_of_slot[used] = torch.arange(n_branches)[:, None].expand_as(mask)[mask]
    position[used] = steps.expand_as(mask)[mask]
    return BranchLayout(
        token_of_slot=token_of_slot.view(n_images, slots),
        branch_of_slot=branch_of_slot.view(n_images, slots),
        position=FIRST_TEXT_POSITION + position.view(n_images, slots),
        slot_of_token=slot_RL.masked_fill(~mask, 0),
        last_slot=image * slots + start + lengths - 1,
    )


def _starts_in_rows(image: Tensor, lengths: Tensor, n_images: int) -> Tensor:
    order = image.argsort(stable=True)
    before = lengths[order].cumsum(0) - lengths[order]
    counts = torch.bincount(image, minlength=n_images)
    first = (counts.cumsum(0) - counts)[image[order]]
    start = torch.empty_like(lengths)
    start[order] = before - before[first]
    return start


def find_labels(labels_RL: Tensor, mask_RL: Tensor, layout: BranchLayout) -> LabelLayout:
    """Labels stand at their own tokens; each is predicted from the slot before. `layout` on the host.

    Raises ValueError for a label on padding, or on a branch's first token, which no slot predicts.
    """
    labels, mask = labels_RL.cpu(), mask_RL.cpu().bool()
    targets = labels[:, 1:]
    branch, step = (targets != IGNORE).nonzero(as_tuple=True)
    if not bool(mask[branch, step + 1].all()) or bool((labels[:, 0] != IGNORE).any()):
        raise ValueError("branch_labels: must be -100 on padding and on the first token of each branch")
    counts = torch.bincount(branch, minlength=len(targets))
    return LabelLayout(
        slot=layout.slot_of_token[branch, step],
        target=targets[branch, step],
        branch=branch,
        weight=1.0 / counts[branch],
        n_answers=int((counts > 0).sum()),
    )


def branch_seen(branch_of_slot: Tensor, n_prefix: int) -> Tensor:
    """(I, 1, Q, P + Q) bool: the prefix, and the own branch so far. Empty slots see the prefix; nobody reads them."""
    images, slots = branch_of_slot.shape
    same = branch_of_slot[:, :, None] == branch_of_slot[:, None, :]
    prefix = torch.ones(images, slots, n_prefix, dtype=torch.bool, device=branch_of_slot.device)
    return torch.cat([prefix, same.tril()], dim=2)[:, None]


@dataclass
class PlainLayout(_Movable):
    """Rows of one conversation each, text and images in any order; the last columns of (B, K) are new."""

    language: Tensor  # flat indices into the new tokens, those of the language expert
    vision: Tensor  # and of the vision expert
    back: Tensor  # undoes their concatenation
    image_slots: Tensor  # flat indices of boi, image and eoi tokens
    position: Tensor  # (B, new)
    seen: Tensor | None  # (B, 1, new, K) bool; None where plain causal attention says the same


def lay_out_rows(types_BK: Tensor, mask_BK: Tensor, new: int) -> PlainLayout:
    """Routing, positions and masks of the last `new` tokens of plain rows; `mask` is 1 on real tokens."""
    types, mask = types_BK.cpu(), mask_BK.cpu() == 1
    vision = vision_tokens(types)[:, -new:].flatten()
    language, experts = (~vision).nonzero()[:, 0], vision.nonzero()[:, 0]
    back = torch.empty(len(vision), dtype=torch.long)
    back[torch.cat([language, experts])] = torch.arange(len(vision))
    slots = ((types == 1) & mask)[:, -new:].flatten().nonzero()[:, 0]
    return PlainLayout(language, experts, back, slots, plain_positions(types, mask)[:, -new:], _plain_seen(mask, new))


def _plain_seen(mask: Tensor, new: int) -> Tensor | None:
    length = mask.shape[1]
    padded_on_the_right = not bool((mask[:, 1:] & ~mask[:, :-1]).any())
    if padded_on_the_right and (new == length or (new == 1 and bool(mask.all()))):
        return None  # padding comes last, so nobody who matters sees it
    # A padding row must see something, itself, or its softmax is empty.
    own = torch.eye(length, dtype=torch.bool)[-new:]
    causal = torch.ones(length, length, dtype=torch.bool).tril()[-new:]
    return ((causal & mask[:, None, :]) | own)[:, None]


def prefix_positions(image_tokens: int, device: torch.device) -> Tensor:
    """bos 0, boi 1, every image token 2, eoi 3: (P,)."""
    positions = torch.full((image_tokens + 3,), 2, device=device)
    positions[0], positions[1], positions[-1] = 0, 1, 3
    return positions


def vision_tokens(types_BL: Tensor) -> Tensor:
    """Which tokens the vision expert takes: type 1 followed by type 1, so boi and image but not eoi. (B, L) bool."""
    vision = torch.zeros_like(types_BL, dtype=torch.bool)
    vision[:, :-1] = (types_BL[:, :-1] == 1) & (types_BL[:, 1:] == 1)
    return vision


def plain_positions(types_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Positions of a plain row: one step a token, but the image tokens of one image share one. (B, L)."""
    vision = vision_tokens(types_BL)
    inner = torch.zeros_like(vision)
    # boi is the first vision token of its run and steps; so does the first image token; those after it do not.
    inner[:, 2:] = vision[:, 2:] & vision[:, 1:-1] & vision[:, :-2]
    steps = (mask_BL == 1) & ~inner
    return (steps.long().cumsum(dim=1) - 1).clamp(min=0)
