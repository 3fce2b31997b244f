"""Ranks' parts become one result folder."""

from pathlib import Path

import pytest

from cogvlm_hpe.evaluate import reduce
from launcher.comm import Comm, single


class _Gathered(Comm):
    """Rank 0 of two, whose other rank has said `other`."""

    size = 2

    def __init__(self, other: list) -> None:
        self._other = other

    def gather(self, value: list) -> list:
        """Both ranks' values."""
        return [value, self._other]


def test_rows_come_in_batch_order_whoever_made_them() -> None:
    rows = reduce.collect([(0, [{"id": "a"}]), (2, [{"id": "c"}])], 3, _Gathered([(1, [{"id": "b"}])]))
    assert [row["id"] for row in rows] == ["a", "b", "c"]


@pytest.mark.parametrize("other", [[], [(0, [])], [(1, []), (1, [])]])
def test_a_batch_that_is_missing_or_comes_twice_is_a_defect(other: list) -> None:
    with pytest.raises(RuntimeError, match="were dealt"):
        reduce.collect([(0, [])], 2, _Gathered(other))


def test_a_result_folder_is_complete_and_free_of_times(tmp_path: Path) -> None:
    row = {"id": "k/object-0", "key": "k", "task": "what", "kind": "other", "errors": {"exact": True}}
    facts = reduce.run_facts(single(), 1, 0.0)
    reduce.write_result(tmp_path / "out", [row], {"system": "s"}, facts)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "metrics.json",
        "predictions.jsonl",
        "run.json",
        "tensorboard",
    ]
    text = (tmp_path / "out" / "metrics.json").read_text()
    assert not any(word in text for word in ("time", "host", "ranks", str(tmp_path)))
