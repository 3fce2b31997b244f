"""Merges that look at each element of the changes, so their result has full rank: TIES, DARE, pruning, breadcrumbs.

A change is a dense tensor of one layer, float32 or wider, one for each adapter. First each is thinned out, on its own;
what that returns may reuse its memory. Then they are joined, element by element, in any pieces.
Densities are shares of a layer's elements. docs/merging.md tells where mergekit and peft differ.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**16  # 256 KiB of float32: what is made on the way stays in the cache


@dataclass(frozen=True)
class Sparsity:
    """What the element-wise methods want to know beside the changes and their weights."""

    density: float = 1.0  # share of elements that stays
    gamma: float = 0.01  # breadcrumbs: share of the largest elements that goes
    seed: int = 0  # DARE: which elements are dropped


def kept_largest(change: Tensor, count: int) -> Tensor:
    """Mask of exactly `count` elements of largest magnitude; of equal ones those that come first."""
    flat = change.reshape(-1).numpy()
    if count >= len(flat):
        return torch.ones_like(change, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(change, dtype=torch.bool)
    at = len(flat) - count
    sizes = np.abs(flat)
    sizes.partition(at)  # several times torch.kthvalue's speed
    limit = sizes[at]
    mask = np.empty(len(flat), dtype=bool)
    blocks = [slice(start, start + _BLOCK_ELEMENTS) for start in range(0, len(flat), _BLOCK_ELEMENTS)]
    for block in blocks:
        np.greater(np.abs(flat[block]), limit, out=mask[block])
    lack = count - np.count_nonzero(mask)
    for block in blocks:
        if lack <= 0:
            break
        equal = np.flatnonzero(np.abs(flat[block]) == limit)[:lack]
        mask[block][equal] = True
        lack -= len(equal)
    return torch.from_numpy(mask).view(change.shape)


def trimmed(change: Tensor, sparsity: Sparsity, name: str = "") -> Tensor:
    """The largest elements (TIES, arXiv 2306.01708, step 1), as many as the density says but at least one."""
    if sparsity.density >= 1.0:
        return change
    kept = kept_largest(change, max(1, int(sparsity.density * change.numel())))
    return change.masked_fill_(kept.logical_not_(), 0.0)


def crumbs(change: Tensor, sparsity: Sparsity, name: str = "") -> Tensor:
    """Without the largest and the smallest elements (model breadcrumbs, arXiv 2312.06795).

    The share `gamma` of largest ones goes, as far as `density` of all can still stay below them.
    """
    if sparsity.density >= 1.0:
        return change
    size = change.numel()
    stay, largest = int(sparsity.density * size), int(sparsity.gamma * size)
    largest = min(largest, size - stay)
    kept = kept_largest(change, stay + largest).logical_xor_(kept_largest(change, largest))
    return change.masked_fill_(kept.logical_not_(), 0.0)


def dropped(change: Tensor, sparsity: Sparsity, name: str) -> Tensor:
    """Each element stays by chance `density`, and those that stay grow by 1 / density (DARE, arXiv 2311.03099).

    The chances follow from the seed and `name` alone, not from what is merged before or where.
    """
    if sparsity.density >= 1.0:
        return change
    digest = hashlib.sha256(f"{sparsity.seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    chances = torch.rand(change.shape, generator=generator, dtype=torch.float32)
    return change.mul_(chances < sparsity.density).div_(sparsity.density)


def elected(changes: Sequence[Tensor], weights: Sequence[float], mean: bool) -> Tensor:
    """Of each element the weighted changes of the winning sign, added up, or their weighted mean (TIES, steps 2, 3).

    The sign is that of the sum of the *weighted* changes, + where it is 0; a change of 0 has no vote and no share.
    """
    step = max(1, _BLOCK_ELEMENTS // changes[0].shape[-1])
    return torch.cat(
        [_elected(parts, weights, mean) for parts in zip(*(change.split(step) for change in changes), strict=True)]
    )


def _elected(changes: Sequence[Tensor], weights: Sequence[float], mean: bool) -> Tensor:
    side = weighted(changes, weights).ge(0).to(changes[0].dtype).mul_(2).sub_(1)
    total, share = torch.zeros_like(side), torch.zeros_like(side)
    for change, weight in zip(changes, weights, strict=True):
        part = (change * weight).mul_(side).clamp_(min=0)  # the size of what is on the winning side, else 0
        total += part
        share.add_(part.sign_(), alpha=weight)
    total.mul_(side)
    return total.div_(share.masked_fill_(share == 0, 1.0)) if mean else total


def weighted(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ weight · change."""
    total = changes[0] * weights[0]
    for change, weight in zip(changes[1:], weights[1:], strict=True):
        total.add_(change, alpha=weight)
    return total


@dataclass(frozen=True)
class Method:
    """How each change is thinned out, given a name that no other change has, and how all are joined by weight."""

    thin: Callable[[Tensor, Sparsity, str], Tensor]
    join: Callable[[Sequence[Tensor], Sequence[float]], Tensor]


METHODS: dict[str, Method] = {
    "ties": Method(trimmed, partial(elected, mean=True)),
    "dare-linear": Method(dropped, weighted),
    "dare-ties": Method(dropped, partial(elected, mean=False)),
    "magnitude-prune": Method(trimmed, weighted),
    "breadcrumbs": Method(crumbs, weighted),
}
ELECTING = ("ties", "dare-ties")
