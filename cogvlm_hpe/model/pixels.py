"""The range of values that the vision tower was trained on."""

import torch
from torch import Tensor

# OpenAI CLIP's statistics, which EVA2-CLIP and so CogVLM keep.
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def normalise(images_u8: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(I, 3, S, S) uint8 to the vision tower's range."""
    return ((images_u8.float() / 255.0 - _MEAN[:, None, None]) / _STD[:, None, None]).to(dtype)
