"""The whole comparison at sizes that teach nothing; each stage in a process of its own, forked instead of started."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from forked import Ranks

from cogvlm_hpe import cli, stages
from cogvlm_hpe.paper import plan, sweeps

TEST_ADAPTERS = (*plan.REHEARSAL, "task-arithmetic", "ties", "dare", "layerwise")


def command(module: str, words: Sequence[str]) -> int:
    """What the stage's command line does, on one rank and without the launcher."""
    if module == "launcher":
        number = words.index("--nproc")
        words = [*words[:number], *words[number + 2 :]]
        if words[0] == "train":
            words = ["train", "--skip-preflight", "--config", *words[1:]]
            words[words.index("--run-dir")] = "--run_dir"
    if words[0] == "shards":
        from shards.cli import main

        return main(words[1:])
    sys.argv = ["cogvlm-hpe", *words]
    return cli.main(list(words))


def forked(said: Path) -> Callable[[object], int]:
    def run(work: object) -> int:
        if callable(work):
            work()
            return 0
        assert isinstance(work, list)
        return Ranks(1, command, work[2], work[3:], said=said).wait()

    return run


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_row_comes_out_and_what_is_there_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said, root = tmp_path / "said.txt", tmp_path / "paper"
    monkeypatch.setattr(stages, "_run", forked(said))
    monkeypatch.setattr(plan, "QUICK", replace(plan.QUICK, val_scenes=2, test_scenes=2))
    for name, fewer in (("QUANTILES", (0.1, 0.5)), ("WEIGHTS", (0.5,)), ("DENSITIES", (0.5,))):
        monkeypatch.setattr(plan, name, fewer)
    monkeypatch.setattr(sweeps, "VARIATIONS", {name: sweeps.VARIATIONS[name] for name in ("plain", "signed")})
    words = ["paper", "--quick", "--nproc", "1", "--seeds", "1", "--dir", str(root)]
    assert cli.main(words) == 0, capsys.readouterr().err + said.read_text()
    capsys.readouterr()

    systems = ["base", *(f"{name}-seed-1" for name in (*TEST_ADAPTERS, *plan.CROPS))]
    systems += [f"{name}-continued-seed-1" for name in plan.CONTINUED]
    for on in plan.TESTS:
        assert {path.parent.name for path in (root / "evaluation" / on).glob("*/metrics.json")} == set(systems)
    labelled = json.loads((root / "seed-1" / "w-weak" / "index.json").read_text())
    assert labelled["scope"]["labelled_with"].startswith("cnn:")
    text = (root / "results.md").read_text()
    assert all(f"| {name} |" in text for name in ("cnn", "lora-25", "layerwise-continued", "signed"))
    assert all(f"({name})" in text for name in ("a", "b", "c", "d", "e")) and "not tried" not in text
    pictures = {path.name for path in (root / "results").glob("*.png")}
    assert pictures == {"both.png", "errors.png", "threshold.png"}
    assert all(f"results/{name}" in text for name in pictures)
    for page in (root / "report.html", root / "sweeps" / "report.html"):
        assert page.stat().st_size > 10_000

    shutil.rmtree(root / "seed-1" / "lora-25")
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    first = plan.plan(root, plan.QUICK, [1], nproc=1)
    assert printed.count("finished before, kept") >= len(first) - 1 and "train lora-25\n" in printed
