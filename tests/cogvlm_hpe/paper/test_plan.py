"""The comparison's stages: commands that this project understands, and no test image in any training."""

import argparse
import json
from pathlib import Path

import pytest

from cogvlm_hpe.evaluate.report_command import read_about
from cogvlm_hpe.merge import command as merge
from cogvlm_hpe.merge import settings as merge_settings
from cogvlm_hpe.paper import command, plan, sweeps
from cogvlm_hpe.stages import Stage
from launcher.errors import UserError

SEEDS = (1, 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paper")


@pytest.fixture(scope="module")
def stages(root: Path) -> list[Stage]:
    return plan.plan(root, plan.Sizes(), SEEDS, nproc=2) + sweeps.plan(root, plan.Sizes(), nproc=2)


def words_of(stages: list[Stage], of: str) -> list[list[str]]:
    """What follows the name of a command, for each stage that is one."""
    lines = [stage.work for stage in stages if isinstance(stage.work, list)]
    return [line[line.index(of) + 1 :] for line in lines if line[3] == of]


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_stages_have_names_of_their_own_and_are_commands_of_this_project(stages: list[Stage]) -> None:
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert {tuple(stage.work[1:3]) for stage in stages if isinstance(stage.work, list)} == {
        ("-m", "launcher"),
        ("-m", "cogvlm_hpe"),
    }


def test_merges_are_settings_that_can_be_meant(stages: list[Stage]) -> None:
    parser = argparse.ArgumentParser()
    merge.add_arguments(parser)
    lines = words_of(stages, "merge")
    assert len(lines) == len(SEEDS) * (2 + len(plan.WEIGHTS) + 2 * len(plan.DENSITIES))
    for words in lines:
        merge_settings.check(merge.read_settings(parser.parse_args(words)))


def test_no_training_sees_a_validation_or_test_image(stages: list[Stage], root: Path) -> None:
    mixes = [json.loads(value(words, "--shards.train")) for words in words_of(stages, "train")]
    seen = {Path(entry["path"]).relative_to(root).as_posix() for mix in mixes for entry in mix}
    weak = {f"seed-{seed}/w-weak" for seed in SEEDS}
    assert seen == {"shards/a-train", "shards/a-fewer", *weak}
    crops = [words[words.index("--shards") + 1 : words.index("--out")] for words in words_of(stages, "train-cnn")]
    assert {Path(path).name for paths in crops for path in paths} == {"a-train", "a-base", "b-base"}
    assert [str(root / "shards/a-train")] in crops
    assert all(abs(sum(entry["ratio"] for entry in mix) - 1) < 1e-9 for mix in mixes)


def test_choices_are_made_on_validation_images(stages: list[Stage], root: Path) -> None:
    lines = words_of(stages, "evaluate")
    judged = [words for words in lines if "candidates-judged" in value(words, "--out")]
    assert [value(words, "--shards") for words in judged] == [str(root / "shards/a-val")] * len(SEEDS)
    assert all("a-val" not in value(words, "--shards") for words in lines if words not in judged)


def test_what_is_read_was_made_before(stages: list[Stage], root: Path) -> None:
    made: list[str] = []
    for stage in stages:
        if isinstance(stage.work, list) and "report" not in stage.work:
            needs = [word for word in stage.work if word.startswith(str(root)) and word != str(stage.result)]
            own = [value(stage.work, flag) for flag in ("--run-dir", "--out") if flag in stage.work]
            for path in needs:
                assert path in own or any(path == done or path.startswith(done + "/") for done in made), stage.name
        result = stage.result.parent if stage.result.name in ("index.json", "last") else stage.result
        made.append(str(result))


def test_every_row_is_said_what_it_is(stages: list[Stage]) -> None:
    rows, varied = read_about(plan.ABOUT / "systems.yaml"), read_about(plan.ABOUT / "sweeps.yaml")
    named = {word for words in words_of(stages, "evaluate") for k, word in enumerate(words) if words[k - 1] == "--name"}
    systems = {name.rsplit("-seed-")[0] for name in named}
    candidates = {one.name for group in plan.candidates(plan.Place(Path(), plan.Sizes(), 1)).values() for one in group}
    assert systems - candidates == {*rows, *varied}


def test_seeds_are_different_numbers() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert parser.parse_args(["--seeds", "3,1"]).seeds == [1, 3]
    for wrong in ("1,1", "0", "one", ""):
        with pytest.raises(SystemExit):
            parser.parse_args(["--seeds", wrong])


def test_results_of_other_sizes_are_refused(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    (tmp_path / "paper.json").write_text('{"nproc": 2}')
    with pytest.raises(UserError, match="remove it"):
        command.run(parser.parse_args(["--dir", str(tmp_path)]))
