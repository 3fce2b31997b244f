"""One thing of LoRA's training changed at a time, for seed 1: what stands in the way, and what does not."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogvlm_hpe import stages
from cogvlm_hpe.paper.plan import TASKS, Place, Sizes, report, trained
from cogvlm_hpe.stages import Stage

TESTS = ("a-test", "b-test")
FEWER = 4
"""By so many the smaller training set is smaller."""


@dataclass(frozen=True)
class Variation:
    """A training of its own: `words` are what `train` is told besides."""

    words: tuple[Any, ...] = ()
    set_name: str = "a-train"
    longer: int = 1
    rehearsal: float = 0.25


VARIATIONS = {
    "plain": Variation(),
    "scope-all": Variation(("--adapter.scope", "all")),
    "signed": Variation(("--model.answer_format", "signed")),
    "fewer-scenes": Variation(set_name="a-fewer"),
    "twice-as-long": Variation(longer=2),
    "rehearsal-0": Variation(rehearsal=0.0),
    "rehearsal-50": Variation(rehearsal=0.5),
}


def plan(root: Path, sizes: Sizes, nproc: int) -> list[Stage]:
    """The stages of all variations, of expectation decoding, and a report of their own."""
    at = Place(root, sizes, nproc, seed=1, folder="sweeps")
    fewer = max(1, at.sizes.train_scenes // FEWER)
    return [
        stages.shards(at.set("a-fewer"), "A", "train", fewer, at.sizes.data_seed, at.nproc),
        *(_train(at, name, variation) for name, variation in VARIATIONS.items()),
        *(stage for on in TESTS for stage in _evaluate(at, on)),
        report(at.own, [at.own / "evaluation" / on for on in TESTS], "sweeps.yaml"),
    ]


def _train(at: Place, name: str, variation: Variation) -> Stage:
    steps = at.sizes.max_steps * variation.longer
    return trained(at, name, at.set(variation.set_name), variation.rehearsal, steps, *variation.words)


def _evaluate(at: Place, on: str) -> list[Stage]:
    out = at.own / "evaluation" / on
    systems = {name: at.adapter(name) for name in VARIATIONS}
    greedy = stages.evaluate(at.base, systems, at.set(on), out, at.nproc, "--tasks", TASKS)
    how = ("--tasks", "pose", "--decode", "expectation")
    plain = {"expectation": at.adapter("plain")}
    expected = stages.evaluate(at.base, plain, at.set(on), out / "expectation", at.nproc, *how)
    return [replace(greedy, name=f"sweeps: evaluate on {on}"), replace(expected, name=f"sweeps: expectation on {on}")]
