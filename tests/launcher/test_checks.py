"""What a table of checks says of several hosts, and how it ends."""

import pytest

from launcher.checks import Line, Table, merge, show
from launcher.comm import single

ALIKE = frozenset({"base"})


def test_hosts_are_merged_into_one_line_a_check() -> None:
    good = Line("base", True, "fingerprint a", "n1")
    assert merge([[good], [], [Line("base", True, "fingerprint a", "n2")]], ALIKE) == [good]
    (unlike,) = merge([[good], [Line("base", True, "fingerprint b", "n2")]], ALIKE)
    assert not unlike.ok and "n1: fingerprint a, but n2: fingerprint b" in unlike.said
    (wrong,) = merge([[good], [Line("base", False, "no base; name it", "n2")]], ALIKE)
    assert show(wrong) == f"✗ base           n2: no base\n{'':17}→ name it"


def test_a_table_ends_with_its_worst_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(single())
    table.add([Line("base", True, "there")])
    assert table.exit_code == 0
    table.add([Line("disk", False, "full; make room"), Line("ranks", False, "9", exit_code=2)])
    assert table.exit_code == 2 and [line.check for line in table.wrong] == ["disk", "ranks"]
    assert capsys.readouterr().out.splitlines()[1:3] == ["✗ disk           full", f"{'':17}→ make room"]
