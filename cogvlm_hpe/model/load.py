"""From a folder to a model: bases, adapters on them, and what the folder says about both."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from cogvlm_hpe.model.configuration import CogVLMConfig
from cogvlm_hpe.model.fingerprint import fingerprint
from cogvlm_hpe.model.folders import (
    ADAPTER_CONFIG,
    base_of,
    is_adapter,
    read_notes,
    resolve_base,
    tokenizer_folder,
)
from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.model.tokenizer import find_tokenizer, load_tokenizer
from cogvlm_hpe.model.weights import Weights, open_weights
from launcher.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""By the names that configs use."""
_GROUPS_SAID = 4  # of each kind of wrong tensor, so that a message stays readable


@dataclass
class Loaded:
    """A model ready to answer, with what its folder says of how it is spoken to."""

    model: CogVLMForCausalLM
    tokenizer: Tokenizer
    notes: dict[str, Any]  # hpe.json: scope, answer_format, prompts, …; defaults for a bare base


def load_base(
    folder: Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", *, own: bool = False
) -> CogVLMForCausalLM:
    """The base with its weights, made without memory and filled tensor by tensor; in evaluation mode.

    On the CPU, where `dtype` is the file's, a parameter is a view of the mapped file: nothing is copied, and all
    processes of a machine share its pages. Such memory is for frozen weights; `own` copies what will be trained.
    Raises UserError where the folder does not hold exactly the model's tensors, before any of them is read.
    """
    weights = open_weights(folder)
    model = empty_model(weights.config, dtype)
    check_tensors(weights, model)
    state = {name: weights.read(name).to(device, dtype, copy=own) for name in weights.names()}
    model.load_state_dict(state, assign=True)
    model.config.name_or_path = str(folder)
    return model


def empty_model(config: CogVLMConfig, dtype: torch.dtype) -> CogVLMForCausalLM:
    """A model in evaluation mode whose parameters have shapes and no memory yet (device `meta`)."""
    config.dtype = dtype
    with torch.device("meta"):
        model = CogVLMForCausalLM(config).to(dtype)
    lost = [name for name, _ in model.named_buffers()]
    assert not lost, f"buffers {lost}: have no values on device meta and come from no file; compute them in the call"
    return model.eval()


