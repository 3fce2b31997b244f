"""The base model's weights on disk, read a block of rows at a time."""

import ctypes
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch

from cogvlm_hpe.merge.factors import Adapter, Factor, Factors
from cogvlm_hpe.model.fingerprint import fingerprint
from cogvlm_hpe.model.weights import open_weights
from launcher.errors import UserError

_MUST_AGREE = ("scope", "answer_format", "prompts", "base_fingerprint")


class Base:
    """A base folder in any form that `open_weights` reads."""

    def __init__(self, path: Path) -> None:
        """Open the weights without reading them. Raises UserError where the folder holds no base."""
        self.path = Path(path)
        self.weights = open_weights(self.path)
        self._names = set(self.weights.names())

    def check(self, factors: Factors) -> None:
        """Compare layers and shapes; nothing is read. Raises UserError naming a layer that this base does not have."""
        for layer, factor in sorted(factors.items()):
            self._check_layer(layer, factor)

    def _check_layer(self, layer: str, factor: Factor) -> None:
        name = f"{layer}.weight"
        if name not in self._names:
            raise UserError(f"adapter layer {layer} is not in base {self.path}: the adapter belongs to another base")
        found, wanted = self.weights.shape(name), (factor.b.shape[0], factor.a.shape[1])
        if found != wanted:
            raise UserError(
                f"layer {layer}: the base's weight is {'x'.join(map(str, found))}, the adapter's "
                f"{wanted[0]}x{wanted[1]}; the adapter belongs to another base"
            )

    def rows(self, layer: str, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a layer's weight, (last - first, n_in), as stored."""
        n_in = self.weights.shape(f"{layer}.weight")[1]
        return self.weights.flat(f"{layer}.weight", first * n_in, last * n_in).reshape(-1, n_in)

    def forget(self, layer: str) -> None:
        """Give back the memory that reading this layer filled."""
        self.weights.forget(f"{layer}.weight")


def will_need(rows: torch.Tensor) -> None:
    """Ask the kernel to fetch the pages under these rows of a mapped file while others are worked on."""
    first = rows.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = rows.data_ptr() + rows.nbytes - first
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_WILLNEED)


def check_fingerprint(base: Base, adapter: Adapter) -> None:
    """Raise UserError where hpe.json names another base: factors mean nothing there. A foreign adapter names none."""
    wanted = adapter.hpe.get("base_fingerprint")
    if wanted is not None and (found := fingerprint(base.path)) != wanted:
        raise UserError(
            f"adapter {adapter.path} was trained on another base: its hpe.json says fingerprint {str(wanted)[:16]}…, "
            f"{base.path} has {found[:16]}…; give that base with --base"
        )


def check_together(adapters: Sequence[Adapter]) -> None:
    """Raises UserError where adapters differ in what one adapter can only say once."""
    for other in adapters[1:]:
        for key in _MUST_AGREE:
            if other.hpe.get(key) != adapters[0].hpe.get(key):
                raise UserError(
                    f"adapters {adapters[0].path} and {other.path} differ in {key} (hpe.json); "
                    "they cannot be merged into one"
                )
