"""Pickles of data sets, read without running anything that they ask for.

`read_plain` takes plain containers only. `read_frame` takes a table that pandas wrote, without pandas: every class or
function that such a file names is replaced by an empty stand-in that keeps its arguments, and the columns are put
together from those; a name that no table needs is refused. The file is mapped and large arrays stay in it: AGORA's
tables hold gigabytes of vertices that nobody asks for.
"""

import mmap
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, cast

from launcher.errors import UserError

if TYPE_CHECKING:
    import numpy as np

_REASON_CHARS = 100
_LARGE_BYTES = 1 << 14
_DTYPE = re.compile(r"[<>|=]?(?:[biuf](?:1|2|4|8)|[US]\d{1,6}|O8?)")


def read_plain(path: Path, encoding: str = "latin1") -> Any:
    """Contents of a pickle of plain containers, numbers and strings; no name that it asks for is ever looked up.

    encoding: of the strings of Python 2, which wrote RefCOCO's. Raises UserError for a file that is missing, not whole,
    or asks for any class or function, by its name.
    """
    with _errors(path, "plain containers"), Path(path).open("rb") as file:
        return _Plain(file, encoding=encoding).load()


class Table:
    """Columns of a pandas DataFrame. Values are plain; arrays and numpy's numbers come as numpy's."""

    def __init__(self, path: Path, rows: int, columns: dict[str, list[Any]]) -> None:
        self._path, self._columns = path, columns
        self.rows = rows

    @property
    def names(self) -> list[str]:
        """Of the columns, in their order."""
        return list(self._columns)

    def column(self, name: str) -> list[Any]:
        """One value a row. Raises UserError where the table has no such column, or holds what is not plain in it."""
        if name not in self._columns:
            there = _shown(", ".join(self._columns))
            raise UserError(f"{self._path}: no column {name}, only {there}; is it the right file?")
        with _errors(self._path, "tables of plain columns"):
            return _resolved(self._columns[name], {})


def read_frame(path: Path) -> Table:
    """The DataFrame in a pickle of pandas 0.20 to 3, of any protocol. Its arrays are views of the mapped file.

    Raises UserError for a file that is missing, not whole, not a DataFrame, or asks for anything else, by its name.
    """
    path = Path(path)
    with _errors(path, "tables of plain columns"):
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        frame: Any = _Tree(mapped, encoding="latin1").load()
        if not isinstance(frame, _Node) or frame.kind != "DataFrame":
            raise UserError(f"{path}: holds no pandas DataFrame; name the file of the official download")
        return Table(path, *_columns(frame))


@contextmanager
def _errors(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; copy it from the official download") from None
    except _Refused as refused:
        text = f"refused, it asks for {_shown(refused)}: such a file holds {what} only; download it again"
        raise UserError(f"{path}: {text}") from None
    except (pickle.UnpicklingError, EOFError, MemoryError, OSError, RecursionError) as error:
        raise _broken(path, error) from None
    except (AttributeError, ImportError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: BaseException) -> UserError:
    reason = _shown(error) or type(error).__name__
    return UserError(f"{path}: not a whole pickle file ({reason}); copy it again")


def _shown(value: object) -> str:
    """On one line, whatever a damaged or hostile file put into it."""
    return "".join(c if c.isprintable() else "?" for c in str(value).strip()[:_REASON_CHARS])


class _Refused(Exception):
    """Holds the name that a pickle asked for."""


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _Refused(f"{module}.{name}")


class _Node:
    """Stands where an object of pandas or numpy would be: keeps the arguments and the state, and does nothing."""

    __slots__ = ("arguments", "state")
    kind = ""
    arguments: Any
    state: Any

    def __new__(cls, *arguments: Any) -> "_Node":
        node = object.__new__(cls)
        node.arguments, node.state = arguments, None
        return node

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Encode:
    """How protocols 0 to 2 write bytes: `_codecs.encode(text, "latin1")`."""

    def __new__(cls, text: str, encoding: str = "latin1") -> Any:
        if encoding != "latin1":
            raise _Refused(f"_codecs.encode with {encoding!r}")
        return text.encode("latin1")


_NAMES = """
pandas.core.frame.DataFrame pandas.DataFrame
pandas.core.internals.managers.BlockManager pandas.core.internals.BlockManager pandas._libs.internals._unpickle_block
pandas.core.indexes.base._new_Index pandas.core.indexes.base.Index pandas.Index
pandas.core.indexes.range.RangeIndex pandas.RangeIndex
pandas.core.indexes.numeric.Int64Index pandas.core.indexes.numeric.UInt64Index pandas.core.indexes.numeric.Float64Index
pandas._libs.arrays.__pyx_unpickle_NDArrayBacked pandas.arrays.StringArray pandas.StringDtype
pandas.core.arrays.string_.StringArray pandas.core.arrays.string_.StringDtype
builtins.slice __builtin__.slice numpy.ndarray numpy.dtype
numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
numpy.core.multiarray.scalar numpy._core.multiarray.scalar
numpy.core.numeric._frombuffer numpy._core.numeric._frombuffer
"""


def _stand_in(name: str) -> type:
    kind = name.rpartition(".")[2]
    return type(kind, (_Node,), {"kind": kind, "__slots__": ()})


_STAND_INS: dict[str, type] = {name: _stand_in(name) for name in _NAMES.split()} | {"_codecs.encode": _Encode}


class _Tree(pickle._Unpickler):
    """Python's own unpickler, in which every class is a stand-in and large bytes stay in the mapped file."""

    read: Any
    append: Any
    _unframer: Any
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, mapped: mmap.mmap, encoding: str) -> None:
        super().__init__(mapped, encoding=encoding)
        self._mapped, self._view = mapped, memoryview(mapped)

    def find_class(self, module: str, name: str) -> Any:
        known = _STAND_INS.get(f"{module}.{name}")
        if known is None:
            raise _Refused(f"{module}.{name}")
        return known

    def _load_large(self, length_bytes: int) -> None:
        length = int.from_bytes(self.read(length_bytes), "little")
        framed = self._unframer.current_frame is not None
        if framed or length < _LARGE_BYTES:
            self.append(self.read(length))
            return
        start = self._mapped.tell()
        if start + length > len(self._mapped):
            raise EOFError("the file ends within an array")
        self._mapped.seek(start + length)
        self.append(self._view[start : start + length])

    def _load_four(self) -> None:
        self._load_large(4)

    def _load_eight(self) -> None:
        self._load_large(8)

    dispatch[pickle.BINBYTES[0]] = _load_four
    dispatch[pickle.BINBYTES8[0]] = _load_eight
    dispatch[pickle.BYTEARRAY8[0]] = _load_eight


