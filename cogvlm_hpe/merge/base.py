"""The base model's weights on disk, read a block of rows at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch

from cogvlm_hpe.merge.factors import Adapter, Factor
from cogvlm_hpe.model.fingerprint import fingerprint
from cogvlm_hpe.model.weights import open_weights
from launcher.errors import UserError

_BLOCK_BYTES = 64 * 2**20


class Base:
    """A base folder in any form that `open_weights` reads."""

    def __init__(self, path: Path) -> None:
        """Open the weights without reading them. Raises UserError where the folder holds no base."""
        self.path = Path(path)
        self.weights = open_weights(self.path)
        self._names = set(self.weights.names())

    def rows(self, layer: str, factor: Factor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, block of rows) of `layer`'s weight, of at most 64 MiB in float64.

        Raises UserError where the base has no such layer or its shape is not the factor's.
        """
        name = f"{layer}.weight"
        if name not in self._names:
            raise UserError(f"adapter layer {layer} is not in base {self.path}: the adapter belongs to another base")
        n_out, n_in = self.weights.shape(name)
        wanted = (factor.b.shape[0], factor.a.shape[1])
        if (n_out, n_in) != wanted:
            raise UserError(
                f"layer {layer}: the base's weight is {n_out}x{n_in}, the adapter's {wanted[0]}x{wanted[1]}; "
                "the adapter belongs to another base"
            )
        step = max(1, _BLOCK_BYTES // (8 * n_in))
        for start in range(0, n_out, step):
            stop = min(n_out, start + step)
            yield start, self.weights.flat(name, start * n_in, stop * n_in).reshape(-1, n_in)


def check_fingerprint(base: Base, adapter: Adapter) -> str | None:
    """The base's fingerprint, after comparing it with the one in hpe.json; None for an adapter that carries none.

    Raises UserError where they differ: factors mean nothing on another base.
    """
    wanted = adapter.hpe.get("base_fingerprint")
    if wanted is None:
        return None
    found = fingerprint(base.path)
    if found != wanted:
        raise UserError(
            f"adapter {adapter.path} was trained on another base: its hpe.json says fingerprint {str(wanted)[:16]}…, "
            f"{base.path} has {found[:16]}…; give that base with --base"
        )
    return found
