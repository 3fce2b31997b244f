"""What is worth watching beside the loss: rates and the device's peak, memory, and how far the factors have moved."""

import math
import resource
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor
from torch.profiler import profile, schedule, tensorboard_trace_handler

from cogvlm_hpe.config import RunConfig
from cogvlm_hpe.merge.products import inner
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.train.adapter import factors_of, group_of
from cogvlm_hpe.train.plan import trace

_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A40": 149.7e12, "L40S": 362e12}
"""Dense bfloat16 FLOP/s by a part of the device's name, from NVIDIA's data sheets; the first that fits counts."""
_QUESTIONS, _TOKENS = 4, 64


@dataclass(frozen=True)
class Work:
    """FLOPs of training, without what is recomputed: so many an image, and so many a token of text."""

    image_flops: float
    token_flops: float

    @classmethod
    def of(cls, config: RunConfig, model_config: CogVLMConfig) -> "Work":
        """Two traces in true shapes on the meta device, and a line through them; some seconds for a large model."""
        few, many = (trace(config, model_config, questions, _TOKENS) for questions in (1, _QUESTIONS))
        a, b = (t.forward_flops + t.backward_flops for t in (few, many))
        images = config.train.micro_batch
        token_flops = (b - a) / (images * (_QUESTIONS - 1) * _TOKENS)
        return cls(a / images - _TOKENS * token_flops, token_flops)

    def flops(self, images: float, text_tokens: float) -> float:
        """Of so many images and tokens."""
        return images * self.image_flops + text_tokens * self.token_flops


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name, where known."""
    return next((peak for part, peak in _PEAKS.items() if part in device_name), None)


def device_name() -> str:
    """Name of this rank's GPU, or nothing."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def memory_gb() -> float:
    """Most memory this rank has held: of its GPU, or of its process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def delta_norms(weights: dict[str, Tensor], lora: LoraConfig) -> dict[str, list[float]]:
    """Frobenius norms of what trained factors add, scaling · B A, by group of layers in the model's order."""
    norms: dict[str, list[float]] = defaultdict(list)
    for layer, factor in factors_of(weights, lora).items():
        norms[group_of(f"{layer}.weight")].append(math.sqrt(max(0.0, inner(factor, factor))))
    return dict(norms)


def whole_norm(norms: list[float]) -> float:
    """Of all layers together."""
    return math.sqrt(sum(norm**2 for norm in norms))


class Profiler:
    """Told of every step; this base class does nothing with it."""

    def step(self) -> None:
        """A step has ended."""


@contextmanager
def profiled(config: RunConfig) -> Iterator[Profiler | profile]:
    """With train.profile a trace of steps 3 to 5 goes to `profile/` in the run folder, one file a rank."""
    if not config.train.profile:
        yield Profiler()
        return
    handler = tensorboard_trace_handler(str(Path(config.run_dir) / "profile"))
    with profile(schedule=schedule(wait=1, warmup=1, active=3, repeat=1), on_trace_ready=handler) as profiler:
        yield profiler
