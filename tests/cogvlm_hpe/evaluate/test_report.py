"""The report on results with known errors: its numbers, its completeness, and what it refuses."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from results_made import edit, make_result

from cogvlm_hpe import cli
from cogvlm_hpe.evaluate import gallery, plots, reduce, rendering, report, report_command, results, systems
from cogvlm_hpe.evaluate.systems import System, systems_of
from launcher.errors import UserError


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
    assert {*results.score_table([])[0], *systems.COLUMNS} == set(report.COLUMNS)


def renamed(run: Path, folder: Path, name: str) -> Path:
    """A copy of a result under another system's name."""
    shutil.copytree(run, folder)
    edit(folder / "metrics.json", system=name)
    return folder


def test_a_row_for_each_system_and_columns_for_each_set(runs: list[Path], tmp_path: Path) -> None:
    seeds = [renamed(runs[k], tmp_path / f"copy-{k}", f"poor, seed {2 + k}") for k in (0, 1)]
    edit(runs[1] / "metrics.json", system="poor, seed 1")
    about = {"poor": "what a bad | merge gives", "never judged": "said in vain"}
    loaded = results.load_results([*runs[:2], *seeds, runs[2]])
    assert [(result.system, result.seed) for result in loaded[1:4]] == [("poor", 1), ("poor", 2), ("poor", 3)]
    table = systems.overview(systems.in_order(loaded, about), about)
    assert table.sets == ["tiny-train", "tiny-test"] and {len(row) for row in table.rows} == {11}
    assert [row[0] for row in table.rows] == ["constant pose", "poor", "good"]
    _, poor, good = table.rows
    errors = [result.tasks["pose"]["all"]["geodesic"]["mean"] for result in loaded[1:4]]
    assert poor[1].startswith(f"{np.mean(errors):.1f} ± {np.std(errors, ddof=1):.1f} [") and poor[6] == "–"
    assert poor[3] == f"{800 / 36 / 3:.1f} % ({800 / 36 / 3:.1f} blended)"
    assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", good[1]) and (2, 1) in table.best and (1, 1) not in table.best
    assert table.about[0].startswith("no model") and table.about[1:] == [about["poor"], ""]
    parts = [rendering.Section("Result", overview=table)]
    page, text = rendering.page(parts), rendering.markdown(parts)
    assert page.count('<th colspan="5">') == 2 and "<p>what a bad | merge gives</p>" in page
    assert "- **poor**: what a bad | merge gives" in text and f"| **{good[1]}** |" in text
    first, second = text.split("### tiny-test")
    assert "| poor |" in first and "| good |" in first and "| poor |" not in second and "| good |" in second


def test_many_systems_are_compared_with_the_first_and_the_best_and_still_drawn(
    runs: list[Path], tmp_path: Path
) -> None:
    copies = [renamed(runs[1], tmp_path / f"many-{k}", f"system {k:02d}") for k in range(12)]
    loaded = results.load_results([*copies, runs[0]])
    _, rows = systems.comparison_table(loaded)
    assert [row[1:3] for row in rows[:2]] == [["system 00", "constant pose"], ["system 00", "good"]]
    assert [row[2] for row in rows[2:5]] == ["constant pose", "system 00", "good"]
    assert len(rows) == 13 * 3 - 2
    for draw in (plots.error_by_yaw, plots.error_curves, plots.answer_formats):
        assert (draw(loaded) or b"").startswith(b"\x89PNG")
    assert len({plots._colour([r.system for r in loaded], r.system) for r in loaded}) == 13


def test_pose_and_grounding_are_drawn_where_two_systems_were_asked_about_both(runs: list[Path]) -> None:
    both = systems_of(results.load_results(runs[:2]))
    assert (plots.pose_and_grounding(both) or b"").startswith(b"\x89PNG")
    assert plots.pose_and_grounding(both[:1]) is None
    assert both[0].grounding.mean == np.mean(both[0].hits)


def test_a_file_that_holds_no_sentences_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "systems.yaml"
    for text, said in (("- poor", "must be `NAME: sentence`"), ("a: [", "cannot be read"), ("1: b", "put quotes")):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            report_command.read_about(file)


