"""A base folder's tensors under their Hugging Face names, whatever its format, each read when it is asked for."""

import ctypes
import mmap
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cogvlm_hpe.model.architecture import Architecture
from cogvlm_hpe.model.folders import HF_CONFIG, SAT_CONFIG, read_json
from cogvlm_hpe.model.stored import DTYPES
from cogvlm_hpe.model.unpickle import load_pickled
from launcher.errors import UserError

if TYPE_CHECKING:
    from cogvlm_hpe.model.configuration import CogVLMConfig

_INV_FREQ = "rotary_emb.inv_freq"


class Weights(Protocol):
    """What every format gives: names, shapes, and tensors one at a time."""

    folder: Path
    architecture: Architecture

    @property
    def config(self) -> "CogVLMConfig":
        """As transformers wants it, anew each time."""
        ...

    def names(self) -> list[str]:
        """Sorted; without the rotary tables (`rotary_emb.inv_freq`), which are computed."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """As stored, without reading the tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """On the CPU; a view of the mapped file where the format allows: do not write into it."""
        ...

    def pieces(self, name: str) -> Iterable[Tensor]:
        """What `read` gives in pieces, which together hold its elements in order."""
        ...

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, (stop - start,), reading no more than needed."""
        ...

    def forget(self, name: str) -> None:
        """Give back the memory that reading this tensor filled; views of it stay valid and read the file again."""
        ...


def open_weights(folder: Path) -> Weights:
    """A folder in Hugging Face form (safetensors or .bin, in shards or not) or SAT form (any model-parallel size).

    Of an unmerged SAT LoRA it is the base. Raises UserError where a file is missing, not whole or of another kind.
    """
    folder = Path(folder)
    if (folder / HF_CONFIG).is_file():
        architecture = read_architecture(folder)
        if found := _files(folder, "model*.safetensors", "model.safetensors.index.json"):
            return SafetensorsWeights(folder, architecture, found)
        if found := _files(folder, "pytorch_model*.bin", "pytorch_model.bin.index.json"):
            return MappedWeights(folder, architecture, found)
        raise UserError(f"{folder}: no weights there (model*.safetensors or pytorch_model*.bin); copy them beside it")
    if (folder / SAT_CONFIG).is_file():
        from cogvlm_hpe.model.sat_weights import SatWeights

        return SatWeights(folder)
    raise UserError(f"{folder}: no base model there; name a folder with {HF_CONFIG} or SAT's {SAT_CONFIG}")


class AnyWeights:
    """What is the same for all forms."""

    folder: Path

    def read(self, name: str) -> Tensor:
        """See Weights."""
        raise NotImplementedError

    def pieces(self, name: str) -> Iterable[Tensor]:
        """The whole tensor as one."""
        return [self.read(name)]

    @property
    def config(self) -> "CogVLMConfig":
        """As transformers wants it, anew each time."""
        return read_config(self.folder)


def read_config(folder: Path) -> "CogVLMConfig":
    """transformers' configuration of a base folder in either form. Raises UserError."""
    from cogvlm_hpe.model.configuration import CogVLMConfig

    if not (folder / HF_CONFIG).is_file():
        return CogVLMConfig.from_dict(vars(read_architecture(folder)) | {"architectures": ["CogVLMForCausalLM"]})
    value = _read_hf_config(folder)
    return CogVLMConfig(**{key: v for key, v in value.items() if key not in ("auto_map", "model_type")})


def read_architecture(folder: Path) -> Architecture:
    """The model of a base folder in either form; without transformers. Raises UserError."""
    if not (folder / HF_CONFIG).is_file() and (folder / SAT_CONFIG).is_file():
        from cogvlm_hpe.model.sat import read_sat_config

        return read_sat_config(folder)
    return Architecture.of(_read_hf_config(folder))


