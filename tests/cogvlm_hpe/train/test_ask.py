"""What a run asks about a sample."""

from itertools import islice

import pytest

from cogvlm_hpe.config import ModelConfig
from cogvlm_hpe.dialogue import TASKS
from cogvlm_hpe.model.folders import resolve_base
from cogvlm_hpe.model.tokenizer import load_tokenizer
from cogvlm_hpe.train.ask import Asker, choose
from shards.augment import Augment
from shards.index import open_set
from shards.plan import Plan
from shards.stream import Stream


def test_readers_in_other_processes_ask_the_same(tiny_set) -> None:
    shard_set = open_set(tiny_set())
    plan = Plan.of([shard_set], [1.0], 0, 4)
    asker = Asker(
        load_tokenizer(resolve_base("tiny")), ModelConfig(base="tiny"), [TASKS], at_most=3, min_visible=0.5, seed=3,
        eos=2,
    )  # fmt: skip
    here, there = (
        [
            item.note
            for _, items in islice(
                Stream([shard_set], plan, 0, 1, 28, augment=Augment(flip=True), note=asker, workers=workers), 3
            )
            for item in items
        ]
        for workers in (0, 2)
    )
    assert here == there
    assert 0 < max(map(len, here)) <= 3


@pytest.mark.parametrize("position", [0, 1, 99])
def test_choice_depends_on_seed_and_position_alone(position: int) -> None:
    questions = list(range(20))
    chosen = choose(questions, 5, 7, position)
    assert chosen == choose(questions, 5, 7, position) == sorted(chosen)
    assert len(chosen) == 5
    assert len({tuple(choose(questions, 5, 7, p)) for p in range(50)}) > 10
