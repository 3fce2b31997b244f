"""Claims against results whose errors are known."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from results_made import made_rows, make_result

from cogvlm_hpe.evaluate.results import load_results
from cogvlm_hpe.paper import claims
from cogvlm_hpe.paper.choose import Candidate, choose, cost
from launcher.comm import single
from shards.sources.synthetic.source import SyntheticSource
from shards.write import build

Made = Callable[..., Path]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    for domain in "AB":
        build(SyntheticSource(domain, 10, 1, "test"), folder / domain, single())
    return {domain: folder / domain for domain in "AB"}


@pytest.fixture
def made(sets: dict[str, Path], tmp_path: Path) -> Made:
    """Results without scores, which claims do not read and which take long to bootstrap."""

    def make(name: str, error_deg: float, **more: int) -> Path:
        for domain, shard_set in sets.items():
            folder = tmp_path / domain / name
            folder.mkdir(parents=True)
            rows = made_rows(shard_set, error_deg, **more)
            (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            about = {"name": f"synthetic-{domain}", "split": "test", "images": 10}
            said = {"system": name, "set": about, "tasks": {"pose": {}, "where": {}}}
            (folder / "metrics.json").write_text(json.dumps(said))
        return tmp_path

    return make


def test_every_claim_is_shown_by_results_that_are_as_claimed(made: Made) -> None:
    made("cnn", 40.0)
    made("cnn-more-heads", 35.0)
    made("base", 80.0)
    made("lora", 12.0, missed=25)
    made("lora-10", 12.0, missed=3)
    made("lora-25", 12.0)
    made("task-arithmetic", 30.0, blended=12)
    made("ties", 30.0)
    made("dare", 30.0)
    made("layerwise", 14.0, missed=2)
    made("layerwise-continued", 10.0)
    made("lora-continued", 20.0)
    found = claims.findings(load_results([made("task-arithmetic-continued", 20.0)]))
    assert found.keys() == claims.CLAIMS.keys()
    assert {name: claims.verdict(some) for name, some in found.items()} == dict.fromkeys(found, "shown")
    beats = found["a"][0]  # the one that is best on A, and nothing of A counts
    assert len(found["a"]) == 1 and beats.text == "pose on B, layerwise-continued against cnn"
    assert beats.estimate.mean == pytest.approx(-30, abs=1.5) and beats.side == "as claimed"
    assert beats.difference.startswith("-") and beats.difference.endswith("]") and "° [-" in beats.difference


def test_the_opposite_and_no_difference_are_told_apart(made: Made) -> None:
    made("cnn", 10.0)
    made("base", 80.0)
    made("lora", 20.0)
    made("lora-10", 20.0)
    found = claims.findings(load_results([made("lora-25", 20.0, missed=25)]))
    assert claims.verdict(found["a"]) == "the opposite"
    assert claims.verdict(found["b"]) == "not shown" and found["b"][0].side == "no clear difference"
    assert claims.verdict(found["e"]) == "the opposite"
    assert claims.verdict(found["c"]) == "not tried"


def test_seeds_count_as_one_system(made: Made) -> None:
    made("base", 80.0)
    made("lora-seed-1", 20.0, missed=15)
    results = load_results([made("lora-seed-2", 20.0)])
    own, _ = claims.findings(results)["b"]
    assert own.estimate.mean == pytest.approx(-100 * 15 / 2 / len(results[0].rows_of("where")))


def test_the_cheapest_candidate_is_taken(sets: dict[str, Path], tmp_path: Path) -> None:
    judged = tmp_path / "judged"
    make_result(judged / "base", sets["A"], "base", 80.0)
    make_result(judged / "blind", sets["A"], "blind", 5.0, missed=20)
    make_result(judged / "both", sets["A"], "both", 25.0)
    make_result(judged / "neither", sets["A"], "neither", 60.0, missed=5)
    given = []
    for name in ("blind", "both", "neither"):
        folder = tmp_path / "candidates" / name
        folder.mkdir(parents=True)
        (folder / "adapter.txt").write_text(name)
        given.append(Candidate(name, folder, 0.5))
    choose({"layerwise": given}, judged, tmp_path / "chosen")
    assert (tmp_path / "chosen" / "layerwise" / "adapter.txt").read_text() == "both"
    text = (tmp_path / "chosen" / "choice.json").read_text()
    assert '"blind"' in text and '"neither"' in text


def test_cost_counts_pose_and_grounding_alike() -> None:
    def tasks(error: float, accuracy: float) -> dict:
        constant = {"geodesic": {"mean": 90.0}}
        return {
            "pose": {"all": {"geodesic": {"mean": error}}, "constant_pose": constant},
            "where": {"accuracy": {"mean": accuracy}},
        }

    base = tasks(95.0, 0.8)
    assert cost(tasks(0.0, 0.8), base) == pytest.approx(-1.0)
    assert cost(tasks(90.0, 0.8), base) == pytest.approx(0.0) == pytest.approx(cost(tasks(0.0, 0.0), base))
