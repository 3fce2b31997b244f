"""transformers' view of a CogVLM's configuration; the values themselves are in architecture.py."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from cogvlm_hpe.model.architecture import Architecture
from cogvlm_hpe.model.folders import HF_CONFIG, read_json, resolve_base


class CogVLMConfig(Architecture, PreTrainedConfig):
    """Configuration of a CogVLM; reads the published `config.json` files, which carry no `model_type`."""

    model_type = "cogvlm"

    def __post_init__(self, **kwargs: Any) -> None:
        Architecture.__post_init__(self)
        PreTrainedConfig.__post_init__(self, **kwargs)

    @classmethod
    def named(cls, name: str) -> "CogVLMConfig":
        """A configuration by its name: one of `PUBLISHED`, or the packaged `tiny`. Raises UserError for another."""
        return cls.from_dict(PUBLISHED[name] if name in PUBLISHED else read_json(resolve_base(name) / HF_CONFIG))


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
