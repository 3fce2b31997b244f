"""CogVLM for transformers 5, under the parameter names of the published checkpoints.

Importing this package makes the model known to transformers' Auto classes as model_type "cogvlm".
"""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.processor import CogVLMProcessor, CogVLMTokenizer

__all__ = ["CogVLMConfig", "CogVLMForCausalLM", "CogVLMProcessor", "CogVLMTokenizer"]

# exist_ok: a transformers that brings a "cogvlm" of its own is no reason to fail.
AutoConfig.register(CogVLMConfig.model_type, CogVLMConfig, exist_ok=True)
AutoModelForCausalLM.register(CogVLMConfig, CogVLMForCausalLM, exist_ok=True)
AutoModelForImageTextToText.register(CogVLMConfig, CogVLMForCausalLM, exist_ok=True)
AutoTokenizer.register(CogVLMConfig, tokenizer_class=CogVLMTokenizer, exist_ok=True)
AutoProcessor.register(CogVLMConfig, CogVLMProcessor, exist_ok=True)
