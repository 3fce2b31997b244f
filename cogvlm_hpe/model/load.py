"""From a folder to a model: bases, adapters on them, and what the folder says about both."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers.utils import logging

from cogvlm_hpe.dialogue import DEFAULT_PROMPTS
from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.fingerprint import fingerprint
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.tokenizer import FILE_NAME as TOKENIZER_FILE
from cogvlm_hpe.model.tokenizer import load_tokenizer
from launcher.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
NOTES_FILE = "hpe.json"
_PACKAGED = Path(__file__).parent.parent / "configs"

logging.disable_progress_bar()


@dataclass
class Loaded:
    """A model ready to answer, with what its folder says of how it is spoken to."""

    model: CogVLMForCausalLM
    tokenizer: Tokenizer
    notes: dict[str, Any]  # hpe.json: scope, answer_format, prompts, …; defaults for a bare base


def resolve_base(name: str | Path) -> Path:
    """A base folder by path, or by the name of a packaged one (`tiny`). Raises UserError."""
    for folder in (Path(name), _PACKAGED / str(name)):
        if (folder / "config.json").is_file():
            return folder
    packaged = sorted(p.parent.name for p in _PACKAGED.glob("*/config.json"))
    raise UserError(f"{name}: no base model there (no config.json); name its folder, or one of {', '.join(packaged)}")


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a peft adapter."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def read_notes(folder: str | Path) -> dict[str, Any]:
    """`hpe.json` of a folder over the defaults of a bare base."""
    path = Path(folder) / NOTES_FILE
    notes = {"scope": "all", "answer_format": "offset", "prompts": dict(DEFAULT_PROMPTS)}
    if path.is_file():
        try:
            notes |= json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); write the adapter again") from None
    return notes


def base_of(adapter: str | Path) -> Path:
    """The base folder that an adapter folder names. Raises UserError."""
    value = json.loads((Path(adapter) / ADAPTER_CONFIG).read_text())
    return resolve_base(value["base_model_name_or_path"])


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> CogVLMForCausalLM:
    """The base's weights, every name matched. Raises UserError listing missing and unexpected names."""
    config = read_config(folder)
    try:
        model, info = CogVLMForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: the weights cannot be read ({_first_line(error)})") from None
    wrong = [f"{kind} {sorted(info[kind])[:3]}" for kind in ("missing_keys", "unexpected_keys") if info[kind]]
    if wrong:
        raise UserError(f"{folder}: not the weights its config.json describes ({'; '.join(wrong)})")
    return model


def read_config(folder: Path) -> CogVLMConfig:
    """config.json, which as published has no model_type. Raises UserError."""
    try:
        value = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: cannot be read ({_first_line(error)})") from None
    return CogVLMConfig(**{key: v for key, v in value.items() if key not in ("auto_map", "model_type")})


def load(
    name: str | Path, adapter: str | Path | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Loaded:
    """A base, an adapter folder (it names its base), or a base with `adapter` on it; in evaluation mode.

    Raises UserError where a folder is missing, or an adapter was made on another base.
    """
    if adapter is None and is_adapter(name):
        adapter, name = name, base_of(name)
    folder = resolve_base(name)
    model = load_base(folder, dtype)
    notes = read_notes(folder if adapter is None else adapter)
    if adapter is not None:
        put_adapter(model, Path(adapter), folder, notes)
    return Loaded(model.to(device).eval(), load_tokenizer(_tokenizer_folder(folder, notes)), notes)


def put_adapter(model: CogVLMForCausalLM, adapter: Path, base: Path, notes: dict[str, Any]) -> None:
    """Inject a peft adapter in place and set its scope. Raises UserError."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    if not is_adapter(adapter):
        raise UserError(f"{adapter}: no adapter there (no {ADAPTER_CONFIG}); name an adapter or checkpoint folder")
    made_on = notes.get("base_fingerprint")
    if made_on and made_on != fingerprint(base):
        raise UserError(f"{adapter}: made on another base than {base} (fingerprints differ); name its own base")
    config = LoraConfig.from_pretrained(str(adapter))
    config.inference_mode = True
    try:
        inject_adapter_in_model(config, model)
        state = load_file(str(adapter / "adapter_model.safetensors"))
        result = set_peft_model_state_dict(model, state)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{adapter}: the adapter cannot be read ({_first_line(error)})") from None
    lost = [key for key in result.missing_keys if "lora_" in key] + list(result.unexpected_keys)
    if lost:
        raise UserError(f"{adapter}: {len(lost)} tensors do not fit its adapter_config.json, the first {lost[0]}")
    model.adapter_scope = notes["scope"]


def _tokenizer_folder(base: Path, notes: dict[str, Any]) -> Path:
    return base if (base / TOKENIZER_FILE).is_file() else Path(notes.get("tokenizer") or base)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
