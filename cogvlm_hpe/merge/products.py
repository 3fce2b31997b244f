"""Inner products of weights and of their changes, exact in float64, from the factors: no B·A is ever formed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cogvlm_hpe.merge.base import Base, will_need
from cogvlm_hpe.merge.factors import Factor, Factors
from cogvlm_hpe.merge.sharing import share_of, sizes_of
from cogvlm_hpe.model.threads import in_order
from launcher.comm import Comm, single
from launcher.progress import track

READ_ELEMENTS = 2**23  # 16 MiB of bf16: one piece of work
_STEP_ELEMENTS = 2**17  # 1 MiB of float64: fits a core's own cache


@dataclass(frozen=True)
class Products:
    """⟨u, u⟩, ⟨u, v⟩ and ⟨v, v⟩ of two tensors, float64. They add over the layers of a group."""

    first: float
    cross: float
    second: float

    def __add__(self, other: "Products") -> "Products":
        """Of both layers together."""
        return Products(self.first + other.first, self.cross + other.cross, self.second + other.second)

    @property
    def cosine(self) -> float:
        """cos(u, v): 0 where either is zero, NaN where either is not finite."""
        if not all(map(math.isfinite, (self.first, self.cross, self.second))):
            return math.nan  # said here: min and max below would swallow it
        norm = math.sqrt(max(self.first, 0.0)) * math.sqrt(max(self.second, 0.0))
        return min(1.0, max(-1.0, self.cross / norm)) if norm != 0.0 else 0.0


def inner(one: Factor, other: Factor) -> float:
    """⟨ΔW1, ΔW2⟩ = s1·s2·tr((B1ᵀB2)(A2A1ᵀ)): work of r × r, whatever the width of the layer."""
    columns = one.b.double().T @ other.b.double()
    return one.scale * other.scale * float((columns * (one.a.double() @ other.a.double().T)).sum())


def of_changes(one: Factor, other: Factor) -> Products:
    """Of the changes that two adapters make to one layer."""
    return Products(inner(one, one), inner(one, other), inner(other, other))


def base_and_tuned(base: Base, factors: Factors, comm: Comm | None = None) -> dict[str, Products]:
    """All ranks. W0 and W0 + ΔW of every layer, in name order; the base is read once, its layers shared out.

    A rank works on torch's number of threads. The sums are taken in one order: the same bits for any number of threads
    and ranks. Raises UserError where the base lacks a layer of the adapter or has it in another shape.
    """
    base.check(factors)
    comm = comm or single()
    found = comm.gather(_of_layers(base, {layer: factors[layer] for layer in share_of(sizes_of(factors), comm)}))
    whole = comm.broadcast({layer: products for part in found or [] for layer, products in part.items()})
    return {layer: whole[layer] for layer in sorted(whole)}


def _of_layers(base: Base, factors: Factors) -> dict[str, Products]:
    sums = dict.fromkeys(sorted(factors), (0.0, 0.0))
    for layer, squares, cross in _sums(base, factors):
        sums[layer] = (sums[layer][0] + squares, sums[layer][1] + cross)
    return {layer: _products(factors[layer], *found) for layer, found in sums.items()}


def _products(factor: Factor, squares: float, cross: float) -> Products:
    cross *= factor.scale
    return Products(squares, squares + cross, squares + 2.0 * cross + inner(factor, factor))


def _sums(base: Base, factors: Factors) -> Iterator[tuple[str, float, float]]:
    """(layer, ⟨W0, W0⟩, ⟨W0, BA⟩ without the scale) of each piece, in order; read ahead, worked on side by side."""

    def fetched() -> Iterator[tuple[str, int, int, torch.Tensor]]:
        for layer, first, last in track(list(_pieces(factors)), "read base"):
            rows = base.rows(layer, first, last)
            will_need(rows)
            yield layer, first, last, rows

    def summed(job: tuple[str, int, int, torch.Tensor]) -> tuple[str, bool, float, float]:
        layer, first, last, rows = job
        factor = factors[layer]
        squares, cross = piece(rows, factor.a.double(), factor.b[first:last].double())
        return layer, last == len(factor.b), squares, cross

    for layer, is_last, squares, cross in in_order(summed, fetched()):
        if is_last:
            base.forget(layer)
        yield layer, squares, cross


def _pieces(factors: Factors) -> Iterator[tuple[str, int, int]]:
    for layer, factor in sorted(factors.items()):
        n_out, step = len(factor.b), max(1, READ_ELEMENTS // factor.a.shape[1])
        for first in range(0, n_out, step):
            yield layer, first, min(n_out, first + step)


def piece(rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """⟨W, W⟩ and ⟨W, BA⟩ of some rows: W (k, n_in) of any type, A (r, n_in), B (k, r) float64.

    ⟨W, BA⟩ = ⟨BᵀW, A⟩: per element of W, r multiplications and one conversion, in the cache.
    """
    step = max(1, _STEP_ELEMENTS // rows.shape[1])
    wide = torch.empty(min(step, len(rows)), rows.shape[1], dtype=torch.float64)
    columns, squares = torch.zeros_like(a), 0.0
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        block = wide[: len(part)].copy_(part)
        flat = block.view(-1)
        squares += float(torch.dot(flat, flat))
        columns.addmm_(b[start : start + step].T, block)
    return squares, float(columns.mul_(a).sum())
