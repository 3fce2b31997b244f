"""The headers of a tar, one by one, where an index says they are: what is damaged is named, what comes after is seen.

Readers of tars take a damaged header for the end and go on without a word; a walk by the index does not stop there.
"""

import os
from pathlib import Path
from typing import NamedTuple

HEADER = 512
_CHECKSUM = slice(148, 156)
_MOST_NAMED = 20


class Member(NamedTuple):
    """One file that a tar should hold: where its header is, its name and size."""

    offset: int
    name: str
    size: int

    @property
    def end(self) -> int:
        """Where the next header is."""
        return self.offset + HEADER + -(-self.size // HEADER) * HEADER


class Header(NamedTuple):
    """What a header says."""

    name: str
    size: int
    is_file: bool


def parse_header(block: bytes) -> Header:
    """A USTAR header. Raises ValueError for a block that is none: short, empty, or with another checksum."""
    if len(block) < HEADER:
        raise ValueError(f"the tar ends {HEADER - len(block)} bytes too early")
    if not any(block):
        raise ValueError("it is empty, which readers take for the end")
    field = block[_CHECKSUM]
    if _octal(field) != sum(block) - sum(field) + len(field) * ord(" "):
        raise ValueError("its checksum is another one")
    name, prefix = (block[a:b].split(b"\0", 1)[0].decode("utf-8", "replace") for a, b in ((0, 100), (345, 500)))
    return Header(f"{prefix}/{name}" if prefix else name, _octal(block[124:136]), block[156:157] in (b"0", b"\0"))


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0") or b"0"
    if digits.translate(None, b"01234567"):
        raise ValueError("a number in it is none")
    return int(digits, 8)


def check_members(tar: Path, members: list[Member]) -> list[str]:
    """Findings, one line each: headers that are damaged or say something else, bytes of no member, a missing end."""
    members, findings = sorted(members), []
    with tar.open("rb") as file:
        end = 0
        for k, member in enumerate(members):
            if member.offset != end:
                what = "lie in two members" if member.offset < end else "belong to no sample of the index"
                findings.append(f"{tar}: bytes {min(end, member.offset)} to {max(end, member.offset)} {what}")
            end = max(end, member.end)
            findings += _check_header(tar, file.fileno(), member, len(members) - k)
        tail = os.pread(file.fileno(), HEADER * 2, end)
    if len(tail) < HEADER * 2 or any(tail):
        findings.append(f"{tar}: at byte {end}, behind the last sample, there is no end of a tar")
    more = len(findings) - _MOST_NAMED
    return [*findings[:_MOST_NAMED], f"{tar}: {more} findings like these more"] if more > 0 else findings


def _check_header(tar: Path, handle: int, member: Member, left: int) -> list[str]:
    where = f"{tar}, key {member.name.split('.')[0]}: the header"
    try:
        header = parse_header(os.pread(handle, HEADER, member.offset))
    except ValueError as error:
        said = str(error).splitlines()[0]
        missed = f"plain readers of tars stop here without a word and miss {left} members"
        return [f"{where} of {member.name} at byte {member.offset} is damaged ({said}): {missed}"]
    if header == Header(member.name, member.size, True):
        return []
    kind = "" if header.is_file else ", no plain file,"
    says = f"says {header.name!r}{kind} of {header.size} bytes, the index {member.name!r} of {member.size}"
    return [f"{where} at byte {member.offset} {says}"]
