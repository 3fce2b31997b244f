"""The numbers that make a CogVLM: decoder, experts and vision tower."""

from dataclasses import field
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from cogvlm_hpe.model.folders import HF_CONFIG, read_json, resolve_base


class CogVLMConfig(PreTrainedConfig):
    """Configuration of a CogVLM; reads the published `config.json` files, which carry no `model_type`.

    Defaults are those of cogvlm-grounding-generalist (490 px, 17.6 B parameters). `vision_config` keys: hidden_size,
    num_hidden_layers, num_heads, intermediate_size, image_size, patch_size, in_channels, num_positions,
    layer_norm_eps, hidden_act. `rope_dtype` bfloat16 makes the rounded rotary table that CogVLM was trained with.
    """

    model_type = "cogvlm"

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

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = VISION_DEFAULTS | self.vision_config
        super().__post_init__(**kwargs)

    @classmethod
    def named(cls, name: str) -> "CogVLMConfig":
        """A configuration by its name: one of `PUBLISHED`, or the packaged `tiny`. Raises UserError for another."""
        return cls.from_dict(PUBLISHED[name] if name in PUBLISHED else read_json(resolve_base(name) / HF_CONFIG))

    @property
    def image_tokens(self) -> int:
        """Tokens of one image in the decoder, without boi and eoi."""
        vision = self.vision_config
        return (vision["image_size"] // vision["patch_size"]) ** 2


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

_SMALL_IMAGE = {"vision_config": {"image_size": 224, "num_positions": 257}}

PUBLISHED: dict[str, dict[str, Any]] = {
    "cogvlm-grounding-generalist": {"template_version": "base"},
    "cogvlm-chat": {"template_version": "chat"},
    "cogvlm-base-490": {"template_version": "base"},
    "cogvlm-base-224": {"template_version": "base"} | _SMALL_IMAGE,
}
"""What sets the published checkpoints apart; everything else is the default. `tiny` is packaged with its weights."""

# exist_ok: a transformers that brings a "cogvlm" of its own is no reason to fail.
AutoConfig.register(CogVLMConfig.model_type, CogVLMConfig, exist_ok=True)
