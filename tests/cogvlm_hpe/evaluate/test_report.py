"""The report on results with known errors: its numbers, its completeness, and what it refuses."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

from cogvlm_hpe import cli, dialogue
from cogvlm_hpe.evaluate import reduce, report, results
from cogvlm_hpe.evaluate.answer import Answer
from cogvlm_hpe.evaluate.decode import judge, questions
from launcher.comm import single
from launcher.errors import UserError
from shards import pose
from shards.index import open_set
from shards.record import Record

NOTES = {"prompts": dict(dialogue.DEFAULT_PROMPTS), "answer_format": "offset"}


def make_result(folder: Path, shard_set: Path, name: str, error_deg: float, blended: int = 0) -> Path:
    """A result of a system that errs by `error_deg` about a random axis, and blends the first answers."""
    generator = np.random.default_rng(0)
    stored, rows = open_set(shard_set), []
    for i in stored.key_order():
        record = stored.record(int(i))
        for row in questions(stored.key(int(i)), record, ["pose", "where", "what"], NOTES):
            rows.append(judge(row, Answer(_answer(row, record, error_deg, generator)), "offset"))
    for number, row in enumerate([row for row in rows if row["task"] == "pose"][:blended]):
        row |= judge({key: row[key] for key in ("task", "truth")}, Answer(f"{{{{{number},1,1}}}} [["), "offset")
    header = {
        "system": name,
        "set": {"name": stored.info["name"], "images": len(stored)},
        "decoding": {"dtype": "fp32"},
    }
    facts = reduce.run_facts(single(), 1, 0.0, shards=str(shard_set))
    reduce.write_result(folder, rows, header, facts)
    return folder


def _answer(row: dict, record: Record, error_deg: float, generator: np.random.Generator) -> str:
    if row["task"] == "what":
        return row["truth"]
    if row["task"] == "where":
        return dialogue.format_box(row["truth"], record.image.width, record.image.height)
    truth = pose.rotation_from_pose(*row["truth"].values())
    axis = generator.normal(size=3)
    turn = pose.Rotation.from_rotvec(np.radians(error_deg) * axis / np.linalg.norm(axis)).as_matrix()
    return dialogue.format_pose(*pose.pose_from_rotation(turn @ truth))


@pytest.fixture
def runs(tmp_path: Path, tiny_set) -> list[Path]:
    """Two systems on two sets: one errs by 10 degrees, one by 30 and blends four answers."""
    folders = []
    for split in ("train", "test"):
        shard_set = tiny_set(samples=24, split=split)
        folders.append(make_result(tmp_path / "runs" / f"good-{split}", shard_set, "good", 10.0))
        folders.append(make_result(tmp_path / "runs" / f"poor-{split}", shard_set, "poor", 30.0, blended=4))
    return folders


def test_the_table_says_the_errors_that_were_made(runs: list[Path]) -> None:
    headings, rows = results.score_table(results.load_results(runs))
    table = {(row[0], row[1]): dict(zip(headings, row, strict=True)) for row in rows}
    assert len(rows) == 6 and all(len(row) == len(headings) for row in rows)
    for name in ("tiny-train", "tiny-test"):
        good, poor, floor = (table[name, system] for system in ("good", "poor", "constant pose"))
        assert float(good["median"]) == pytest.approx(10.0, abs=0.6)  # whole degrees in the answer
        assert float(poor["geodesic"].split()[0]) > 30.0  # four answers cost the constant pose
        assert float(floor["geodesic"].split()[0]) > 60.0
        assert good["blended"] == "0.0 % pose, 0.0 % box"
        assert poor["blended"] == f"{400 / 36:.1f} % pose, 0.0 % box" == poor["wrong format"]
        assert good["grounding"].startswith("100.0 %")


def test_every_column_is_explained() -> None:
    assert set(results.score_table([])[0]) == set(report.COLUMNS)


def test_systems_are_compared_head_by_head(runs: list[Path]) -> None:
    good, poor = results.load_results(runs[:2])
    difference = results.compare(good, poor)
    assert difference is not None and difference.high < 0
    assert difference.mean == pytest.approx(float((good.geodesic_deg - poor.geodesic_deg).mean()))
    floor = results.compare(good, None)
    assert floor is not None and floor.high < 0


def test_systems_judged_on_different_heads_are_not_compared(runs: list[Path]) -> None:
    loaded = results.load_results(runs)
    assert results.compare(loaded[0], loaded[2]) is None


def test_the_report_is_whole_and_the_page_needs_no_other_file(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert "poor" in capsys.readouterr().out
    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    pictures = re.findall(r"\]\((report/[\w-]+\.png)\)", markdown)
    assert len(pictures) == 6 and all((out / picture).is_file() for picture in pictures)
    inlined = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(data) for data in inlined] == [(out / picture).read_bytes() for picture in pictures]
    assert not re.search(r'(src|href)="(?!data:)', page)
    for text in (markdown, page):
        assert all(column in text for column in report.COLUMNS) and "Answers in words" in text


def test_a_folder_of_results_stands_for_all_below_it(runs: list[Path], tmp_path: Path) -> None:
    assert {r.folder for r in results.load_results([tmp_path / "runs"])} == {run.resolve() for run in runs}
    twice = results.load_results([runs[0], tmp_path / "runs"])
    assert len(twice) == 4 and twice[0].folder == runs[0].resolve()


def test_two_results_of_one_name_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    run = json.loads((runs[0] / "run.json").read_text())
    make_result(tmp_path / "again", Path(run["shards"]), "good", 20.0)
    names = [result.name for result in results.load_results([runs[0], tmp_path / "again", runs[2]])]
    assert names[:2] == ["good (runs/good-train)", f"good ({tmp_path.name}/again)"] and names[2] == "good"


def test_a_set_that_has_gone_costs_only_its_picture(runs: list[Path], tmp_path: Path) -> None:
    for run in runs:
        facts = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(facts | {"shards": str(tmp_path / "gone")}))
    titles = [part.title for part in report.sections(results.load_results(runs))]
    assert "Mean error" in titles and not any(title.startswith("Heads of") for title in titles)


def test_a_result_without_poses_still_makes_a_report(tmp_path: Path) -> None:
    row = {"id": "k/object-0", "key": "k", "task": "where", "kind": "box", "errors": {"iou": 0.7}}
    reduce.write_result(tmp_path / "a", [row], {"system": "s", "set": {"name": "t", "images": 1}}, {})
    parts = report.sections(results.load_results([tmp_path / "a"]))
    assert "100.0 %" in report.markdown(parts) and [p.title for p in parts].count("Head by head") == 0


def test_folders_without_results_are_refused(tmp_path: Path, runs: list[Path]) -> None:
    with pytest.raises(UserError, match="no such folder"):
        results.load_results([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no result in it"):
        results.load_results([tmp_path / "empty"])
    (runs[0] / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="not a result of"):
        results.load_results([runs[0]])


def test_a_damaged_line_is_named(runs: list[Path]) -> None:
    path = runs[0] / "predictions.jsonl"
    path.write_text(path.read_text()[:-20])
    lines = len(path.read_text().splitlines())
    with pytest.raises(UserError, match=rf"predictions\.jsonl, line {lines}: not JSON"):
        results.load_results([runs[0]])[0].pose_rows  # noqa: B018


def test_names_cannot_break_the_page_or_the_table(runs: list[Path]) -> None:
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    (runs[0] / "metrics.json").write_text(json.dumps(metrics | {"system": "<b>a|b"}))
    parts = report.sections(results.load_results([runs[0]]))
    assert "&lt;b&gt;a|b" in report.page(parts) and "<b>a" not in report.page(parts)
    assert "<b>a\\|b" in report.markdown(parts)
