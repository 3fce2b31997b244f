"""Records to tensors."""

from dataclasses import replace
from pathlib import Path

import torch

from cogvlm_hpe.config import ModelConfig
from cogvlm_hpe.dialogue import TASKS
from cogvlm_hpe.model.folders import resolve_base
from cogvlm_hpe.model.layout import IGNORE
from cogvlm_hpe.model.tokenizer import load_tokenizer
from cogvlm_hpe.train.ask import Asker
from cogvlm_hpe.train.batch import Collator
from shards.index import open_set
from shards.plan import Plan
from shards.stream import Item, Stream

TOKENIZER = load_tokenizer(resolve_base("tiny"))


ASKER = Asker(TOKENIZER, ModelConfig(base="tiny"), [TASKS], at_most=8, min_visible=0.5, seed=3, eos=2)
COLLATOR = Collator(image_size=28, eos=2, pad=0)


def share_of(folder: Path, batch: int = 6) -> tuple[list[Item], torch.Tensor]:
    shard_set = open_set(folder)
    plan = Plan([len(shard_set)], [1.0], 0, batch)
    share = next(iter(Stream([shard_set], plan, 0, 1, image_size=28, note=ASKER)))
    assert share.images is not None
    return share[1], share.images


def hole_at(item: Item) -> Item:
    """A skipped sample as the stream gives it."""
    hole = Item(item.slot, "bad", None, None)
    return replace(hole, note=ASKER(hole))


def test_only_answers_carry_labels(tiny_set) -> None:
    batch = COLLATOR(*share_of(tiny_set()))
    assert batch.n_answers == len(batch.input_ids) == len(batch.image_index) > 6
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        answer = labels != IGNORE
        assert torch.equal(ids[answer], labels[answer])
        assert labels[answer][-1] == 2
        first = int(answer.nonzero()[0, 0])
        assert first >= 1 and answer[first : first + int(answer.sum())].all()


def test_boxes_are_of_what_is_asked_about(tiny_set) -> None:
    batch = COLLATOR(*share_of(tiny_set()))
    for task, box, labels in zip(batch.tasks, batch.boxes, batch.labels, strict=True):
        if task == "where":
            text = TOKENIZER.decode(labels[labels != IGNORE][:-1].tolist())
            said = torch.tensor([int(v) / 1000 for v in text.strip("[]").split(",")])
            assert (said - box).abs().max() <= 0.0011
        assert (box >= 0).all() and (box <= 1).all()


def test_a_skipped_sample_is_a_blank_image_without_questions(tiny_set) -> None:
    items, images = share_of(tiny_set(), batch=2)
    batch = COLLATOR([items[0], hole_at(items[1])], images)
    assert batch.images is images
    assert set(batch.image_index.tolist()) == {0}


def test_a_batch_of_holes_still_runs_one_branch(tiny_set) -> None:
    items, images = share_of(tiny_set(), batch=1)
    batch = COLLATOR([hole_at(items[0])], images)
    assert batch.n_answers == 0
    assert (batch.labels == IGNORE).all() and len(batch.input_ids) == 1
