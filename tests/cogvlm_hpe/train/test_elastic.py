"""Saved at one ZeRO stage and number of ranks, gone on with at another: the next losses are the undisturbed run's."""

import sys
from itertools import product
from pathlib import Path

import pytest
from forked import Ranks
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import elastic

from cogvlm_hpe.model.modeling import CogVLMForCausalLM
from cogvlm_hpe.train.adapter import add_lora, peft_name, trainable

STAGES, RANKS = elastic.STAGES, tuple(elastic.MICRO)
Way = tuple[int, int, int, int]  # stage and ranks of the writer, stage and ranks of the reader
pytestmark = pytest.mark.slow


def pairwise() -> list[Way]:
    """A greedy cover: every pair of values of every two of the four choices is in one of these ways."""
    ways = list(product(STAGES, RANKS, STAGES, RANKS))

    def pairs(way: Way) -> set[tuple[int, int, int, int]]:
        return {(i, way[i], j, way[j]) for i in range(4) for j in range(i)}

    chosen, left = [], set().union(*map(pairs, ways))
    while left:
        best = max(ways, key=lambda way: len(pairs(way) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def start(ranks: int, way: str, folder: Path, jobs: list[str]) -> None:
    started = Ranks(ranks, elastic.work, way, folder, jobs, said=folder / f"{way}-{ranks}.txt")
    assert started.wait() == 0, started.said


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of all stages and numbers of ranks, and what their writers saw."""
    folder = tmp_path_factory.mktemp("elastic")
    for ranks in RANKS:
        start(ranks, "write", folder, [str(stage) for stage in STAGES])
    return folder


@pytest.fixture(scope="module")
def expected(written: Path) -> list[float]:
    """The losses of one rank at stage 0."""
    return elastic.results(written, "write", 1)["0"]


def test_stages_and_ranks_give_the_same_curve(written: Path, expected: list[float]) -> None:
    for ranks in RANKS:
        for stage, losses in elastic.results(written, "write", ranks).items():
            assert losses == pytest.approx(expected, rel=elastic.AIM), f"stage {stage} on {ranks} ranks"


def test_any_stage_and_ranks_go_on_from_any_other(written: Path, expected: list[float]) -> None:
    """A pairwise cover; benchmarks/elastic.py goes all ways."""
    ways = pairwise()
    assert len(ways) < 25
    for ranks in RANKS:
        start(ranks, "read", written, [f"{stage}:{a}-{b}" for a, b, stage, to in ways if to == ranks])
        for job, losses in elastic.results(written, "read", ranks).items():
            assert losses == pytest.approx(expected[elastic.BEFORE :], rel=elastic.AIM), f"{job} on {ranks} ranks"


@pytest.mark.parametrize("stage", STAGES)
def test_adapter_file_is_whole_under_zero(written: Path, stage: int) -> None:
    """Every trained tensor in its true shape, and nothing of the base."""
    config = elastic.run_config(stage)
    model = CogVLMForCausalLM(elastic.model_config())
    add_lora(model, config.adapter, "unused")
    shapes = {peft_name(name): p.shape for name, p in trainable(model).items()}
    for ranks in RANKS:
        path = written / f"{stage}-{ranks}" / "last" / "adapter_model.safetensors"
        tensors = load_file(path)
        assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
        assert all(tensor.any() for name, tensor in tensors.items() if "language" in name)
        base_bytes = sum(4 * p.numel() for p in model.parameters() if not p.requires_grad)
        assert path.stat().st_size < base_bytes / 10
