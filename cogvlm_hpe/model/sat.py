"""CogVLM's original format, SwissArmyTransformer (SAT): names, configuration, tensors split over model-parallel files.

    DIR/model_config.json, DIR/latest (names the folder of the weights, e.g. 1)
    DIR/1/mp_rank_00_model_states.pt, mp_rank_01_… = {"module": state dict, …}

Weights are the same in both formats, one to one, with no reshape and no permutation; only names differ.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cogvlm_hpe.model.architecture import Architecture
from cogvlm_hpe.model.folders import SAT_CONFIG, read_json
from launcher.errors import UserError

INV_FREQ = "mixins.rotary.rotary_emb.inv_freq"

_LAYER, _SAT_LAYER = "model.layers.#.", "transformer.layers.#."
_VIT, _SAT_VIT = "model.vision.transformer.layers.#.", "mixins.eva.vit_model.transformer.layers.#."
_MODULES = {
    "model.embed_tokens": "transformer.word_embeddings",
    "model.norm": "transformer.final_layernorm",
    "lm_head": "mixins.lm.lm_head",
    _LAYER + "input_layernorm": _SAT_LAYER + "input_layernorm",
    _LAYER + "post_attention_layernorm": _SAT_LAYER + "post_attention_layernorm",
    _LAYER + "self_attn.language_expert_query_key_value": _SAT_LAYER + "attention.query_key_value",
    _LAYER + "self_attn.language_expert_dense": _SAT_LAYER + "attention.dense",
    _LAYER + "self_attn.vision_expert_query_key_value": "mixins.rotary.vision_query_key_value_list.#",
    _LAYER + "self_attn.vision_expert_dense": "mixins.rotary.vision_dense_list.#",
    _LAYER + "mlp.language_mlp.up_proj": _SAT_LAYER + "mlp.dense_h_to_4h",
    _LAYER + "mlp.language_mlp.down_proj": _SAT_LAYER + "mlp.dense_4h_to_h",
    _LAYER + "mlp.language_mlp.gate_proj": "mixins.mlp.gate_proj.#",
    _LAYER + "mlp.vision_mlp.up_proj": "mixins.mlp.vision_dense_h_to_4h_list.#",
    _LAYER + "mlp.vision_mlp.down_proj": "mixins.mlp.vision_dense_4h_to_h_list.#",
    _LAYER + "mlp.vision_mlp.gate_proj": "mixins.mlp.vision_gate_proj.#",
    "model.vision.patch_embedding.proj": "mixins.eva.vit_model.mixins.patch_embedding.proj",
    "model.vision.patch_embedding.position_embedding": "mixins.eva.vit_model.transformer.position_embeddings",
    _VIT + "input_layernorm": _SAT_VIT + "input_layernorm",
    _VIT + "post_attention_layernorm": _SAT_VIT + "post_attention_layernorm",
    _VIT + "attention.query_key_value": _SAT_VIT + "attention.query_key_value",
    _VIT + "attention.dense": _SAT_VIT + "attention.dense",
    _VIT + "mlp.fc1": _SAT_VIT + "mlp.dense_h_to_4h",
    _VIT + "mlp.fc2": _SAT_VIT + "mlp.dense_4h_to_h",
    "model.vision.linear_proj.linear_proj": "mixins.eva.linear_proj.linear_proj",
    "model.vision.linear_proj.norm1": "mixins.eva.linear_proj.norm1",
    "model.vision.linear_proj.gate_proj": "mixins.eva.linear_proj.gate_proj",
    "model.vision.linear_proj.dense_h_to_4h": "mixins.eva.linear_proj.dense_h_to_4h",
    "model.vision.linear_proj.dense_4h_to_h": "mixins.eva.linear_proj.dense_4h_to_h",
}
_PARAMETERS = {
    "model.vision.boi": "mixins.eva.boi",
    "model.vision.eoi": "mixins.eva.eoi",
    "model.vision.patch_embedding.cls_embedding": "mixins.eva.vit_model.transformer.word_embeddings.weight",
}
_HF_MODULES = {sat: hf for hf, sat in _MODULES.items()}
_HF_PARAMETERS = {sat: hf for hf, sat in _PARAMETERS.items()}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def sat_name(name: str) -> str:
    """SAT's name of a parameter. Raises KeyError for one that is not CogVLM's."""
    return _PARAMETERS.get(name) or _renamed(name, _MODULES)


def hf_name(name: str) -> str:
    """Hugging Face name of a parameter. Raises KeyError for one that is not CogVLM's."""
    return _HF_PARAMETERS.get(name) or _renamed(name, _HF_MODULES)


