"""Lines of a table, each with its number: reading them, and what a line says, with errors that name it."""

import csv
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from launcher.errors import UserError
from shards import pose
from shards.sources import files
from shards.sources.files import Box
from shards.sources.table import BOXES, CONVENTIONS

_ANGLES = ("yaw", "pitch", "roll")
_CELLS = tuple(f"r{row}{column}" for row in range(3) for column in range(3))
_TURN = {"hpe-v1": 360.0, "300w-lp": 2 * math.pi}
_TO_OURS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rotation": np.asarray,
    "6drepnet": pose.from_6drepnet,
    "3ddfa": pose.from_3ddfa,
    "head-to-camera": pose.from_head_to_camera,
}
# Matrices written with three digits are still taken; they are made orthonormal.
_ROTATION_TOLERANCE = 0.01
_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
COLUMNS = {*sum(BOXES.values(), ()), *_ANGLES, *_CELLS, "image", "box", "rotation", "subject", "split", "weak"}
COLUMNS |= {"confidence", "visible", "convention"}


def read(path: Path) -> Iterator["Row"]:
    """The lines of a .csv, .tsv or .jsonl file. Raises UserError."""
    kind = path.suffix.lower()
    if kind == ".jsonl":
        for number, value in files.read_json_lines(path):
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: not an object in braces; each line must be one")
            yield Row(path, number, {name: v for name, v in value.items() if v is not None})
    elif kind in (".csv", ".tsv"):
        yield from _read_csv(path, "," if kind == ".csv" else "\t")
    else:
        raise UserError(f"{path}: tables end in .csv, .tsv or .jsonl; rename or convert it")


def _read_csv(path: Path, delimiter: str) -> Iterator["Row"]:
    try:
        # utf-8-sig: spreadsheets put a mark before the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            columns = [name.strip() for name in next(reader, [])]
            if len(set(columns)) < len(columns):
                raise UserError(f"{path}: two columns of one name in {', '.join(columns)}; rename one")
            for cells in reader:
                if cells and len(cells) != len(columns):
                    raise UserError(f"{path}, line {reader.line_num}: not as many cells as the first line has columns")
                values = dict(zip(columns, map(str.strip, cells), strict=False))
                if any(values.values()):
                    yield Row(path, reader.line_num, {name: cell for name, cell in values.items() if cell})
    except csv.Error as error:
        line = reader.line_num
        raise UserError(f"{path}, line {line}: not CSV ({error}); quote cells that hold quotes or commas") from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({why}); check the path") from None


@dataclass(frozen=True)
class Row:
    """One line: its cells by column, empty ones left out."""

    path: Path
    line: int
    values: Mapping[str, Any]

    def error(self, what: str) -> UserError:
        """A UserError that names the line."""
        return UserError(f"{self.path}, line {self.line}: {what}")

    def text(self, column: str, default: str | None = None) -> str:
        """A cell as text. Raises UserError where it is empty and there is no default."""
        value = self.values.get(column, default)
        if value is None:
            raise self.error(f"no {column!r}; every line needs one")
        return str(value)

    def number(self, column: str, needed_for: str = "", default: float | None = None) -> float:
        """A cell as a finite number. Raises UserError."""
        value = self.values.get(column, default)
        if value is None:
            raise self.error(f"no {column!r}; {needed_for} needs it")
        return self._finite(column, value)

    def share(self, column: str) -> float:
        """A number within [0, 1], 1 where the cell is empty. Raises UserError."""
        value = self.number(column, default=1.0)
        if not 0 <= value <= 1:
            raise self.error(f"{column} {value:g} is outside [0, 1]")
        return value

    def flag(self, column: str) -> bool:
        """true or false, false where the cell is empty. Raises UserError."""
        value = str(self.values.get(column, "")).lower()
        if value not in _FLAGS:
            raise self.error(f"{column} {value!r}: write true or false")
        return _FLAGS[value]

    def box(self, columns: str) -> Box:
        """x0, y0, x1, y1 in pixels; `columns` is xyxy or xywh. Raises UserError."""
        if "box" in self.values:
            x0, y0, x1, y1 = self._list("box", 4)
        else:
            x0, y0, x1, y1 = (self.number(name, f"a box {columns}") for name in BOXES[columns])
        if columns == "xywh":
            x1, y1 = x0 + x1, y0 + y1
        if not (x0 < x1 and y0 < y1):
            raise self.error(f"box {x0:g}, {y0:g}, {x1:g}, {y1:g} is empty; see --box for the columns' meaning")
        return (x0, y0, x1, y1)

    def rotation(self, convention: str) -> np.ndarray | None:
        """(3, 3) our M, None for convention none; a column `convention` goes first. Raises UserError."""
        convention = self.text("convention", convention)
        if convention not in CONVENTIONS:
            raise self.error(f"convention {convention!r}: choose one of {', '.join(CONVENTIONS)}")
        if convention == "none":
            return None
        if convention in _TURN:
            return self._from_angles(convention)
        if "rotation" in self.values:
            cells = self._list("rotation", 9)
        else:
            cells = [self.number(name, f"convention {convention}") for name in _CELLS]
        matrix = np.reshape(cells, (3, 3))
        if not pose.is_rotation(matrix, _ROTATION_TOLERANCE):
            raise self.error("its 9 numbers are no rotation matrix, which is orthonormal with determinant +1")
        return _TO_OURS[convention](Rotation.from_matrix(matrix).as_matrix())

    def _from_angles(self, convention: str) -> np.ndarray:
        angles = [self.number(name, f"convention {convention}") for name in _ANGLES]
        for name, angle in zip(_ANGLES, angles, strict=True):
            if abs(angle) > _TURN[convention]:
                unit = "degrees" if convention == "hpe-v1" else "radians; hpe-v1 takes degrees"
                raise self.error(f"{name} {angle:g} is more than a turn; convention {convention} is in {unit}")
        return pose.rotation_from_pose(*(angles if convention == "hpe-v1" else np.degrees(angles)))

    def _list(self, column: str, count: int) -> list[float]:
        value = self.values[column]
        parts = value if isinstance(value, list) else []
        flat = [v for part in parts for v in (part if isinstance(part, list) else [part])]
        if len(flat) != count:
            raise self.error(f"{column} {value!r}: not a list of {count} numbers")
        return [self._finite(column, v) for v in flat]

    def _finite(self, column: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.error(f"{column} {value!r} is no number")
        return number
