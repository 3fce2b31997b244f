"""Inner products of weights and of their changes, exact in float64, from the factors: no B·A is ever formed."""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cogvlm_hpe.merge.base import Base, will_need
from cogvlm_hpe.merge.factors import Factor, Factors
from launcher.progress import track

_READ_ELEMENTS = 2**23  # 16 MiB of bf16: one piece of work
_STEP_ELEMENTS = 2**19  # 4 MiB of float64: fits a core's share of the cache


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


def base_and_tuned(base: Base, factors: Factors) -> dict[str, Products]:
    """W0 and W0 + ΔW of every layer, in name order. The base is read once, spread over torch's number of threads.

    The sums are taken in one order: the same bits for any number of threads. Raises UserError where the base lacks a
    layer of the adapter or has it in another shape.
    """
    base.check(factors)
    sums = dict.fromkeys(sorted(factors), (0.0, 0.0))
    for layer, squares, cross in _sums(base, factors):
        sums[layer] = (sums[layer][0] + squares, sums[layer][1] + cross)
    return {layer: _products(factors[layer], *found) for layer, found in sums.items()}


def _products(factor: Factor, squares: float, cross: float) -> Products:
    cross *= factor.scale
    return Products(squares, squares + cross, squares + 2.0 * cross + inner(factor, factor))


def _sums(base: Base, factors: Factors) -> Iterator[tuple[str, float, float]]:
    """(layer, ⟨W0, W0⟩, ⟨W0, BA⟩ without the scale) of each piece, in order; read ahead, worked on side by side."""
    workers = torch.get_num_threads()
    waiting: deque[tuple[str, bool, Future[tuple[float, float]]]] = deque()
    with _one_thread_each(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for layer, first, last in track(list(_pieces(factors)), "read base"):
            factor = factors[layer]
            rows = base.rows(layer, first, last)
            will_need(rows)
            done = pool.submit(piece, rows, factor.a.double(), factor.b[first:last].double())
            waiting.append((layer, last == len(factor.b), done))
            if len(waiting) > 2 * workers:
                yield _taken(base, *waiting.popleft())
        while waiting:
            yield _taken(base, *waiting.popleft())


def _taken(base: Base, layer: str, is_last: bool, done: Future[tuple[float, float]]) -> tuple[str, float, float]:
    squares, cross = done.result()
    if is_last:
        base.forget(layer)
    return layer, squares, cross


def _pieces(factors: Factors) -> Iterator[tuple[str, int, int]]:
    for layer, factor in sorted(factors.items()):
        n_out, step = len(factor.b), max(1, _READ_ELEMENTS // factor.a.shape[1])
        for first in range(0, n_out, step):
            yield layer, first, min(n_out, first + step)


def piece(rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """⟨W, W⟩ and ⟨W, BA⟩ of some rows: W (k, n_in) of any type, A (r, n_in), B (k, r) float64.

    ⟨W, BA⟩ is the sum of (W·Aᵀ) ∘ B: per element of W, r multiplications and one conversion, in the cache.
    """
    step = max(1, _STEP_ELEMENTS // rows.shape[1])
    wide = torch.empty(min(step, len(rows)), rows.shape[1], dtype=torch.float64)
    squares = cross = 0.0
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        block = wide[: len(part)].copy_(part)
        flat = block.view(-1)
        squares += float(torch.dot(flat, flat))
        cross += float((block @ a.T).mul_(b[start : start + step]).sum())
    return squares, cross


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """BLAS inside the pool's threads must not open threads of its own: slower, and another order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
