"""The range of values that the vision tower was trained on."""

import functools

import torch
from torch import Tensor

# OpenAI CLIP's statistics, which EVA2-CLIP and so CogVLM keep.
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept, since sending them to a device makes the host wait."""
    return _MEAN[:, None, None].to(device), _STD[:, None, None].to(device)


def normalise(images_u8: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(I, 3, S, S) uint8, however it lies in memory, to the vision tower's range; contiguous, on the same device."""
    mean, std = _statistics(images_u8.device)
    values = images_u8.to(torch.float32, memory_format=torch.contiguous_format)
    return values.div_(255.0).sub_(mean).div_(std).to(dtype)
