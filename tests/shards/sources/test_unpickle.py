"""Pickles are data: what they ask for is never run, and what they hold comes out right."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.errors import UserError
from shards.sources.unpickle import read_frame, read_plain

PANDAS = sorted((Path(__file__).parents[2] / "data" / "pandas").glob("*.pkl"))


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


@pytest.mark.parametrize("path", PANDAS, ids=lambda path: path.stem)
def test_tables_of_pandas_come_out(path: Path) -> None:
    """Files that pandas itself wrote: every kind of column, arrays in every order, every version's form."""
    table = read_frame(path)
    assert table.rows == 2
    assert table.names == ["imgPath", "joints", "camX", "number", "valid", "X", "kid"]
    assert table.column("imgPath") == ["a_hdri_00001.png", "b_cam00_00002.png"]
    assert table.column("camX") == [1.5, -275.0] and table.column("number") == [7, 8]
    assert table.column("valid") == [True, False] and table.column("kid") == [[True, False], [False]]
    assert table.column("X") == [[1.25, 2.5], [-3.0]]
    (plain, turned, fortran), (single,) = table.column("joints")
    grid = np.arange(6.0).reshape(2, 3) / 4
    for array, wanted in ((plain, grid), (turned, grid.T), (fortran, grid), (single, grid[:, ::-1])):
        np.testing.assert_array_equal(array, wanted)
    assert plain.dtype == np.float64 and single.dtype.itemsize == 4


def test_there_are_tables_of_every_form() -> None:
    assert len(PANDAS) == 10


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(UserError, match="no column gt_joints_3d, only imgPath, joints, camX"):
        read_frame(PANDAS[0]).column("gt_joints_3d")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_attack_in_a_table_is_refused_by_name_and_did_not_happen(tmp_path: Path, protocol: int) -> None:
    path, target = tmp_path / "train_0.pkl", tmp_path / "touched"
    path.write_bytes(pickle.dumps({"_mgr": Attack(target)}, protocol))
    with pytest.raises(UserError, match=r"train_0\.pkl: refused, it asks for posix\.system: such a file holds tables"):
        read_frame(path)
    assert not target.exists()


@pytest.mark.parametrize("name", [b"builtins\neval", b"numpy\ndtype.__class__", b"torch._utils\n_rebuild_tensor_v2"])
def test_other_names_are_refused(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x02c" + name + b"\n(S'1'\ntR.")
    with pytest.raises(UserError, match="it asks for " + name.decode().replace("\n", ".")):
        read_frame(path)


def test_an_object_array_cannot_be_made_of_bytes(tmp_path: Path) -> None:
    """Bytes taken for pointers would be a way in: numpy's own unpickling is never used."""
    raw = PANDAS[-1].read_bytes()
    assert b"O8" in raw
    path = tmp_path / "a.pkl"
    for dtype in (b"V8", b"M8", b"m8"):
        path.write_bytes(raw.replace(b"O8", dtype))
        with pytest.raises(UserError, match="a.pkl: refused, it asks for arrays of type"):
            read_frame(path)


def test_what_is_no_table_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"imgPath": ["a.png"]}))
    with pytest.raises(UserError, match="a.pkl: holds no pandas DataFrame"):
        read_frame(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="a.pkl: not a whole pickle file"):
        read_frame(path)
    with pytest.raises(UserError, match="no such file"):
        read_frame(tmp_path / "absent.pkl")


def test_lists_within_lists_cannot_fill_the_memory(tmp_path: Path) -> None:
    """40 levels of [x, x] are 2^40 lists when each is copied; and a list that holds itself has no end."""
    bomb: list[Any] = []
    for _ in range(40):
        bomb = [bomb, bomb]
    endless: list[Any] = []
    endless.append(endless)
    whole = (PANDAS[0].parent / "pandas-2.2-protocol-2.pkl").read_bytes()
    for value in (bomb, endless):
        inner = pickle.dumps(value, 0)[:-1].replace(b"p", b"p999").replace(b"g", b"g999")
        path = tmp_path / "a.pkl"
        path.write_bytes(whole.replace(b"X\x10\x00\x00\x00a_hdri_00001.png", inner))
        assert isinstance(read_frame(path).column("imgPath")[0], list)


@pytest.mark.parametrize("path", PANDAS, ids=lambda path: path.stem)
def test_damaged_tables_end_in_one_line(path: Path, tmp_path: Path) -> None:
    whole, rng, failures = path.read_bytes(), random.Random(1), 0
    for _ in range(60):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.2 else whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "a.pkl").write_bytes(damaged)
        try:
            table = read_frame(tmp_path / "a.pkl")
            for name in table.names:
                table.column(name)
        except UserError as error:
            failures += 1
            assert "\n" not in str(error)
    assert failures > 20
