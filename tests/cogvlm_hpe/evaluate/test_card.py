"""Scores in model cards: put in, replaced, and nothing else touched."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from results_made import edit

from cogvlm_hpe import cli
from cogvlm_hpe.evaluate import results
from cogvlm_hpe.evaluate.card import write_card


def test_a_model_card_carries_the_scores_and_keeps_all_else(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "merged"
    model.mkdir()
    for run in (runs[0], runs[2]):
        edit(run / "run.json", model="/models/base", adapter=str(model))
    foreign = {"name": "x", "results": [{"task": {"type": "vqa"}, "dataset": {"type": "d", "name": "D"}}]}
    foreign["results"][0]["metrics"] = [{"type": "accuracy", "value": 0.5}]
    data = ModelCardData(base_model="a/base", tags=["merge"], **{"model-index": [foreign]})
    text = f"---\n{data.to_yaml()}\n---\n\n# Merged\n\nIt was merged.\n\n### Evaluation\n\nBy eye.\n\n## Use\n\nSo.\n"
    (model / "README.md").write_text(text)
    loaded = results.load_results(runs)
    write_card(model, loaded)
    first = (model / "README.md").read_text()
    card = ModelCard.load(model / "README.md")
    assert card.data.base_model == "a/base" and card.data.tags == ["merge"]
    scores = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    for name, run in (("tiny-train", runs[0]), ("tiny-test", runs[2])):
        tasks = json.loads((run / "metrics.json").read_text())["tasks"]
        assert scores[name, "geodesic_deg"] == tasks["pose"]["all"]["geodesic"]["mean"]
        assert scores[name, "grounding_accuracy"] == 1.0
    assert scores.pop(("D", "accuracy")) == 0.5 and {name for name, _ in scores} == {"tiny-train", "tiny-test"}
    assert text.partition("# Merged")[2] + "\n## Evaluation\n" in first
    assert "| good |" in first and "poor" not in first
    (model / "README.md").write_text(first.replace("| good |", "| stale |") + "\n## More\n\nText.\n")
    write_card(model, loaded)
    assert (model / "README.md").read_text() == first + "\n## More\n\nText.\n"
    (model / "README.md").write_text("---\na: [\n---\n")
    for folder, said in ((tmp_path / "other", "none of the results is about it"), (model, "scores cannot be put in")):
        capsys.readouterr()
        assert cli.main(["report", *map(str, runs), "--out", str(tmp_path / "out"), "--card", str(folder)]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_card_gets_one(runs: list[Path], tmp_path: Path) -> None:
    model = tmp_path / "step-00000100"
    model.mkdir()
    (tmp_path / "last").symlink_to(model)
    edit(runs[0] / "run.json", model=str(model))
    write_card(tmp_path / "last", results.load_results(runs))
    card = ModelCard.load(model / "README.md")
    assert card.data.model_name == "step-00000100" and len(card.data.eval_results) > 5
    assert card.text.strip().startswith("# step-00000100\n\n## Evaluation\n")