def test_two_splits_of_one_name_are_two_sets(runs: list[Path]) -> None:
    for run, split, images in ((runs[0], "val", 24), (runs[1], "test", 24), (runs[2], "test", 10)):
        edit(run / "metrics.json", set={"name": "synthetic-A", "split": split, "images": images})
    names = [result.set_name for result in results.load_results(runs)]
    assert names == ["synthetic-A val", "synthetic-A test (24 images)", "synthetic-A test (10 images)", "tiny-test"]


def test_systems_are_compared_head_by_head(runs: list[Path]) -> None:
    good, poor = systems_of(results.load_results(runs[:2]))
    difference = systems.compare(good, poor)
    assert difference is not None and difference.high < 0
    assert difference.mean == pytest.approx(float((good.geodesic_deg - poor.geodesic_deg).mean()))
    floor = systems.compare(good, None)
    assert floor is not None and floor.high < 0


def test_forgetting_stands_beside_the_gain(runs: list[Path]) -> None:
    good, poor = systems_of(results.load_results(runs[:2]))
    lost = systems.forgotten(poor, good)
    assert lost is not None and lost.mean == lost.low == lost.high == 0.0
    path = runs[1] / "predictions.jsonl"
    lines = [json.loads(line) for line in path.open()]
    for row in [row for row in lines if row["task"] == "where"][::2]:
        row["errors"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    [forgetful] = results.load_results([runs[1]])
    lost = systems.forgotten(System("poor", (forgetful,)), good)
    assert lost is not None and lost.mean == pytest.approx(-0.5, abs=0.05) and lost.high < 0
    headings, [*_, row] = systems.comparison_table([*good.runs, forgetful])
    assert headings[-1].startswith("grounding") and row[-1].endswith("worse") and row[3].endswith("worse")


def test_every_pair_of_systems_is_compared(runs: list[Path], tmp_path: Path) -> None:
    run = json.loads((runs[0] / "run.json").read_text())
    make_result(tmp_path / "middle", Path(run["shards"]), "middle", 20.0)
    loaded = results.load_results([*runs, tmp_path / "middle"])
    headings, rows = systems.comparison_table(loaded)
    pairs = [(row[1], row[2]) for row in rows if row[0] == "tiny-train"]
    floor = results.CONSTANT
    assert pairs == [
        ("good", floor), ("poor", floor), ("poor", "good"), ("middle", floor), ("middle", "good"), ("middle", "poor")
    ]  # fmt: skip
    said = {(row[1], row[2]): dict(zip(headings, row, strict=True)) for row in rows if row[0] == "tiny-train"}
    assert said["middle", "good"]["pose"].endswith("worse") and said["middle", "poor"]["pose"].endswith("better")
    by_hand = loaded[4].geodesic_deg.mean() - loaded[1].geodesic_deg.mean()
    assert said["middle", "poor"]["pose"].startswith(f"{by_hand:+.1f} [")
    assert len(rows) == 6 + 3


def test_tables_of_protocols_sides_and_wrong_kinds(runs: list[Path]) -> None:
    loaded = results.load_results(runs[:2])
    headings, rows = results.protocol_table(loaded)
    table = {(row[1], row[2].split()[0]): dict(zip(headings, row, strict=True)) for row in rows}
    asked = int(table["good", "full"]["heads"])
    assert asked == int(table["good", "narrow"]["heads"]) + int(table["good", "backward"]["heads"])
    assert int(table["poor", "full"]["answered"]) == asked - 4
    # An axis moves by no more than the whole turn, and by less the nearer it is to the turn's own axis.
    assert 5 < float(table["good", "full"]["MAEV"]) < 10.5 and 15 < float(table["poor", "full"]["MAEV"]) < 30.5
    _, sides = results.front_back_table(loaded)
    assert sum(int(cell.split()[0]) for row in sides if row[1] == "poor" for cell in row[3:]) == asked
    assert sum(int(row[5].split()[0]) for row in sides if row[1] == "poor") == 4
    _, [wrong] = results.invalid_table(loaded)
    assert wrong[1:5] == ["poor", "pose", "blended", f"4 ({400 / asked:.1f} %)"] and "[[" in wrong[5]


def test_merges_at_several_thresholds_are_drawn_as_a_sweep(runs: list[Path]) -> None:
    loaded = results.load_results(runs[:2])
    assert plots.merge_sweep(loaded) is None
    for result, threshold in zip(loaded, (0.9, 0.99), strict=True):
        result.metrics["model"] = {"merge": {"method": "layerwise", "threshold": threshold}}
    png = plots.merge_sweep(loaded)
    assert png is not None and png.startswith(b"\x89PNG")
    assert "Threshold of the merge" in [part.title for part in report.sections(loaded)]


def test_the_gallery_holds_the_extremes_and_each_wrong_kind(runs: list[Path]) -> None:
    [poor] = results.load_results([runs[1]])
    entries = gallery.heads([poor])
    errors = [row["errors"]["geodesic"] for row in poor.pose_rows if row["errors"]]
    by_why = {why: [entry for entry in entries if entry["why"] == why] for why in ("best", "worst", "no pose")}
    assert max(entry["error"] for entry in by_why["worst"]) == max(errors)
    assert min(entry["error"] for entry in by_why["best"]) == min(errors)
    assert [entry["kind"] for entry in by_why["no pose"]] == ["blended"] * 4
    assert len({entry["id"] for entry in entries}) == len(entries)
    assert "<" not in gallery.as_script([{"text": "</script><b>"}])


_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# What a person would do, done by events; what they would see is left in the title.
_DRIVE = """
const said = [], select = (name, value) => {
  const node = document.querySelector(`select[name=${name}]`);
  node.value = value; node.dispatchEvent(new Event("change"));
};
const look = () => said.push(document.querySelector("output").textContent, document.querySelectorAll("figure").length,
  document.querySelector("figcaption").textContent);
select("kind", "blended");
setTimeout(() => {
  look();
  select("kind", "any");
  setTimeout(() => {
    select("sort", "best");
    setTimeout(() => {
      look();
      const table = document.querySelectorAll("table")[0];
      for (const _ of [0, 1]) {
        table.tHead.rows[1].cells[1].click();
        said.push([...table.tBodies[0].rows].map((row) => parseFloat(row.cells[1].textContent)));
      }
      const input = document.querySelector("details input");
      input.value = "POOR narrow"; input.dispatchEvent(new Event("input"));
      said.push(document.querySelector("details summary").textContent);
      document.title = JSON.stringify(said);
    }, 50);
  }, 50);
}, 50);
"""


def browse(page: Path, profile: Path, *flags: str, address: str = "") -> tuple[str, list[str]]:
    """The page as a browser leaves it, and what its console said."""
    assert _CHROMIUM is not None
    words = [_CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    words += ["--enable-logging=stderr", "--virtual-time-budget=4000", "--disable-background-networking", *flags]
    done = subprocess.run([*words, f"{page.as_uri()}{address}"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(
    _CHROMIUM is None, reason="SKIPPED: no chromium here; tests/install.sh installs it on Debian as root"
)
def test_a_browser_shows_filters_and_sorts_without_an_error(runs: list[Path], tmp_path: Path) -> None:
    loaded = results.load_results(runs)
    rendering.write(report.sections(loaded), tmp_path / "out")
    page, profile = tmp_path / "out" / "report.html", tmp_path / "profile"
    shot = f"--screenshot={tmp_path / 'shot.png'}"
    browse(page, profile, shot, "--window-size=1200,9000", "--hide-scrollbars")
    pixels = np.array(Image.open(tmp_path / "shot.png").convert("RGB"))
    assert pixels.shape == (9000, 1200, 3) and (pixels != 255).any(axis=2).mean() > 0.02
    heads = gallery.heads(loaded)
    seen, console = browse(page, profile, "--dump-dom", address="#system=poor&why=no%20pose&sort=worst")
    body = seen.partition('id="gallery-data"')[0]
    assert body.count("<figure>") == 8 and f"8 of {len(heads)} heads" in body and console == []
    driven = tmp_path / "out" / "driven.html"
    driven.write_text(page.read_text().replace("</body>", f"<script>{_DRIVE}</script></body>"))
    seen, console = browse(driven, profile, "--dump-dom")
    assert console == []
    said = json.loads(html.unescape(seen.partition("<title>")[2].partition("</title>")[0]))
    assert said[:2] == [f"8 of {len(heads)} heads", 8] and "blended" in said[2]
    assert said[3:5] == [f"{len(heads)} of {len(heads)} heads", len(heads)]
    assert f"{min(head['error'] for head in heads if head['error'] is not None):.1f}°" in said[5]
    up, down, left = said[6:]
    assert left.startswith("2 of ")
    assert up == sorted(up) and down == up[::-1] and len(set(up)) > 2
    driven.write_text("<script>console.error('heard'); nothing()</script>")
    assert len(browse(driven, profile, "--dump-dom")[1]) == 2, "a page with two errors must be heard"


def test_systems_judged_on_different_heads_are_not_compared(runs: list[Path]) -> None:
    loaded = results.load_results(runs)
    assert systems.compare(*(System(one.name, (one,)) for one in (loaded[0], loaded[2]))) is None


@pytest.mark.parametrize(
    ("task", "key", "value"), [("pose", "truth", {"yaw": 1.0, "pitch": 2.0, "roll": 3.0}), ("where", "question", "It?")]
)
def test_other_questions_of_one_name_are_not_compared(runs: list[Path], task: str, key: str, value: object) -> None:
    path = runs[1] / "predictions.jsonl"
    rows = [json.loads(line) for line in path.open()]
    next(row for row in rows if row["task"] == task)[key] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, table = systems.comparison_table(results.load_results(runs[:2]))
    cell = {"pose": 3, "where": 4}[task]
    assert table[-1][cell] == "other questions" != table[-1][7 - cell]
    for seed in (1, 2):
        edit(runs[seed - 1] / "metrics.json", system=f"good, seed {seed}")
    assert len(systems_of(results.load_results(runs[:2]))) == (2 if task == "pose" else 1)


def test_the_report_is_whole_and_the_page_needs_no_other_file(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    model.mkdir()
    edit(runs[0] / "run.json", model=str(model))
    about = tmp_path / "systems.yaml"
    about.write_text("poor: blends answers\n")
    words = ["--systems", str(about), "--out", str(out), "--card", str(model)]
    assert cli.main(["report", *map(str, runs), *words]) == 0
    assert "poor" in capsys.readouterr().out and "| good |" in (model / "README.md").read_text()
    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    pictures = re.findall(r"\]\((report/[\w-]+\.png)\)", markdown)
    assert len(pictures) == 9 and all((out / picture).is_file() for picture in pictures)
    inlined = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert not re.search(r"https?://|@import|url\(", page)
    assert [base64.b64decode(data) for data in inlined] == [(out / picture).read_bytes() for picture in pictures]
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "- **poor**: blends answers" in markdown and "<p>blends answers</p>" in page
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
    for place in ("a/on/good", "b/on/good"):
        shutil.copytree(runs[0], tmp_path / place)
    names = [result.name for result in results.load_results([tmp_path / "a", tmp_path / "b"])]
    assert names == ["good (a/on/good)", "good (b/on/good)"], "as many parts of the path as it takes"


def test_a_set_that_has_gone_costs_only_its_picture(runs: list[Path], tmp_path: Path) -> None:
    for run in runs:
        facts = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(facts | {"shards": str(tmp_path / "gone")}))
    titles = [part.title for part in report.sections(results.load_results(runs))]
    assert "Mean error" in titles
    assert not any(title.startswith("Heads of") or title == "Gallery" for title in titles)


def test_a_result_without_poses_still_makes_a_report(tmp_path: Path) -> None:
    row = {"id": "k/object-0", "key": "k", "task": "where", "kind": "box", "errors": {"iou": 0.7}}
    reduce.write_result(tmp_path / "a", [row], {"system": "s", "set": {"name": "t", "images": 1}}, {})
    parts = report.sections(results.load_results([tmp_path / "a"]))
    assert (
        "100.0 %" in rendering.markdown(parts)
        and [p.title for p in parts].count("Gain and forgetting, head by head") == 0
    )


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
    assert "&lt;b&gt;a|b" in rendering.page(parts) and "<b>a" not in rendering.page(parts)
    assert "<b>a\\|b" in rendering.markdown(parts)
