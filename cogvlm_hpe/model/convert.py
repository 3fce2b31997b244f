"""Checkpoints and adapters from one form into the other, a tensor at a time; what is written is whole or not there."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cogvlm_hpe.merge.base import Base, check_fingerprint
from cogvlm_hpe.merge.factors import SCOPE, Factors, read_adapter, write_adapter, write_notes
from cogvlm_hpe.merge.methods import LowRank
from cogvlm_hpe.model import sat
from cogvlm_hpe.model.architecture import KEYS
from cogvlm_hpe.model.fingerprint import fingerprint_of
from cogvlm_hpe.model.folders import ADAPTER_CONFIG, HF_CONFIG, NOTES_FILE, SAT_CONFIG, base_of, is_adapter, read_json
from cogvlm_hpe.model.pickled import save_entries
from cogvlm_hpe.model.sat_lora import adapter_like, factors_of, pairs_of
from cogvlm_hpe.model.sat_weights import LATEST, SatWeights, rank_file
from cogvlm_hpe.model.stored import Entry, save_safetensors
from cogvlm_hpe.model.tuned import TunedWeights
from cogvlm_hpe.model.weights import Weights
from launcher.errors import UsageError, UserError
from launcher.files import atomic_folder, write_json_atomic
from launcher.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import StateDictSplit

ADAPTER_FOLDER = "adapter"
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "hpe.json")


@dataclass(frozen=True)
class Source:
    """What is converted: a base, and the LoRA that lies beside it or on it."""

    weights: Weights
    factors: Factors = field(default_factory=dict)
    is_peft: bool = False  # the factors come from a peft adapter folder, not from a SAT checkpoint
    notes: Mapping[str, Any] = field(default_factory=dict)  # hpe.json of the LoRA: its prompts, format of answers, …


def open_source(folder: Path, base: Path | None, alpha: float) -> Source:
    """A base, a SAT checkpoint with an unmerged LoRA (`alpha` is not in its file), or a peft adapter and its base.

    Raises UserError where the folder is none of these or its weights are not those its configuration describes.
    """
    from cogvlm_hpe.model.load import check_tensors, empty_model  # the model itself, which no writer needs

    if is_adapter(folder):
        source = _open_adapter(folder, base_of(folder) if base is None else base)
    elif base is not None:
        raise UsageError(f"--base belongs to a peft adapter; {folder} is none (no {ADAPTER_CONFIG})")
    else:
        opened = Base(folder)
        lora = opened.weights.lora_parts() if isinstance(opened.weights, SatWeights) else {}
        notes_file = opened.path / NOTES_FILE
        notes = read_json(notes_file) if lora and notes_file.is_file() else {}
        source = Source(opened.weights, factors_of(lora, alpha) if lora else {}, notes=notes)
        opened.check(source.factors)
    check_tensors(source.weights, empty_model(source.weights.config, torch.float32))
    return source


def _open_adapter(folder: Path, base: Path) -> Source:
    adapter = read_adapter(folder)
    if adapter.hpe.get("scope", "all") != "all":
        raise UserError(
            f"{folder}: an adapter of scope {adapter.hpe['scope']}, which works on text tokens only; neither SAT nor "
            "weights alone can say that: keep it as an adapter"
        )
    opened = Base(base)
    check_fingerprint(opened, adapter)
    opened.check(adapter.factors)
    return Source(opened.weights, adapter.factors, is_peft=True, notes=adapter.hpe)


def write_adapter_only(source: Source, out: Path, alpha: float) -> None:
    """The LoRA of a SAT checkpoint as a peft adapter, of the base that lies in the same checkpoint."""
    need_room(out, 4 * sum(factor.a.numel() + factor.b.numel() for factor in source.factors.values()))
    with atomic_folder(out) as folder:
        _put_adapter(folder, source, source.weights.folder.resolve(), alpha)


def _put_adapter(folder: Path, source: Source, base: Path, alpha: float) -> None:
    like = adapter_like(source.weights.folder, fingerprint_of(source.weights), alpha)
    write_adapter(folder, source.factors, replace(like, hpe={**source.notes, **like.hpe}), base)


def _finish(folder: Path, source: Source) -> None:
    """What lies beside the weights; how a LoRA is spoken to, in the weights now or unmerged, wins over its base's."""
    copy_companions(source.weights.folder, folder)
    if source.notes:
        said = {key: value for key, value in source.notes.items() if key != "base_fingerprint"}
        write_notes(folder, said | {SCOPE: "all"})


