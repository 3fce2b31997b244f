"""What lies in a folder: a base, an adapter, what it says of itself. Reads names and JSON only, without torch."""

import json
from pathlib import Path
from typing import Any

from cogvlm_hpe.dialogue import DEFAULT_PROMPTS
from launcher.errors import UserError

HF_CONFIG = "config.json"
SAT_CONFIG = "model_config.json"
ADAPTER_CONFIG = "adapter_config.json"
NOTES_FILE = "hpe.json"
_PACKAGED = Path(__file__).parent.parent / "configs"


def resolve_base(name: str | Path) -> Path:
    """A base folder, Hugging Face's or SAT's, by path or by the name of a packaged one (`tiny`). Raises UserError."""
    for folder in (Path(name), _PACKAGED / str(name)):
        if any((folder / file).is_file() for file in (HF_CONFIG, SAT_CONFIG)):
            return folder
    packaged = sorted(p.parent.name for p in _PACKAGED.glob("*/config.json"))
    said = f"no base model there (no {HF_CONFIG} or {SAT_CONFIG})"
    raise UserError(f"{name}: {said}; name its folder, or one of {', '.join(packaged)}")


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a peft adapter."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def base_of(adapter: str | Path) -> Path:
    """The base folder that an adapter folder names. Raises UserError."""
    path = Path(adapter) / ADAPTER_CONFIG
    base = read_json(path).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path}: names no base (base_model_name_or_path); write its base's folder there")
    return resolve_base(base)


def read_notes(folder: str | Path) -> dict[str, Any]:
    """`hpe.json` of a folder over the defaults of a bare base. Raises UserError."""
    path = Path(folder) / NOTES_FILE
    notes: dict[str, Any] = {"scope": "all", "answer_format": "offset", "prompts": dict(DEFAULT_PROMPTS)}
    if path.is_file():
        notes |= read_json(path)
        notes["prompts"] = {**DEFAULT_PROMPTS, **notes["prompts"]}  # a file may hold those that are its own alone
    return notes


def tokenizer_folder(base: Path, notes: dict[str, Any]) -> Path:
    """Where the tokenizer lies that an adapter was trained with, as far as it is still there; else the base."""
    trained_with = Path(notes.get("tokenizer") or base)
    return trained_with if trained_with.exists() else base


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; copy it from where the folder came") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; copy it again")
    return value
