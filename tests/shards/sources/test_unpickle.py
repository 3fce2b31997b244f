"""Pickles are data: what they ask for is never run, and what they hold comes out right."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UserError
from shards.sources.unpickle import read_plain


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_plain_containers_come_out(tmp_path: Path) -> None:
    value = [
        {"ref_id": 1, "split": "testA", "sentences": [{"tokens": ["the", "caf\u00e9"], "raw": "x" * 300}]},
        (1.5, None),
    ]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"refs{protocol}.p"
        path.write_bytes(pickle.dumps(value, protocol))
        assert read_plain(path) == value


def test_strings_of_python_2(tmp_path: Path) -> None:
    """What Python 2's cPickle writes for [{'sent': 'a caf\\xe9', u'sent_id': 3L}], in protocols 0 and 2."""
    for name, raw in {
        "zero": b"(lp1\n(dp2\nS'sent'\np3\nS'a caf\\xe9'\np4\nsVsent_id\np5\nL3L\nsa.",
        "two": b"\x80\x02]q\x01}q\x02(U\x04sentq\x03U\x06a caf\xe9q\x04X\x07\x00\x00\x00sent_idq\x05\x8a\x01\x03ua.",
    }.items():
        (tmp_path / name).write_bytes(raw)
        assert read_plain(tmp_path / name) == [{"sent": "a caf\u00e9", "sent_id": 3}]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_attack_is_refused_by_name_and_did_not_happen(tmp_path: Path, protocol: int) -> None:
    path, target = tmp_path / "refs(unc).p", tmp_path / "touched"
    path.write_bytes(pickle.dumps([{"ref_id": 1}, Attack(target)], protocol))
    with pytest.raises(UserError, match=r"refs\(unc\)\.p: refused, it asks for posix\.system"):
        read_plain(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists(), "the attack is a real one"


def test_harmless_classes_are_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps({"a": Path("x")}))
    with pytest.raises(UserError, match="refused, it asks for pathlib"):
        read_plain(path)


@pytest.mark.parametrize("cut", [0, 1, 30, -1])
def test_broken_files_are_one_line(tmp_path: Path, cut: int) -> None:
    whole = pickle.dumps([{"sent": "a" * 50}])
    path = tmp_path / "refs.p"
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match="refs.p: not a whole pickle file") as caught:
        read_plain(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read_plain(tmp_path / "absent.p")
