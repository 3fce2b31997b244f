"""The base model's weights on disk, read a block of rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cogvlm_hpe.merge.factors import Adapter, Factor
from cogvlm_hpe.model.fingerprint import fingerprint, tensor_files
from launcher.errors import UserError

_BLOCK_BYTES = 64 * 2**20


class Base:
    """A base folder in Hugging Face form: one safetensors file, or several with an index."""

    def __init__(self, path: Path) -> None:
        """Find which file holds which tensor. Raises UserError where the folder holds no safetensors."""
        self.path = Path(path)
        self._files = tensor_files(self.path)

    def rows(self, layer: str, factor: Factor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, block of rows) of `layer`'s weight, of at most 64 MiB in float64.

        Raises UserError where the base has no such layer or its shape is not the factor's.
        """
        from safetensors import safe_open

        name = f"{layer}.weight"
        if name not in self._files:
            raise UserError(f"adapter layer {layer} is not in base {self.path}: the adapter belongs to another base")
        with safe_open(self._files[name], framework="pt") as tensors:
            weight: Any = tensors.get_slice(name)
            n_out, n_in = weight.get_shape()
            wanted = (factor.b.shape[0], factor.a.shape[1])
            if (n_out, n_in) != wanted:
                raise UserError(
                    f"layer {layer}: the base's weight is {n_out}x{n_in}, the adapter's {wanted[0]}x{wanted[1]}; "
                    "the adapter belongs to another base"
                )
            step = max(1, _BLOCK_BYTES // (8 * n_in))
            for start in range(0, n_out, step):
                yield start, weight[start : start + step]


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