def write_hf(source: Source, out: Path, max_shard_bytes: int, alpha: float) -> None:
    """Hugging Face form: config.json, safetensors in shards; a SAT LoRA becomes a peft adapter in `out`/adapter.

    Raises UserError if `out` exists or the disk is too small.
    """
    weights = source.weights
    need_room(out, total_bytes(weights))
    with atomic_folder(out) as folder:
        _write_shards(weights, folder, max_shard_bytes)
        write_json_atomic(folder / HF_CONFIG, hf_config(weights))
        _finish(folder, source)
        if source.factors:
            (folder / ADAPTER_FOLDER).mkdir()
            _put_adapter(folder / ADAPTER_FOLDER, source, out.resolve(), alpha)


def hf_config(weights: Weights) -> dict[str, Any]:
    """All of our own keys, defaults too: the published code has other defaults."""
    value = {key: getattr(weights.architecture, key) for key in KEYS}
    dtype = str(weights.dtype("lm_head.weight")).removeprefix("torch.")
    return value | {"architectures": ["CogVLMForCausalLM"], "model_type": "cogvlm", "torch_dtype": dtype}


def shard_plan(weights: Weights, max_shard_bytes: int) -> "StateDictSplit":
    """Which safetensors file each tensor goes to, rotary tables too; nothing is read."""
    from huggingface_hub import split_state_dict_into_shards_factory

    sizes = {name: _tensor_bytes(weights, name) for name in weights.names()}
    sizes |= dict.fromkeys(_rotary_names(weights), _rotary_table(weights).nbytes)
    return split_state_dict_into_shards_factory(
        sizes, get_storage_size=lambda size: size, get_storage_id=lambda size: None,
        filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes,
    )  # fmt: skip


def write_shard(weights: Weights, path: Path, names: list[str], done: Callable[[], None] = lambda: None) -> None:
    """One safetensors file of a plan; `done` is called after each tensor."""
    rotary = set(_rotary_names(weights))
    entries = [_rotary_entry(weights, name) if name in rotary else _entry(weights, name) for name in names]
    save_safetensors(path, entries, done)


def write_shard_index(folder: Path, plan: "StateDictSplit") -> None:
    """The index that says which file a tensor is in, if there are several files."""
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json_atomic(folder / "model.safetensors.index.json", index)


def _write_shards(weights: Weights, folder: Path, max_shard_bytes: int) -> None:
    plan = shard_plan(weights, max_shard_bytes)
    with Progress().bar("write tensors", len(plan.tensor_to_filename)) as bar:
        for file, names in plan.filename_to_tensors.items():
            write_shard(weights, folder / file, names, bar.advance)
    write_shard_index(folder, plan)


def _rotary_names(weights: Weights) -> list[str]:
    layers = range(weights.architecture.num_hidden_layers)
    return sorted(f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in layers)


def _rotary_table(weights: Weights) -> torch.Tensor:
    return sat.inv_freq(weights.architecture).to(weights.dtype("lm_head.weight"))


def _rotary_entry(weights: Weights, name: str) -> Entry:
    table = _rotary_table(weights)
    return Entry(name, tuple(table.shape), table.dtype, lambda: [table])


def _entry(weights: Weights, name: str) -> Entry:
    shape, dtype = weights.shape(name), weights.dtype(name)
    return Entry(name, shape, dtype, partial(weights.pieces, name), partial(weights.forget, name))