def sat_module(name: str) -> str:
    """SAT's name of a linear layer. Raises KeyError."""
    return sat_name(f"{name}.weight").removesuffix(".weight")


def hf_module(name: str) -> str:
    """Hugging Face name of a linear layer. Raises KeyError."""
    return hf_name(f"{name}.weight").removesuffix(".weight")


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    module, _, suffix = name.rpartition(".")
    numbers = _NUMBER.findall(module)
    target = modules.get(_NUMBER.sub("#", module))
    if target is None or suffix not in ("weight", "bias") or len(numbers) != target.count("#"):
        raise KeyError(name)
    return f"{target.replace('#', numbers[0]) if numbers else target}.{suffix}"


_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "inner_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_sequence_length",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "template_version": "template_version",  # not SAT's own key; it ignores it
}
_VISION_KEYS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "inner_hidden_size",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "num_positions": "max_sequence_length",
}
_SAT_EPS = 1e-5  # SAT writes layernorm_epsilon only where it is another one
_SAT_IMAGE_LENGTH = 256
_FIXED = {"layernorm_order": "pre", "use_bias": False, "num_multi_query_heads": 0, "num_experts": 1}
_VISION_FIXED = {
    "model_class": "EVA2CLIPModel",
    "vocab_size": 1,
    "layernorm_order": "post",
    "use_final_layernorm": False,
    "row_parallel_linear_final_bias": False,
    "pre_len": 1,
    "post_len": 0,
}
_ROPE_THETA = 10000.0