def check_tensors(weights: Weights, model: nn.Module) -> None:
    """Raise UserError unless the folder holds exactly the model's tensors in their shapes; nothing is read."""
    wanted = {name: _sides(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: _sides(weights.shape(name)) for name in weights.names()}
    other = {n: f"{found[n]}, not {wanted[n]}" for n in wanted.keys() & found.keys() if found[n] != wanted[n]}
    wrong = {
        "missing": dict.fromkeys(wanted.keys() - found.keys(), ""),
        "unexpected": dict.fromkeys(found.keys() - wanted.keys(), ""),
        "of another shape": other,
    }
    said = [f"{kind} {_grouped(tensors)}" for kind, tensors in wrong.items() if tensors]
    if said:
        raise UserError(
            f"{weights.folder}: not the tensors its config describes: {'; '.join(said)}; "
            "take config and weights of one model, and all files of it"
        )


def _grouped(tensors: Mapping[str, str]) -> str:
    """Names with what is said of each, layers folded: `model.layers.*.mlp.x.weight (8×4, not 4×8) ×32, …`."""
    counts = Counter((re.sub(r"\.\d+\.", ".*.", name), remark) for name, remark in sorted(tensors.items()))
    words = [
        name + (f" ({remark})" if remark else "") + (f" ×{count}" if count > 1 else "")
        for (name, remark), count in counts.items()
    ]
    more = [f"{len(words) - _GROUPS_SAID} more kinds"] if len(words) > _GROUPS_SAID else []
    return ", ".join(words[:_GROUPS_SAID] + more)


def _sides(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def load(
    name: str | Path,
    adapter: str | Path | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | Path | None = None,
) -> Loaded:
    """A base, an adapter folder (it names its base), or a base with `adapter` on it; in evaluation mode.

    `tokenizer` is its folder where that is neither the base's nor the one the adapter names. Raises UserError where a
    folder is missing, or an adapter was made on another base. Of a SAT folder with an unmerged LoRA it is the base,
    with a warning.
    """
    if adapter is None and is_adapter(name):
        adapter, name = name, base_of(name)
    folder = resolve_base(name)
    if adapter is None:
        _warn_of_lora(folder)
    model = load_base(folder, dtype, device)
    notes = read_notes(folder if adapter is None else adapter)
    if adapter is not None:
        put_adapter(model, Path(adapter), folder, notes)
    where = tokenizer or tokenizer_folder(folder, notes)
    return Loaded(model.to(device).eval(), load_tokenizer(Path(where), model.config.vocab_size), notes)


def _warn_of_lora(folder: Path) -> None:
    from cogvlm_hpe.model.sat_weights import SatWeights

    weights = open_weights(folder)
    if isinstance(weights, SatWeights) and weights.has_lora:
        warnings.warn(
            f"{folder}: its unmerged LoRA is left out, this is the base alone; to use it make an adapter of it "
            f"(cogvlm-hpe convert {folder} DST --to hf --only-adapter), or a base with it (--merge instead)",
            stacklevel=3,
        )


def load_several(
    name: str | Path,
    adapters: Sequence[str | Path | None],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | Path | None = None,
) -> list[Loaded]:
    """One model for each adapter, or without (None), all on the memory of one base; in evaluation mode.

    The base itself is asked with the prompts that the adapters share, so that all are asked the same. One that has no
    tokenizer speaks with that of the first adapter that names one. Raises UserError as `load`, and where the base is
    asked for beside adapters of different prompts.
    """
    folder = resolve_base(name)
    base = load_base(folder, dtype, device)
    state, loaded = base.state_dict(), []
    for adapter in adapters:
        model = empty_model(copy.deepcopy(base.config), dtype)
        model.load_state_dict(state, assign=True)
        notes = read_notes(adapter or folder)
        if adapter is None:
            model.adapter_scope = "text"  # no adapter works on the image, so its prefix is anybody's
            notes["prompts"] = _shared_prompts(adapters) or notes["prompts"]
            own = _tokenizer_of_base(folder, adapters)
        else:
            put_adapter(model, Path(adapter), folder, notes)
            own = tokenizer_folder(folder, notes)
        where = Path(tokenizer or own)
        loaded.append(Loaded(model.to(device).eval(), load_tokenizer(where, model.config.vocab_size), notes))
    return loaded


def _shared_prompts(adapters: Sequence[str | Path | None]) -> dict[str, str]:
    first: tuple[str | Path, dict[str, str]] | None = None
    for adapter in adapters:
        if adapter is None:
            continue
        prompts = read_notes(adapter)["prompts"]
        first = first or (adapter, prompts)
        if prompts != first[1]:
            raise UserError(
                f"{first[0]} and {adapter}: are asked in different words (prompts in hpe.json), so the base cannot be "
                "asked as both are; judge it beside each of them, in two runs, or leave it out"
            )
    return first[1] if first else {}


def _tokenizer_of_base(base: Path, adapters: Sequence[str | Path | None]) -> Path:
    folders = [tokenizer_folder(base, read_notes(adapter or base)) for adapter in (None, *adapters)]
    return next((folder for folder in folders if find_tokenizer(folder)), base)


def put_adapter(
    model: CogVLMForCausalLM, adapter: Path, base: Path, notes: dict[str, Any], name: str = "default"
) -> None:
    """Inject a peft adapter in place under `name`, to be used and not trained, and set its scope. Raises UserError."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    if not is_adapter(adapter):
        raise UserError(f"{adapter}: no adapter there (no {ADAPTER_CONFIG}); name an adapter or checkpoint folder")
    made_on = notes.get("base_fingerprint")
    if made_on and made_on != fingerprint(base):
        raise UserError(f"{adapter}: made on another base than {base} (fingerprints differ); name its own base")
    config = LoraConfig.from_pretrained(str(adapter))
    config.inference_mode, config.lora_dropout = True, 0.0
    try:
        inject_adapter_in_model(config, model, adapter_name=name)
        state = load_file(str(adapter / "adapter_model.safetensors"))
        result = set_peft_model_state_dict(model, state, adapter_name=name)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{adapter}: the adapter cannot be read ({_first_line(error)})") from None
    lost = [key for key in result.missing_keys if f".{name}." in key] + list(result.unexpected_keys)
    if lost:
        raise UserError(f"{adapter}: {len(lost)} tensors do not fit its adapter_config.json, the first {lost[0]}")
    model.adapter_scope = notes["scope"]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
