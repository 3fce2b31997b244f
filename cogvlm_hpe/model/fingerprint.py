"""Which base is this: a hash that is cheap at 35 GB and the same for every folder that holds the same weights."""

import hashlib
import json
from functools import lru_cache
from math import prod
from pathlib import Path

from cogvlm_hpe.model.weights import Weights, open_weights

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

    The same for the Hugging Face and the SAT form of one base; of an unmerged SAT LoRA, that of its base. Reads a few
    pages of each tensor, not the tensors. Raises UserError where the folder holds no base.
    """
    return fingerprint_of(open_weights(folder))


def fingerprint_of(weights: Weights) -> str:
    """As `fingerprint`, of weights that are open already."""
    import torch

    said = {key: getattr(weights.architecture, key) for key in _CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(said).encode())
    for name in weights.names():
        shape = weights.shape(name)
        row, total = prod(shape[1:]), prod(shape)
        first = min(total, _SAMPLES, max(1, _SAMPLES // row) * row)
        head = weights.flat(name, 0, first).contiguous()
        tail = weights.flat(name, total - min(row if shape else 1, _SAMPLES), total).contiguous()
        digest.update(f"{name} {shape} {weights.dtype(name)}".encode())
        digest.update(head.view(torch.uint8).numpy().tobytes() + tail.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
