"""Attention kernels behind functions that say who sees whom.

Prefixes and plain rows use SDPA's causal kernels, which build no L × L mask. Packed branches need a mask of their few
rows: SDPA takes it as a bias; on CUDA, FlexAttention skips the blocks that nobody sees.

Shapes: B rows, A heads, Q query slots, P prefix tokens, E head width.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cogvlm_hpe.model.layout import branch_seen

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (B, A, L, E)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Where:
    """Attention by a mask (B, 1, Q, K): bool, or a bias to add."""

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, A, Q, E)."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen)


def packed_kernel(branch_of_slot: Tensor, n_prefix: int, dtype: torch.dtype) -> Attend:
    """How packed branches attend to [prefix; all branches of the row]: q (I, A, Q, E), k and v (I, A, P + Q, E)."""
    if branch_of_slot.is_cuda:
        return flex_kernel(branch_of_slot, n_prefix, _compiled_flex())
    seen = branch_seen(branch_of_slot, n_prefix)
    # The bias is made once here; a bool mask would be turned into one in every layer.
    return Where(torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf))


def flex_kernel(branch_of_slot: Tensor, n_prefix: int, flex: Callable[..., Any]) -> Attend:
    """The same through FlexAttention (`flex`: compiled or eager)."""
    from torch.nn.attention.flex_attention import create_block_mask

    images, slots = branch_of_slot.shape

    def seen(image: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key - n_prefix).clamp(min=0)
        same = branch_of_slot[image, query] == branch_of_slot[image, own]
        return (key < n_prefix) | (same & (own <= query))

    mask = create_block_mask(seen, images, None, slots, n_prefix + slots, device=str(branch_of_slot.device))
    return lambda q, k, v: flex(q, k, v, block_mask=mask)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


class AfterPrefix:
    """Packed branches after their prefix; keeps the scores of the first `watched` heads on the prefix."""

    def __init__(self, past: tuple[Tensor, Tensor], kernel: Attend, watched: int = 0) -> None:
        self.past, self.kernel, self.watched = past, kernel, watched
        self.scores: Tensor | None = None  # (I, watched, Q, P), before the softmax

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(I, A, Q, E)."""
        if self.watched:
            n = self.watched
            self.scores = q[:, :n] @ self.past[0][:, :n].transpose(-1, -2) * q.shape[-1] ** -0.5
        keys, values = torch.cat([self.past[0], k], dim=2), torch.cat([self.past[1], v], dim=2)
        return self.kernel(q, keys, values)
