"""Files written by torch.save, read without running anything that they ask for.

torch's own restricted reader (`weights_only=True`) takes tensors and plain containers. Files that DeepSpeed wrote also
hold random states, `argparse.Namespace` and DeepSpeed's objects: of those known to be harmless an empty stand-in is
made, and everything else is refused by name.
"""

import pickle
import re
from pathlib import Path
from typing import Any

from launcher.errors import UserError

_INERT = {
    "argparse.Namespace",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "types.SimpleNamespace",
}
_INERT_PACKAGES = ("numpy.", "deepspeed.", "sat.")
_ZIP_MAGIC = b"PK\x03\x04"
_ASKED = re.compile(r"GLOBAL (\S+)")
_CAUSE = re.compile(r"WeightsUnpickler error: *(\S.*)")
_REASON_CHARS = 100


class Inert:
    """Stands where an object of another program would be: takes whatever is done to it and does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "Inert":
        """Made like any class, with arguments that are dropped."""
        return object.__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def load_pickled(path: Path) -> Any:
    """Contents of a torch.save file; tensors are views of the mapped file, nothing is read before it is used.

    Raises UserError for a file that is missing or not whole, and for one that asks for anything but tensors, plain
    containers and the inert objects above. Files of torch < 1.6 cannot be mapped: they are read into memory.
    """
    import torch
    from torch.serialization import safe_globals

    if not path.is_file():
        raise UserError(f"{path}: no such file; copy the checkpoint again, with all its files")
    with path.open("rb") as file:
        mapped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    try:
        with safe_globals(_stand_ins(path) if mapped else []):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        if found := _ASKED.search(str(error)):
            raise _refused(path, [found[1]]) from None
        raise UserError(f"{path}: not a whole checkpoint file ({_reason(error)}); copy it again") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: not a whole checkpoint file ({_reason(error)}); copy it again") from None


def _stand_ins(path: Path) -> list[type]:
    """One empty class for each foreign name in the file. Raises UserError naming those not known as harmless."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    names = sorted(get_unsafe_globals_in_checkpoint(path))
    foreign = [name for name in names if name not in _INERT and not name.startswith(_INERT_PACKAGES)]
    if foreign:
        raise _refused(path, foreign)
    return [_stand_in(name) for name in names]


def _stand_in(name: str) -> type:
    module, _, qualified = name.rpartition(".")
    return type(qualified, (Inert,), {"__module__": module, "__qualname__": qualified})


def _refused(path: Path, names: list[str]) -> UserError:
    return UserError(
        f"{path}: refused, it asks for {', '.join(names)}: a checkpoint needs only tensors and plain containers; "
        "load such a file only in the program that wrote it, and save the state dict alone"
    )


def _reason(error: Exception) -> str:
    found = _CAUSE.search(str(error))
    lines = [found[1]] if found else str(error).strip().splitlines()
    return lines[0][:_REASON_CHARS] if lines else type(error).__name__