def _read_hf_config(folder: Path) -> dict[str, Any]:
    value = read_json(folder / HF_CONFIG)
    # Files with a model_type are transformers 5's, which leaves out what is at its default.
    if not {"rms_norm_eps", "model_type"} & value.keys():
        warnings.warn(
            f"{folder / HF_CONFIG}: no rms_norm_eps; took {Architecture.rms_norm_eps}, as CogVLM was trained",
            stacklevel=3,
        )
    return value


class SafetensorsWeights(AnyWeights):
    """Hugging Face form, safetensors; the files are mapped, and a tensor is a view of its file."""

    def __init__(self, folder: Path, architecture: Architecture, files: list[Path]) -> None:
        """Open every file and read its table. Raises UserError where one is missing or not whole."""
        self.folder, self.architecture = folder, architecture
        self._file_of: dict[str, Any] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
                self._file_of |= {name: file for name in file.keys() if not name.endswith(_INV_FREQ)}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from None

    def names(self) -> list[str]:
        """Sorted, without rotary tables."""
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the file's table."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """From the file's table. Raises UserError for a type that no CogVLM has."""
        stored = self._file_of[name].get_slice(name).get_dtype()
        if stored not in DTYPES:
            raise UserError(f"{self.folder}: {name} is stored as {stored}; expected one of {', '.join(DTYPES)}")
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self._file_of[name].get_tensor(name)

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """A view of the mapped file."""
        return self.read(name).reshape(-1)[start:stop]

    def forget(self, name: str) -> None:
        """Drop the mapped pages."""
        drop_pages(self.read(name))


class MappedWeights(AnyWeights):
    """Hugging Face form, files written by torch.save; mapped too, unless they are older than torch 1.6."""

    def __init__(self, folder: Path, architecture: Architecture, files: list[Path]) -> None:
        """Map every file. Raises UserError where one is missing, not whole or not a state dict."""
        self.folder, self.architecture = folder, architecture
        self._tensors: dict[str, Tensor] = {}
        for path in files:
            tensors = state_dict(path, load_pickled(path))
            self._tensors |= {name: tensor for name, tensor in tensors.items() if not name.endswith(_INV_FREQ)}

    def names(self) -> list[str]:
        """Sorted, without rotary tables."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the mapped tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of the mapped tensor."""
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self._tensors[name]

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        """A view of the mapped file."""
        return self._tensors[name].reshape(-1)[start:stop]

    def forget(self, name: str) -> None:
        """Drop the mapped pages."""
        drop_pages(self._tensors[name])


def drop_pages(tensor: Tensor) -> None:
    """Take the pages of a mapped file under this tensor out of the process; the kernel's cache keeps them.

    Without this a walk through a checkpoint would count the whole file as resident memory. Pages at both ends, which
    neighbours share, stay. Memory that is no file's is left alone, and so is everything on other systems than Linux.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and _is_file(first, last):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _is_file(first: int, last: int) -> bool:
    """Whether these addresses lie in one mapped file: a line of maps is `start-stop mode offset device inode path`."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        span, _, _, _, inode = line.split(maxsplit=5)[:5]
        start, stop = (int(side, 16) for side in span.split("-"))
        if start <= first and last <= stop:
            return inode != "0"
    return False


def state_dict(path: Path, value: Any) -> Mapping[str, Tensor]:
    """`value` if it is a state dict. Raises UserError naming `path`."""
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{path}: holds no state dict; name the folder of a whole checkpoint")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: entry {name!r} of its state dict is no tensor; save the state dict alone")
    return value


def _files(folder: Path, pattern: str, index_name: str) -> list[Path]:
    """The files an index names, or those of the pattern. Raises UserError where one of an index is missing."""
    index = folder / index_name
    if not index.is_file():
        return sorted(folder.glob(pattern))
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{index}: has no weight_map; copy it again")
    paths = [index.parent / name for name in sorted(set(files.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{index.parent}: {', '.join(missing)} of {index.name} is missing; copy it there")
    return paths
