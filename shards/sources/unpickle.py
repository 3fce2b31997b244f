"""Pickles of data sets, read without running anything that they ask for."""

import pickle
from pathlib import Path
from typing import Any, NoReturn

from launcher.errors import UserError

_REASON_CHARS = 100


def read_plain(path: Path, encoding: str = "latin1") -> Any:
    """Contents of a pickle of plain containers, numbers and strings; no name that it asks for is ever looked up.

    encoding: of the strings of Python 2, which wrote RefCOCO's. Raises UserError for a file that is missing, not whole,
    or asks for any class or function, by its name.
    """
    try:
        with Path(path).open("rb") as file:
            return _Plain(file, encoding=encoding).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; copy it from the official download") from None
    except _Refused as refused:
        raise UserError(
            f"{path}: refused, it asks for {refused}: such a file holds plain containers only; download it again"
        ) from None
    except (pickle.UnpicklingError, EOFError, MemoryError, OSError) as error:
        raise _broken(path, error) from None
    except (AttributeError, ImportError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: BaseException) -> UserError:
    lines = str(error).strip().splitlines()
    reason = lines[0][:_REASON_CHARS] if lines else type(error).__name__
    return UserError(f"{path}: not a whole pickle file ({reason}); copy it again")


class _Refused(Exception):
    """Holds the name that a pickle asked for."""


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _Refused(f"{module}.{name}")
