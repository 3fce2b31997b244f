"""A CogVLM of a few thousand random weights, for tests of the model room."""

import torch

from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.modeling import CogVLMForCausalLM

VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "intermediate_size": 40,
    "image_size": 42,
    "patch_size": 14,
    "num_positions": 10,
}


def small_model(**changes: object) -> CogVLMForCausalLM:
    """Vocabulary 40, width 32, 3 layers, 9 image tokens; large weights, so that answers differ."""
    torch.manual_seed(0)
    config = CogVLMConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.2,
        vision_config=dict(VISION),
        **changes,
    )
    return CogVLMForCausalLM(config)


def images(number: int = 2) -> torch.Tensor:
    """(number, 3, 42, 42), always the same."""
    return torch.randn(number, 3, 42, 42, generator=torch.Generator().manual_seed(1))
