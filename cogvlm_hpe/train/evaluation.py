"""Judging while training: the evaluator's own questions, answers and scores, over all ranks, on the same images always.

Under ZeRO-3 a module's weights are gathered from all ranks when it is called, so all must make the same calls: they
decode in step, and a rank that has run out of images or questions answers a blank one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogvlm_hpe.config import RunConfig
from cogvlm_hpe.dialogue import Task
from cogvlm_hpe.evaluate import metrics
from cogvlm_hpe.evaluate.answer import Answer, Decoding, answer
from cogvlm_hpe.evaluate.decode import judge, questions
from cogvlm_hpe.evaluate.reduce import collect, headline
from cogvlm_hpe.evaluate.summary import Row, pose_triples, summarise
from cogvlm_hpe.model.load import Loaded
from cogvlm_hpe.model.pixels import normalise
from cogvlm_hpe.train.engine import Engine
from launcher.comm import Comm
from shards.draw import Pixels
from shards.index import ShardSet, open_set
from shards.pixels import decode_pixels
from shards.plan import consecutive_batches
from shards.stream import Item, read_all

_WORST = 16
_COLUMNS = 4


@dataclass
class Judged:
    """One set, which questions are asked about it, and after judging its rows in key order."""

    shard_set: ShardSet
    tasks: list[Task]
    rows: list[Row]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.shard_set.path.name

    @cached_property
    def places(self) -> dict[str, int]:
        """Where in the set the judged images lie, by key."""
        wanted, order = {row["key"] for row in self.rows}, self.shard_set.key_order().tolist()
        return dict(islice(((key, i) for i in order if (key := self.shard_set.key(i)) in wanted), len(wanted)))


@dataclass
class Verdict:
    """How the model does after some steps; rank 0 has it whole, the others know only that it was made."""

    judged: list[Judged]

    @cached_property
    def tasks(self) -> dict[str, Any]:
        """Scores by task over all sets."""
        return summarise(row for one in self.judged for row in one.rows)

    @cached_property
    def scores(self) -> dict[str, float]:
        """The few numbers for curves; with several sets each one's too, as `set/number`."""
        scores = headline(self.tasks)
        if len(self.judged) > 1:
            for one in self.judged:
                scores |= {f"{one.name}/{name}": value for name, value in headline(summarise(one.rows)).items()}
        return scores

    def figures(self, step: int) -> dict[str, Pixels]:
        """Pictures by name: error over the true yaw, and the worst heads with true and predicted axes."""
        if "pose" not in self.tasks:
            return {}
        return {"by_yaw": self._by_yaw(step), "worst": worst_heads(self.judged)}

    def _by_yaw(self, step: int) -> Pixels:
        from cogvlm_hpe.evaluate.plots import error_by_yaw
        from cogvlm_hpe.evaluate.results import Result

        names = ", ".join(one.name for one in self.judged)
        png = error_by_yaw([Result(Path(), f"step {step}", {"tasks": self.tasks, "set": {"name": names}})])
        assert png is not None, "only asked for where there are poses"
        return decode_pixels(png, "png")


