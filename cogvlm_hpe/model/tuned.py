"""A base with changes added to its weights, each as it is read."""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from cogvlm_hpe.model.threads import in_order
from cogvlm_hpe.model.weights import AnyWeights, Weights
from launcher.errors import UserError

_BLOCK_ELEMENTS = 2**18  # 1 MiB of float32: stays in the cache from the change to the rounded weight

Rows = Callable[[int, int], Tensor]
"""(first, last) → rows [first, last) of a layer's change, float32, the caller's own; any thread may call it."""


class Changes(Protocol):
    """What is added to some layers of a base."""

    def layers(self) -> list[str]:
        """Sorted module names."""
        ...

    def rows_of(self, layer: str) -> Rows:
        """A layer's change by rows; what rows share is computed here."""
        ...


class TunedWeights(AnyWeights):
    """A base with changes added as its tensors are read: float32, then rounded once to the base's dtype."""

    def __init__(self, base: Weights, changes: Changes) -> None:
        """Nothing is read before `pieces` or `read`."""
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

    def pieces(self, name: str) -> Iterator[Tensor]:
        """W + ΔW in the base's dtype, computed ahead on all threads. Raises UserError where it is not finite."""
        weight, layer = self._base.read(name), name.removesuffix(".weight")
        if layer not in self._layers:
            yield from in_order(lambda piece: _finite(name, piece), weight.reshape(-1).split(_BLOCK_ELEMENTS))
            return
        rows, step = self._changes.rows_of(layer), max(1, _BLOCK_ELEMENTS // weight.shape[1])
        size = lost = 0.0
        for tuned, of_change, of_error in in_order(
            lambda first: _tuned(weight[first : first + step], rows(first, min(first + step, len(weight)))),
            range(0, len(weight), step),
        ):
            size, lost = size + of_change, lost + of_error
            yield tuned
        if not math.isfinite(size + lost):  # infinity less infinity is NaN, too
            raise _not_finite(name)
        self.losses[layer] = float(f"{(lost / size) ** 0.5:.4g}") if size else 0.0

    def read(self, name: str) -> Tensor:
        """W + ΔW in the base's dtype. Raises UserError for a tensor that is not finite."""
        out = torch.empty(self.shape(name), dtype=self.dtype(name))
        flat, done = out.view(-1), 0
        for piece in self.pieces(name):
            flat[done : done + piece.numel()] = piece.reshape(-1)
            done += piece.numel()
        return out

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Of the tuned tensor."""
        return self.read(name).reshape(-1)[start:stop]

    def forget(self, name: str) -> None:
        """Of the base."""
        self._base.forget(name)


def _tuned(weight: Tensor, change: Tensor) -> tuple[Tensor, float, float]:
    """W + ΔW rounded to W's dtype, ‖ΔW‖² and ‖rounding error‖²."""
    size = squares(change)
    exact = change.to(torch.promote_types(torch.float32, weight.dtype)).add_(weight)
    rounded = exact.to(weight.dtype, copy=True)
    return rounded, size, squares(exact.sub_(rounded))


def squares(matrix: Tensor) -> float:
    """Sum of squares: float32 within a row, float64 over the rows; the same bits for any number of threads."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def _finite(name: str, piece: Tensor) -> Tensor:
    if piece.numel():
        ends = torch.stack(torch.aminmax(piece))  # both NaN where one element is; many times isfinite's speed
        if not torch.isfinite(ends).all():
            raise _not_finite(name)
    return piece


def _not_finite(name: str) -> UserError:
    return UserError(f"{name}: holds NaN or infinity; the file is damaged or a weight is far too large")