def write_sat(source: Source, out: Path, mp_size: int) -> None:
    """SAT form for `mp_size` model-parallel ranks; a LoRA stays unmerged beside the base, which takes one rank.

    Raises UserError if `out` exists, the disk is too small or the model has no SAT form.
    """
    weights, factors = source.weights, source.factors
    if factors and mp_size > 1:
        raise UsageError(f"--mp {mp_size} with an unmerged LoRA: SAT splits none; add --merge, or leave out --mp")
    config = sat.sat_config(weights.architecture, mp_size)
    check_mp(weights, mp_size)
    pairs, lora_rank = pairs_of(factors, weights.architecture) if factors else ({}, 0)
    if factors:
        config |= {
            "model_class": "FineTuneTestCogVLMModel",
            "use_lora": True,
            "lora_rank": lora_rank,
            "layer_range": None,
        }
    need_room(out, total_bytes(weights))
    with atomic_folder(out) as folder:
        (folder / "1").mkdir()
        ranks = [base_entries(weights, rank, mp_size, set(pairs)) + _lora_entries(pairs) for rank in range(mp_size)]
        with Progress().bar("write tensors", sum(len(entries) for entries in ranks)) as bar:
            for mp_rank, entries in enumerate(ranks):
                save_entries(folder / "1" / rank_file(mp_rank), "module", entries, bar.advance)
        write_json_atomic(folder / SAT_CONFIG, config)
        _finish(folder, source)
        (folder / LATEST).write_text("1", encoding="utf-8")


def base_entries(weights: Weights, mp_rank: int, mp_size: int, adapted: set[str]) -> list[Entry]:
    """The tensors of one model-parallel file; `adapted` modules get the names they have below a LoRA."""
    vocab = weights.architecture.vocab_size
    entries = [_rotary_entry(weights, sat.INV_FREQ)]
    for name in weights.names():
        rule = sat.split_rule(name, vocab)
        module, _, suffix = name.rpartition(".")
        renamed = f"{sat.sat_module(module)}.original.{suffix}" if module in adapted else sat.sat_name(name)
        entry = replace(_entry(weights, name), name=renamed)
        if mp_size > 1:
            entry = replace(
                entry,
                shape=sat.split_shape(entry.shape, rule, mp_size),
                pieces=partial(_part, weights, name, rule, mp_rank, mp_size),
            )
        entries.append(entry)
    return entries


def _part(weights: Weights, name: str, rule: sat.Rule, mp_rank: int, mp_size: int) -> list[torch.Tensor]:
    return [sat.split(weights.read(name), rule, mp_rank, mp_size)]


def _lora_entries(pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]]) -> list[Entry]:
    named = [
        (f"{sat.sat_module(module)}.matrix_{letter}.{part}", tensor)
        for module, found in sorted(pairs.items())
        for part, pair in enumerate(found)
        for letter, tensor in zip("AB", pair, strict=True)
    ]
    return [Entry(name, tuple(tensor.shape), tensor.dtype, partial(list, [tensor])) for name, tensor in named]


def check_mp(weights: Weights, mp_size: int) -> None:
    """Raises UsageError where this model cannot be split over `mp_size` files."""
    config, tower = weights.architecture, weights.architecture.vision_config
    sides = {
        "attention heads": config.num_attention_heads,
        "MLP columns": config.intermediate_size,
        "words": config.vocab_size,
        "ViT heads": tower["num_heads"],
        "ViT MLP columns": tower["intermediate_size"],
    }
    for what, side in sides.items():
        if mp_size < 1 or side % mp_size:
            raise UsageError(f"--mp {mp_size}: does not divide this model's {side} {what}; choose another size")


def merged(source: Source) -> Source:
    """The same with the LoRA added to the weights as they are read."""
    return Source(TunedWeights(source.weights, LowRank(source.factors)), notes=source.notes)


def _tensor_bytes(weights: Weights, name: str) -> int:
    return torch.Size(weights.shape(name)).numel() * weights.dtype(name).itemsize


def total_bytes(weights: Weights) -> int:
    """Of all tensors."""
    return sum(_tensor_bytes(weights, name) for name in weights.names())


def need_room(out: Path, wanted_bytes: int) -> None:
    """Raises UserError where the disk of `out` is too small."""
    parent = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < wanted_bytes:
        raise UserError(
            f"{out}: needs {wanted_bytes / 1e9:.1f} GB, {parent} has {free_bytes / 1e9:.1f} GB free; make room there"
        )


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer files and the like, where there are any."""
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copy(path, target / path.name)
