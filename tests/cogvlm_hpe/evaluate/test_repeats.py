"""What is said of a system that was judged twice."""

import json
import shutil
from pathlib import Path

from results_made import edit

from cogvlm_hpe.evaluate import repeats, report, results
from cogvlm_hpe.evaluate.answer import Answer
from cogvlm_hpe.evaluate.decode import judge


def test_a_system_judged_again_says_how_many_answers_flipped(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "again")
    for folder, batch in ((runs[0], 16), (tmp_path / "again", 4)):
        edit(folder / "run.json", model="/models/base", adapter="/runs/good")
        edit(folder / "metrics.json", decoding={"dtype": "fp32", "batch": batch})
    path = tmp_path / "again" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.open()]
    flipped = [row for row in rows if row["task"] == "pose"][:3]
    for row, text in zip(flipped, ("{{180,090,180}}", "{{090,090,180}}", "[[001,002,003,004]]"), strict=True):
        row |= judge({key: row[key] for key in ("task", "truth")}, Answer(text), "offset")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = results.load_results([*runs, tmp_path / "again"])
    assert repeats.flips(loaded[0], loaded[-1]) == repeats.Flips(len(rows), 3, 1)
    assert repeats.flips(loaded[0], loaded[2]) is None, "another set"
    headings, [row] = repeats.table(loaded)
    said = dict(zip(headings, row, strict=True))
    assert (said["with"], said["questions"], said["other text"]) == ("batch 16 → 4", str(len(rows)), "3")
    assert said["judged"] == "good (runs/good-train)" and said["pose"].startswith("+")
    assert repeats.table in [make for *_, make in report._TABLES]
    assert repeats.table(loaded[:-1])[1] == []
