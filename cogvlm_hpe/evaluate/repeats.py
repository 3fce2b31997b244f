"""One system judged twice on one set: how many answers another batch size, number format or device has changed.

Greedy answers can differ only where two tokens were so nearly as likely that rounding decides: such a token flips, and
all that follows it may. Numbers of one result do not depend on ranks, so two results differ by flipped answers alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cogvlm_hpe.evaluate.results import Result, by_set
from cogvlm_hpe.evaluate.systems import System, compare, difference


@dataclass(frozen=True)
class Flips:
    """Of `asked` questions so many have another text, and of these so many an answer of another kind."""

    asked: int
    texts: int
    kinds: int


def flips(a: Result, b: Result) -> Flips | None:
    """What differs between two results; None where they were not asked the same questions."""
    pairs = list(zip(a.rows, b.rows, strict=False))
    asked = ("id", "task", "question", "truth")
    if len(a.rows) != len(b.rows) or any(x.get(key) != y.get(key) for x, y in pairs for key in asked):
        return None
    other = [(x, y) for x, y in pairs if x["text"] != y["text"]]
    return Flips(len(pairs), len(other), sum(x["kind"] != y["kind"] for x, y in other))


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: each later result of a model and adapter against the first one on the same set."""
    rows = []
    for name, group in by_set(results).items():
        first: dict[str, Result] = {}
        for result in group:
            before = first.setdefault(_judged(result), result)
            found = flips(result, before) if before is not result else None
            if found is not None:
                pair = (System(one.name, (one,)) for one in (result, before))
                changed = difference(compare(*pair)) if "pose" in result.tasks else "–"
                cells = [str(found.asked), str(found.texts), str(found.kinds)]
                rows.append([name, before.name, result.name, _how(before, result), *cells, changed])
    return ["set", "judged", "and again", "with", "questions", "other text", "other kind", "pose"], rows


def _judged(result: Result) -> str:
    """What stands for the weights that gave the answers; the folder where that is not known."""
    paths = result.run.get("model"), result.run.get("adapter")
    return repr((paths, result.metrics.get("model"))) if paths[0] else str(result.folder)


def _how(a: Result, b: Result) -> str:
    """`batch 16 → 4, dtype fp32 → bf16`, or that nothing about it differs."""
    before, after = (result.metrics.get("decoding", {}) for result in (a, b))
    changed = [f"{key} {before.get(key)} → {value}" for key, value in after.items() if before.get(key) != value]
    return ", ".join(changed) or "the same settings"
