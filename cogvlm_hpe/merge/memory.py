"""How much memory a merge may take beside the program itself, and how much it took."""

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from cogvlm_hpe.merge.base import Base
from cogvlm_hpe.merge.factors import Adapter
from cogvlm_hpe.merge.products import READ_ELEMENTS
from cogvlm_hpe.merge.settings import ELEMENTWISE, Settings

_STATUS = Path("/proc/self/status")  # of Linux; elsewhere nothing is measured
_BLOCKS_BYTES = 2**21  # of a thread at work: a block of the base, of the change, of both, and rounded
_ENDS_BYTES = 2**17  # of each tensor: the pages under what its fingerprint is made of, as the kernel maps them
_RUNNING_BYTES = 600 * 2**20  # of a model at work: the libraries that it is loaded with, activations
_ALLOCATOR_BYTES = 16 * 2**20  # what the allocator and libraries keep for themselves


def bound_bytes(settings: Settings, base: Base, adapters: Sequence[Adapter]) -> int:
    """What a rank holds at most: factors, the base's largest tensor, blocks of each thread, and changes that are dense.

    Pages of the base count, as they do in resident memory, although the kernel may take them back at any time.
    """
    threads = torch.get_num_threads()
    shapes = {layer: (len(f.b), f.a.shape[1]) for adapter in adapters for layer, f in adapter.factors.items()}
    layer_elements = max(map(prod, shapes.values()))
    factors = sum(f.a.nbytes + f.b.nbytes for adapter in adapters for f in adapter.factors.values())
    held = 2 * factors + _ALLOCATOR_BYTES + (3 * threads + 1) * _BLOCKS_BYTES
    held += _ENDS_BYTES * len(base.weights.names())
    if settings.method in ELEMENTWISE:  # each change; of those at work a copy to sort and masks
        held += 4 * layer_elements * (len(adapters) + 2 * min(threads, len(adapters)))
    if settings.rank is not None:  # the change, what is left of it, and the factors of all layers
        held += 4 * (3 * layer_elements + sum(settings.rank * sum(shape) for shape in shapes.values()))
    if settings.output != "adapter":
        copies = 1 if settings.output == "hf" or settings.mp == 1 else 3  # put together, and split again
        held += copies * max(_nbytes(base, name) for name in base.weights.names())
        measures = adapters[0].scope != "all"  # what whole weights make of its answers, with the model itself
        return held + measures * (_RUNNING_BYTES + sum(_nbytes(base, name) for name in base.weights.names()))
    if settings.method == "layerwise" and len(adapters) == 1:
        itemsize = max(base.weights.dtype(f"{layer}.weight").itemsize for layer in shapes)
        held += itemsize * (layer_elements + (2 * threads + 1) * min(layer_elements, READ_ELEMENTS))
    return held


def _nbytes(base: Base, name: str) -> int:
    return prod(base.weights.shape(name)) * base.weights.dtype(name).itemsize


class Watch:
    """Looks how far this process's resident memory grows from now until `stop`."""

    def __init__(self) -> None:
        self.start_bytes = _resident("VmRSS")
        self._took_bytes: int | None = None

    def stop(self) -> int:
        """Bytes at the highest above those at the start; later calls say the same."""
        if self._took_bytes is None:
            self._took_bytes = _resident("VmHWM") - self.start_bytes
        return self._took_bytes


def _resident(key: str) -> int:
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)
