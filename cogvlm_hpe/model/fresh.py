"""Weights to start from when there are none: what makes a small model learn to see soon.

The decoder gives all image tokens one position, so where a patch lies is known from the tower's position embedding
alone. Drawn at random and small beside the patches it takes thousands of steps to be found; as waves it is there from
the start. A post-norm block adds a vector of the size of its norm's weight: at 1 the blocks drown the patches. Patches
enter by their lowest cosines, evened out as by a whitening. A layer's keys equal its queries, so that a patch looks at
those near and like it, as in trained towers (Trockman and Kolter 2023, arXiv 2305.09828).
"""

import math

import torch
from torch import Tensor

from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.modeling import CogVLMForCausalLM

_WAVES, _POST_NORM = 0.7, 0.3
_LIKE, _CONTRAST = 2.0, 5.0


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
            width = positions.shape[1]
            query, key, _ = layer.attention.query_key_value.weight.split(width)
            key.copy_(query.mul_(_LIKE))
        kernel = tower.patch_embedding.proj.weight
        kernel.copy_(cosines(kernel.shape[-1], kernel.shape[0]))
    return model


def cosines(side: int, count: int) -> Tensor:
    """(count, 3, side, side) kernels: the lowest cosines of brightness, half as many of two colour contrasts each.

    Natural images have about 1/f amplitudes, so a kernel is scaled by its frequency and all answers are alike in size.
    """
    steps = (torch.arange(side) + 0.5) * math.pi / side
    basis = torch.cos(torch.arange(side)[:, None] * steps)
    order = sorted(((u, v) for u in range(side) for v in range(side)), key=lambda uv: (uv[0] ** 2 + uv[1] ** 2, uv))
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
    out = []
    for colour, share in zip(colours / colours.norm(dim=1, keepdim=True), (2, 1, 1), strict=True):
        for u, v in order[: count * share // 4]:
            wave = torch.outer(basis[u], basis[v])
            strength = _CONTRAST * math.sqrt(0.25 + u * u + v * v) / side
            out.append(strength * colour[:, None, None] * wave / wave.norm())
    return torch.stack(out)


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
