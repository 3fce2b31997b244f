"""Tensors of a SAT folder, from any number of model-parallel files, under their Hugging Face names."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cogvlm_hpe.model.folders import SAT_CONFIG
from cogvlm_hpe.model.sat import Rule, hf_module, hf_name, merge, merge_flat, read_sat_config, split_rule
from cogvlm_hpe.model.unpickle import load_pickled
from cogvlm_hpe.model.weights import AnyWeights, drop_pages, state_dict
from launcher.errors import UserError

LATEST = "latest"
_LORA = re.compile(r"(?P<module>.+)\.matrix_(?P<letter>[AB])\.(?P<part>\d+)")


class SatWeights(AnyWeights):
    """A SAT folder under Hugging Face names; of an unmerged LoRA, the base, with the factors in `lora_parts`."""

    def __init__(self, folder: Path) -> None:
        """Map every model-parallel file. Raises UserError where one is missing, not whole or not CogVLM's."""
        self.folder, self.architecture = folder, read_sat_config(folder)
        files = _rank_files(folder)
        self._ranks = [_Module(path) for path in files]
        for path, rank in zip(files[1:], self._ranks[1:], strict=True):
            if rank.base.keys() != self._ranks[0].base.keys():
                raise UserError(f"{path}: holds other tensors than {files[0].name}; copy both again from one release")
        self._check_count(files[0].parent)

    def _check_count(self, folder: Path) -> None:
        """The model-parallel size is what the shapes say: model_config.json is often wrong about it."""
        head, words = self._ranks[0].base.get("lm_head.weight"), self.architecture.vocab_size
        rows = len(head) if head is not None else 0
        if not rows or words % rows:
            raise UserError(f"{folder}: {rows} rows of lm_head do not divide the {words} words of {SAT_CONFIG}")
        missing = [rank_file(rank) for rank in range(self.mp_size, words // rows)]
        if missing:
            raise UserError(f"{folder}: {', '.join(missing)} is missing; copy it there")
        if rows * self.mp_size > words:
            raise UserError(f"{folder}: {rank_file(words // rows)} is one too many; remove what is not of this release")

    @property
    def mp_size(self) -> int:
        """Model-parallel files."""
        return len(self._ranks)

    @property
    def has_lora(self) -> bool:
        """Whether a LoRA lies unmerged beside the base."""
        return bool(self._ranks[0].lora)

    def lora_parts(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Module (Hugging Face name) → its pairs A (r, n_in), B (n_out / parts, r); three for fused q, k, v.

        Raises UserError for several model-parallel files: SAT then gives each rank an A of its own and never adds up
        what they make of `dense`, so there is no one matrix to write.
        """
        if self.has_lora and self.mp_size > 1:
            raise UserError(
                f"{self.folder}: an unmerged LoRA over {self.mp_size} model-parallel files, which in SAT is not one "
                "matrix per layer; merge it in SAT, with merge_lora, before converting"
            )
        return self._ranks[0].lora

    def names(self) -> list[str]:
        """Sorted, without rotary tables."""
        return sorted(self._ranks[0].base)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        first, rule = self._ranks[0].base[name].shape, self._rule(name)
        if rule == "copy":
            return tuple(first)
        split_dim = 1 if rule == "rows" else 0
        return tuple(side * self.mp_size if dim == split_dim else side for dim, side in enumerate(first))

    def dtype(self, name: str) -> torch.dtype:
        """Of the mapped tensor."""
        return self._ranks[0].base[name].dtype

    def read(self, name: str) -> Tensor:
        """A view of the mapped file, or the parts of several files put together."""
        return merge(self._parts(name), self._rule(name))

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Reads only the parts that these elements lie in."""
        return merge_flat(self._parts(name), self._rule(name), start, stop)

    def forget(self, name: str) -> None:
        """Drop the mapped pages of every part."""
        for part in self._parts(name):
            drop_pages(part)

    def _parts(self, name: str) -> list[Tensor]:
        return [rank.base[name] for rank in self._ranks]

    def _rule(self, name: str) -> Rule:
        return split_rule(name, self.architecture.vocab_size)


class _Module:
    """One file's `module`, under Hugging Face names, base and LoRA apart."""

    def __init__(self, path: Path) -> None:
        content = load_pickled(path)
        if not isinstance(content, Mapping) or "module" not in content:
            raise UserError(f"{path}: has no 'module', so it is no SAT checkpoint; name the folder of one")
        self.base: dict[str, Tensor] = {}
        pairs: dict[str, dict[str, Tensor]] = {}
        unknown = []
        for name, tensor in state_dict(path, content["module"]).items():
            if name.endswith("rotary_emb.inv_freq"):
                continue
            found = _LORA.fullmatch(name)
            try:
                if found:
                    pairs.setdefault(hf_module(found["module"]), {})[found["letter"] + found["part"]] = tensor
                else:
                    self.base[hf_name(name.replace(".original.", "."))] = tensor
            except KeyError:
                unknown.append(name)
        if unknown:
            raise UserError(f"{path}: {len(unknown)} tensors are not CogVLM's, the first {unknown[0]}; is it a CogVLM?")
        self.lora = {module: _pairs(path, module, tensors) for module, tensors in pairs.items()}


def _pairs(path: Path, module: str, tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    count = len(tensors) // 2
    if set(tensors) != {f"{letter}{part}" for letter in "AB" for part in range(count)}:
        raise UserError(f"{path}: the LoRA of {module} holds {', '.join(sorted(tensors))}: not pairs; copy it again")
    return [(tensors[f"A{part}"], tensors[f"B{part}"]) for part in range(count)]


def _rank_files(folder: Path) -> list[Path]:
    """mp_rank_00, 01, … of the iteration that `latest` names. Raises UserError where there are none, or a gap."""
    latest = folder / LATEST
    if not latest.is_file():
        raise UserError(f"{latest}: no such file; it holds the name of the folder with the weights, e.g. 1")
    iteration = latest.read_text(encoding="utf-8").strip()
    if not iteration or "/" in iteration:
        raise UserError(f"{latest}: says {iteration!r}; it must hold the name of the folder with the weights, e.g. 1")
    found = {path.name for path in (folder / iteration).glob("mp_rank_*_model_states.pt")}
    files = [folder / iteration / rank_file(rank) for rank in range(max(1, len(found)))]
    missing = [path.name for path in files if path.name not in found]
    if missing:
        raise UserError(f"{folder / iteration}: {', '.join(missing)} is missing; copy it there")
    return files


def rank_file(rank: int) -> str:
    """Name of one model-parallel rank's file."""
    return f"mp_rank_{rank:02d}_model_states.pt"
