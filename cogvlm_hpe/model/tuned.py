"""A base with changes added to its weights, each as it is read."""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from cogvlm_hpe.model.weights import Weights, WithConfig
from launcher.errors import UserError

_BLOCK_ELEMENTS = 2**18  # 1 MiB of float32: stays in the cache from the change to the rounded weight


class Changes(Protocol):
    """What is added to some layers of a base."""

    def layers(self) -> list[str]:
        """Sorted module names."""
        ...

    def blocks(self, layer: str, rows: int) -> Iterator[Tensor]:
        """A layer's change in blocks of so many rows, each float32, (at most `rows`, n_in) and the caller's own."""
        ...


class TunedWeights(WithConfig):
    """A base with changes added as its tensors are read: float32, then rounded once to the base's dtype."""

    def __init__(self, base: Weights, changes: Changes) -> None:
        """Nothing is read before `read`."""
        self.folder, self.architecture = base.folder, base.architecture
        self._base, self._changes = base, changes
        self._layers = set(changes.layers())
        self.losses: dict[str, float] = {}
        """Layer → ‖rounding error‖ / ‖change‖, of the layers read so far: small changes drown in 16-bit weights."""

    def names(self) -> list[str]:
        """The base's."""
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The base's."""
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The base's."""
        return self._base.dtype(name)

    def read(self, name: str) -> Tensor:
        """W + ΔW in the base's dtype. Raises UserError for a tensor that is not finite."""
        weight, layer = self._base.read(name), name.removesuffix(".weight")
        if layer not in self._layers:
            check_finite(name, weight)
            return weight
        out = torch.empty_like(weight)
        size = lost = 0.0
        step = max(1, _BLOCK_ELEMENTS // weight.shape[1])
        blocks = self._changes.blocks(layer, step)
        for change, rows, rounded in zip(blocks, weight.split(step), out.split(step), strict=True):
            size += squares(change)
            exact = change.to(torch.promote_types(torch.float32, weight.dtype)).add_(rows)
            lost += squares(exact.sub_(rounded.copy_(exact)))
        if not math.isfinite(size + lost):  # infinity less infinity is NaN, too
            check_finite(name, torch.tensor(math.nan))
        self.losses[layer] = float(f"{(lost / size) ** 0.5:.4g}") if size else 0.0
        return out

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Of the tuned tensor."""
        return self.read(name).reshape(-1)[start:stop]

    def forget(self, name: str) -> None:
        """Of the base."""
        self._base.forget(name)


def squares(matrix: Tensor) -> float:
    """Sum of squares: float32 within a row, float64 over the rows; the same bits for any number of threads."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises UserError naming the tensor that holds NaN or infinity."""
    ends = torch.stack(torch.aminmax(tensor))  # both NaN where one element is; many times isfinite's speed
    if not torch.isfinite(ends).all():
        raise UserError(f"{name}: holds NaN or infinity; the file is damaged or a weight is far too large")
