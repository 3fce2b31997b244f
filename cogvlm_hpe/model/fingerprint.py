"""Which base is this: a hash that is cheap at 35 GB and the same for every folder that holds the same weights."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from safetensors import safe_open

from launcher.errors import UserError

_SAMPLES = 64  # values of each tensor that enter the hash
_CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)


@lru_cache(maxsize=8)
def fingerprint(folder: Path) -> str:
    """Hex digest of a base: config, and of each tensor name, shape, dtype and values at fixed places.

    Reads a few pages of each tensor, not the tensors. Raises UserError where the folder holds no safetensors.
    """
    import torch

    config = json.loads((folder / "config.json").read_text())
    digest = hashlib.sha256(json.dumps({key: config.get(key) for key in _CONFIG_KEYS}).encode())
    where = tensor_files(folder)
    for name in sorted(n for n in where if not n.endswith("rotary_emb.inv_freq")):
        with safe_open(where[name], framework="pt") as file:
            view = file.get_slice(name)
            shape = view.get_shape()
            rows = view[: max(1, _SAMPLES // max(1, _row_size(shape)))] if shape else file.get_tensor(name)
            values = rows.reshape(-1)[:_SAMPLES].contiguous()
            last = (view[shape[0] - 1 :] if shape else rows).reshape(-1)[-_SAMPLES:].contiguous()
        digest.update(f"{name} {tuple(shape)} {values.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes() + last.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name to the safetensors file that holds it. Raises UserError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no *.safetensors there; a base folder holds config.json and its weights")
    where: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                where |= dict.fromkeys(file.keys(), path)
        except Exception as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
    return where


def _row_size(shape: list[int]) -> int:
    size = 1
    for side in shape[1:]:
        size *= side
    return size