def read_sat_config(folder: Path) -> Architecture:
    """What model_config.json says of the model. Raises UserError where it describes another architecture."""
    path = folder / SAT_CONFIG
    value = read_json(path)
    vision = value.get("eva_args")
    if not isinstance(vision, dict):
        raise UserError(f"{path}: has no eva_args, so it is no CogVLM; name the folder of a CogVLM checkpoint")
    for given, fixed in ((value, _FIXED), (vision, _VISION_FIXED)):
        for key, wanted in fixed.items():
            if given.get(key, wanted) != wanted:
                raise UserError(f"{path}: {key} is {given[key]!r}; only CogVLM's {wanted!r} can be read")
    missing = [key for key in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size") if key not in value]
    missing += [f"eva_args.{key}" for key in (*_VISION_KEYS.values(), "image_size") if key not in vision]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; take the file that came with the checkpoint")
    return _config_from_sat(path, value, vision)


def _config_from_sat(path: Path, value: dict[str, Any], vision: dict[str, Any]) -> Architecture:
    size = vision["image_size"]
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise UserError(f"{path}: eva_args.image_size is {size}; only square images can be read")
    tower = {key: vision[sat] for key, sat in _VISION_KEYS.items()}
    tower |= {"image_size": sides.pop(), "layer_norm_eps": vision.get("layernorm_epsilon", _SAT_EPS)}
    value = {"inner_hidden_size": 4 * value["hidden_size"]} | value
    config = Architecture(
        **{key: value[sat] for key, sat in _KEYS.items() if sat in value},
        rms_norm_eps=value.get("layernorm_epsilon", _SAT_EPS),
        vision_config=tower,
    )
    given = value.get("image_length", _SAT_IMAGE_LENGTH)
    if given != config.image_tokens:
        raise UserError(
            f"{path}: image_length is {given}, but {tower['image_size']} px in patches of {tower['patch_size']} make "
            f"{config.image_tokens}; set it to that"
        )
    return config


def sat_config(config: Architecture, mp_size: int) -> dict[str, Any]:
    """model_config.json for a configuration of ours. Raises UserError where SAT's CogVLM cannot express it."""
    if config.rope_theta != _ROPE_THETA:
        raise UserError(f"rope_theta is {config.rope_theta}; SAT's CogVLM has {_ROPE_THETA:g} written in its code")
    tower = config.vision_config
    size, eps = tower["image_size"], tower["layer_norm_eps"]
    value = {"model_class": "CogVLMModel", "tokenizer_type": "vicuna-7b-v1.5", "model_parallel_size": mp_size}
    value |= {sat: getattr(config, key) for key, sat in _KEYS.items()}
    value |= {"layernorm_order": "pre", "use_bias": False, "image_length": config.image_tokens}
    vision = _VISION_FIXED | {sat: tower[key] for key, sat in _VISION_KEYS.items()}
    vision |= {"model_parallel_size": mp_size, "image_size": [size, size]}
    if config.rms_norm_eps != _SAT_EPS:
        value["layernorm_epsilon"] = config.rms_norm_eps
    if eps != _SAT_EPS:
        vision["layernorm_epsilon"] = eps
    return value | {"eva_args": vision}


def inv_freq(config: Architecture) -> Tensor:
    """(head_dim / 2,) float32: the rotary table that both formats carry although it follows from the configuration."""
    head_dim = config.hidden_size // config.num_attention_heads
    return 1.0 / _ROPE_THETA ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


Rule = Literal["columns", "thirds", "rows", "copy"]
_PLAIN_EMBEDDING_BELOW = 1000  # SAT does not split smaller vocabularies
_THIRDS = re.compile(r".*query_key_value\.(weight|bias)")
_COLUMNS = re.compile(r"lm_head\.weight|.*\.mlp\.(language|vision)_mlp\.(up|gate)_proj\.weight|.*\.mlp\.fc1\.\w+")
_ROWS = re.compile(r".*\.(language_expert_dense|vision_expert_dense|attention\.dense|down_proj|fc2)\.weight")


def split_rule(name: str, vocab_size: int) -> Rule:
    """How SAT's model parallelism splits a parameter (Hugging Face name).

    columns: dimension 0; thirds: dimension 0 of each of q, k and v; rows: dimension 1; copy: each rank holds all of it.
    """
    if _THIRDS.fullmatch(name):
        return "thirds"
    if _COLUMNS.fullmatch(name) or (name == "model.embed_tokens.weight" and vocab_size >= _PLAIN_EMBEDDING_BELOW):
        return "columns"
    return "rows" if _ROWS.fullmatch(name) else "copy"


def split(tensor: Tensor, rule: Rule, rank: int, mp_size: int) -> Tensor:
    """The part of a whole tensor that model-parallel rank `rank` holds."""
    if rule == "copy" or mp_size == 1:
        return tensor
    if rule == "thirds":
        return torch.cat([third.chunk(mp_size)[rank] for third in tensor.chunk(3)])
    return tensor.chunk(mp_size, dim=1 if rule == "rows" else 0)[rank]


def split_shape(shape: tuple[int, ...], rule: Rule, mp_size: int) -> tuple[int, ...]:
    """Shape of one rank's part of a whole tensor."""
    dim = {"rows": 1, "copy": None}.get(rule, 0)
    return tuple(side // mp_size if at == dim else side for at, side in enumerate(shape))


def merge(parts: list[Tensor], rule: Rule) -> Tensor:
    """The whole tensor from every rank's part: the inverse of `split`."""
    if rule == "copy" or len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=1) if rule == "rows" else torch.cat(_in_order(parts, rule))


def _in_order(parts: list[Tensor], rule: Rule) -> list[Tensor]:
    """Pieces of dimension 0 in the order they have in the whole tensor."""
    if rule != "thirds":
        return parts
    return [part.chunk(3)[third] for third in range(3) for part in parts]


def merge_flat(parts: list[Tensor], rule: Rule, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened whole tensor, from only the parts they lie in."""
    if rule == "copy" or len(parts) == 1:
        return parts[0].reshape(-1)[start:stop]
    if rule == "rows":
        width = sum(part.shape[1] for part in parts)
        first, last = start // width, -(-stop // width)
        rows = torch.cat([part[first:last] for part in parts], dim=1)
        return rows.reshape(-1)[start - first * width : stop - first * width]
    found, at = [], 0
    for piece in _in_order(parts, rule):
        if start < at + piece.numel() and at < stop:
            found.append(piece.reshape(-1)[max(0, start - at) : stop - at])
        at += piece.numel()
    return torch.cat(found) if found else parts[0].new_empty(0)