def _columns(frame: Any) -> tuple[int, dict[str, list[Any]]]:
    """Number of rows, and each column's values as they lie in the file."""
    state = frame.state
    manager: Any = state.get("_mgr", state.get("_data")) if isinstance(state, dict) else state
    if manager.state is not None:  # before pandas 1.3
        known = manager.state[3]["0.14.1"]
        axes, blocks = known["axes"], [(block["values"], block["mgr_locs"]) for block in known["blocks"]]
    else:
        blocks, axes = manager.arguments
        blocks = [block.arguments[:2] for block in blocks]
    names, rows = _labels(axes[0]), len(_labels(axes[1]))
    columns: dict[str, list[Any]] = {}
    for values, places in blocks:
        table = _array(values).reshape(-1, rows)
        where = range(*(int(k) for k in places.arguments)) if places.kind == "slice" else _array(places).tolist()
        columns |= {str(names[place]): list(row) for place, row in zip(where, table, strict=True)}
    return rows, {str(name): columns[str(name)] for name in names}


def _labels(index: Any) -> Any:
    known = index.arguments[1]
    return range(known["start"], known["stop"], known["step"]) if "start" in known else _array(known["data"]).tolist()


def _resolved(value: Any, done: dict[int, Any]) -> Any:
    """`value` with arrays for stand-ins. A list met again is not resolved again: few bytes could fill the memory."""
    if isinstance(value, _Node):
        return _array(value)[()]
    if not isinstance(value, (list, tuple)):
        return value
    if id(value) not in done:
        done[id(value)] = again = []
        again += [_resolved(item, done) for item in value]
    return done[id(value)]


def _array(node: Any) -> "np.ndarray":
    """The numpy array that a stand-in describes; no code of numpy sees more than bytes, a simple dtype and a shape."""
    import numpy as np

    if node.kind == "__pyx_unpickle_NDArrayBacked":
        return _array(next(part for part in node.state if part.kind in ("_reconstruct", "_frombuffer")))
    if node.kind == "_frombuffer":
        raw, kind, shape, order = node.arguments
    elif node.kind == "_reconstruct":
        _, shape, kind, fortran, raw = node.state
        order = "F" if fortran else "C"
    elif node.kind == "scalar":
        (kind, raw), shape, order = node.arguments, (), "C"
    else:
        raise _Refused(f"{type(node).__name__} as a value")
    dtype = _dtype(kind)
    if dtype.hasobject:
        array = np.empty(len(raw), object)
        for i, item in enumerate(raw):
            array[i] = item
        return array.reshape(shape)
    # A list in the pickle is in C order whatever the array's was, the bytes are in the array's own.
    return np.frombuffer(raw, dtype).reshape(shape, order=order)


def _dtype(node: Any) -> "np.dtype[Any]":
    import numpy as np

    name = node.arguments[0] if isinstance(node, _Node) and node.kind == "dtype" else None
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise _Refused(f"arrays of type {name!r}")
    order = node.state[1] if node.state else "|"
    return np.dtype(name).newbyteorder(cast(Literal["<", ">", "="], order if order in ("<", ">") else "="))
