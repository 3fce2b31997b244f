"""The numbers that make a CogVLM, as plain values: what reads or writes checkpoints needs no transformers for them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1792,
    "num_hidden_layers": 63,
    "num_heads": 16,
    "intermediate_size": 15360,
    "image_size": 490,
    "patch_size": 14,
    "in_channels": 3,
    "num_positions": 1226,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "dropout_prob": 0.0,
}


@dataclass(kw_only=True)
class Architecture:
    """Keys and defaults of a CogVLM's config.json, those of cogvlm-grounding-generalist (490 px, 17.6 B parameters).

    `vision_config` has the keys of VISION_DEFAULTS; those left out are filled in. `rope_dtype` bfloat16 makes the
    rounded rotary table that CogVLM was trained with.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    tie_word_embeddings: bool = False
    use_cache: bool = True
    template_version: str = "base"
    rope_dtype: Literal["float32", "bfloat16"] = "float32"
    vision_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.vision_config = VISION_DEFAULTS | self.vision_config

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From a config.json; keys that are not the model's own are left out."""
        return cls(**{key: values[key] for key in KEYS if key in values})

    @property
    def image_tokens(self) -> int:
        """Tokens of one image in the decoder, without boi and eoi."""
        vision = self.vision_config
        tokens: int = (vision["image_size"] // vision["patch_size"]) ** 2
        return tokens


KEYS = tuple(key.name for key in dataclasses.fields(Architecture))
"""In the order in which config.json has them."""
