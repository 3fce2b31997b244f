"""Weights to start from when there are none: what makes a small model learn to see soon.

The decoder gives all image tokens one position, so where a patch lies is known from the tower's position embedding
alone. Drawn at random and small beside the patches it takes thousands of steps to be found; as waves it is there from
the start. A post-norm block adds a vector of the size of its norm's weight: at 1 the blocks drown the patches.
"""

import math

import torch
from torch import Tensor

from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.modeling import CogVLMForCausalLM

_WAVES, _POST_NORM = 0.7, 0.3


def fresh_model(config: CogVLMConfig) -> CogVLMForCausalLM:
    """A model with random weights from torch's generator, its tower made ready to learn."""
    model = CogVLMForCausalLM(config)
    vision, tower = config.vision_config, model.model.vision
    positions = tower.patch_embedding.position_embedding.weight
    with torch.no_grad():
        positions[1:] = _WAVES * waves(vision["image_size"] // vision["patch_size"], positions.shape[1])
        for layer in tower.transformer.layers:
            layer.input_layernorm.weight.fill_(_POST_NORM)
            layer.post_attention_layernorm.weight.fill_(_POST_NORM)
    return model


def waves(side: int, width: int) -> Tensor:
    """(side², width) positions of a grid, row by row: sine and cosine of x, then of y.

    The longest wave is four sides, the shortest four patches. Columns that do not divide by four stay zero.
    """
    count = width // 4
    frequency = math.pi / 2 * side ** torch.linspace(0, 1, count)
    angle = (torch.arange(side) + 0.5)[:, None] / side * frequency
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    out = torch.zeros(side, side, width)
    out[..., : 2 * count] = wave[None]
    out[..., 2 * count : 4 * count] = wave[:, None]
    return out.flatten(0, 1)
