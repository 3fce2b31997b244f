"""Checks as a table: a line each, ✓ or ✗ with its remedy, gathered from all hosts."""

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launcher.errors import EXIT_FAILURE, UserError

if TYPE_CHECKING:
    from launcher.comm import Comm


@dataclass(frozen=True)
class Line:
    """One line of the table. `said` is the result, or what is wrong and, after the last semicolon, the remedy."""

    check: str
    ok: bool
    said: str
    host: str = ""
    exit_code: int = EXIT_FAILURE
    """Where it is not ok."""


class Table:
    """Lines go out as they come, so that whatever ends the program leaves those before it."""

    def __init__(self, comm: "Comm") -> None:
        self.comm = comm
        self.wrong: list[Line] = []

    @property
    def exit_code(self) -> int:
        """That of the worst line; 0 where all is well."""
        return max((line.exit_code for line in self.wrong), default=0)

    def add(self, lines: list[Line]) -> None:
        """All ranks. Lines count on rank 0."""
        for line in lines if self.comm.rank == 0 else []:
            print(show(line), flush=True)
        self.wrong += self.comm.broadcast([line for line in lines if not line.ok])


def show(line: Line) -> str:
    """A line for people; the remedy on a line of its own."""
    wrong, _, remedy = line.said.rpartition("; ")
    said = line.said if line.ok or not wrong else f"{wrong}\n{'':17}→ {remedy}"
    return f"{'✓' if line.ok else '✗'} {line.check:<14} {said}"


def attempt(check: str, work: Callable[[], str]) -> Line:
    """The line of a check that returns what it found or raises UserError."""
    try:
        return Line(check, True, work(), socket.gethostname())
    except UserError as error:
        return Line(check, False, str(error), socket.gethostname(), error.exit_code)


def merge(gathered: list[list[Line]] | None, alike: frozenset[str]) -> list[Line]:
    """One line a check out of all hosts'; what checks in `alike` say must be the same everywhere."""
    lines = [line for of_rank in gathered or [] for line in of_rank]
    out = []
    for check in dict.fromkeys(line.check for line in lines):
        same = [line for line in lines if line.check == check]
        wrong = [line for line in same if not line.ok]
        if wrong:
            others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            where = f"{wrong[0].host}{others}: " if len(same) > 1 else ""
            out.append(replace(wrong[0], said=where + wrong[0].said))
        elif check in alike and len({line.said for line in same}) > 1:
            other = next(line for line in same if line.said != same[0].said)
            said = f"{same[0].host}: {same[0].said}, but {other.host}: {other.said}; make hosts alike"
            out.append(Line(check, False, said))
        else:
            out.append(same[0])
    return out