class Judge:
    """Asks the model in training about `shards.val`."""

    def __init__(self, config: RunConfig, loaded: Loaded, engine: Engine, comm: Comm) -> None:
        self.loaded, self.engine, self.comm, self.config = loaded, engine, comm, config.evaluate
        self.sets = [(open_set(entry.path), entry.ask) for entry in config.shards.val]
        self.decoding = Decoding(self.config.max_new_tokens, self.config.questions, self.config.decode)
        self.in_step = comm if config.train.zero_stage == 3 else None

    def __call__(self, go_on: Callable[[], bool]) -> Verdict | None:
        """All ranks. Judge the first images of every set; None where `go_on`, asked after each batch, says no."""
        self.loaded.model.eval()
        try:
            judged = []
            for shard_set, tasks in self.sets:
                parts = self._parts(shard_set, tasks, go_on)
                if parts is None:
                    return None
                rows = collect(parts, self._n_batches(shard_set), self.comm)
                judged.append(Judged(shard_set, tasks, rows or []))
            return Verdict(judged)
        finally:
            self.loaded.model.train()

    def _n_batches(self, shard_set: ShardSet) -> int:
        return len(consecutive_batches(min(len(shard_set), self.config.limit), self.config.batch))

    def _parts(
        self, shard_set: ShardSet, tasks: list[Task], go_on: Callable[[], bool]
    ) -> list[tuple[int, list[Row]]] | None:
        """This rank's batches by number; None on all ranks where they are not to go on."""
        comm, batch, limit = self.comm, self.config.batch, self.config.limit
        side = self.loaded.model.config.vision_config["image_size"]
        mine = read_all(shard_set, comm.rank, comm.size, batch, side, 0, limit)
        parts = []
        for _ in range(ceil(self._n_batches(shard_set) / comm.size)):
            number, items = next(mine, (None, []))
            rows = self._batch(items, tasks)
            if number is not None:
                parts.append((number, rows))
            if not go_on():
                return None
        return parts

    def _batch(self, items: Sequence[Item], tasks: list[Task]) -> list[Row]:
        asked = [
            (number, row)
            for number, item in enumerate(items)
            if item.record is not None
            for row in questions(item.key, item.record, tasks, self.loaded.notes)
        ]
        at_once, rounds = self.config.questions, ceil(len(asked) / self.config.questions)
        rows = []
        for turn in range(rounds if self.in_step is None else self.in_step.max(rounds)):
            part = asked[turn * at_once : (turn + 1) * at_once]
            answers = self._answers(items, part) if part else self._blank(tasks[0])
            for (_, row), given in zip(part, answers, strict=False):
                rows.append(judge(row, given, self.loaded.notes["answer_format"]))
        return rows

    def _answers(self, items: Sequence[Item], part: Sequence[tuple[int, Row]]) -> list[Answer]:
        needed = sorted({number for number, _ in part})
        images = torch.stack([image for number in needed if (image := items[number].image) is not None])
        index = [needed.index(number) for number, _ in part]
        return self._ask(images, index, [row["task"] for _, row in part], [row["question"] for _, row in part])

    def _blank(self, task: Task) -> list[Answer]:
        side = self.loaded.model.config.vision_config["image_size"]
        return self._ask(torch.zeros(1, 3, side, side, dtype=torch.uint8), [0], [task], ["?"])

    def _ask(self, images: torch.Tensor, index: list[int], tasks: list[Task], queries: list[str]) -> list[Answer]:
        model = self.loaded.model
        pixels = normalise(images).to(model.device, model.dtype)
        return self.engine.inside(
            lambda: answer(self.loaded, pixels, index, tasks, queries, self.decoding, self.in_step)
        )


def worst_heads(judged: Sequence[Judged], heads: int = _WORST) -> Pixels:
    """The heads with the largest errors, those without a valid pose first: true axes solid, predicted ones dashed."""
    from shards.draw import contact_sheet

    rows = [(one, row) for one in judged for row in one.rows if row["task"] == "pose"]
    rows.sort(key=lambda pair: -(pair[1]["errors"] or {"geodesic": np.inf})["geodesic"])
    tiles, titles = [], []
    for one, row in rows[:heads]:
        tiles.append(_tile(one, row))
        titles.append("no pose" if row["errors"] is None else f"{row['errors']['geodesic']:.0f} deg")
    return contact_sheet(tiles, titles, columns=_COLUMNS)


def _tile(one: Judged, row: Row) -> Pixels:
    from cogvlm_hpe.draw import head_tile

    stored = one.shard_set.read(one.places[row["key"]])
    truth = metrics.rotations(pose_triples([row], "truth"))[0]
    predicted = None if row["parsed"] is None else metrics.rotations(pose_triples([row], "parsed"))[0]
    return head_tile(decode_pixels(stored.image, stored.extension), row["box"], truth, predicted)
