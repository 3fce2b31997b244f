"""The claims of HPE-CogVLM (arXiv 2406.01914), each held against the results: shown, not shown, or the opposite.

A claim is a list of comparisons between two systems on the same questions, each with a direction. It is shown where
every 95 % interval lies on the claimed side of zero, the opposite where any lies on the other, and not shown otherwise.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cogvlm_hpe.evaluate import metrics
from cogvlm_hpe.evaluate.metrics import Array, Estimate
from cogvlm_hpe.evaluate.results import Result
from cogvlm_hpe.evaluate.systems import System, compare, forgotten, systems_of
from cogvlm_hpe.paper.plan import CROPS

CLAIMS = {
    "a": "A vision language model that sees the whole image beats a network on crops across data sets",
    "a, same heads": "It does so too where that network was taught all heads that the base was taught",
    "b": "Plain LoRA tuning is not enough: it forgets to find objects",
    "c": "Task arithmetic blends the two answer formats, more than the layer-based merge does",
    "d": "The layer-based merge keeps more grounding than LoRA, and reads poses better than the other merges",
    "d, continued": "After the same continued training the layer-based merge reads poses better than its controls",
    "e": "Rehearsal helps against forgetting",
}
_MERGES = ("task-arithmetic", "ties", "dare")
_MODELS_WITHOUT = (*CROPS, "base")


@dataclass(frozen=True)
class Finding:
    """One comparison: `claimed` is the sign its mean should have."""

    text: str
    estimate: Estimate
    unit: str
    claimed: int

    @property
    def sign(self) -> int:
        """Which side of zero the whole interval is on; 0 for neither."""
        return int(self.estimate.low > 0) - int(self.estimate.high < 0)

    @property
    def side(self) -> str:
        """The same in words."""
        return "as claimed" if self.sign == self.claimed else "the opposite" if self.sign else "no clear difference"

    @property
    def difference(self) -> str:
        """The mean with its interval, in the unit."""
        return f"{self.estimate.mean:+.1f}{self.unit} [{self.estimate.low:+.1f}, {self.estimate.high:+.1f}]"


def verdict(findings: Sequence[Finding]) -> str:
    """`shown`, `not shown` or `the opposite`; `not tried` without a finding."""
    if not findings:
        return "not tried"
    if any(finding.sign == -finding.claimed for finding in findings):
        return "the opposite"
    return "shown" if all(finding.sign == finding.claimed for finding in findings) else "not shown"


def findings(results: Sequence[Result]) -> dict[str, list[Finding]]:
    """Of each claim of CLAIMS, from all results of the comparison; seeds count as one system."""
    by_set: dict[str, dict[str, System]] = {}
    for system in systems_of(results):
        by_set.setdefault(system.runs[0].metrics["set"]["name"], {})[system.name] = system
    own, other = by_set.get("synthetic-A", {}), by_set.get("synthetic-B", {})
    best = _best_model(own)
    both = [("A", own), ("B", other)]
    return {
        "a": _pose([("B", other)], [(best, "cnn")]),
        "a, same heads": _pose([("B", other)], [(best, "cnn-more-heads")]),
        "b": _grounding(both, [("lora", "base")], claimed=-1),
        "c": _blending(both, [("task-arithmetic", "layerwise")]),
        "d": _grounding(both, [("layerwise", "lora")], claimed=1)
        + _pose(both, [("layerwise", merge) for merge in _MERGES]),
        "d, continued": _pose(
            both, [("layerwise-continued", f"{name}-continued") for name in ("lora", "task-arithmetic")]
        ),
        "e": _grounding(both, [("lora-10", "lora"), ("lora-25", "lora")], claimed=1),
    }


def _best_model(own: dict[str, System]) -> str:
    """The language model's system that errs least on A: chosen there, so that B stays untouched by the choice."""
    models = [system for name, system in own.items() if name not in _MODELS_WITHOUT]
    return min(models, key=lambda system: system.error_deg).name if models else ""


Sets = Sequence[tuple[str, dict[str, System]]]
Pairs = Sequence[tuple[str, str]]


def _pairs(sets: Sets, pairs: Pairs) -> Iterable[tuple[str, System, System]]:
    for where, systems in sets:
        for first, second in pairs:
            if first in systems and second in systems:
                yield f"{where}, {first} against {second}", systems[first], systems[second]


def _pose(sets: Sets, pairs: Pairs) -> list[Finding]:
    """Geodesic error, degrees."""
    made = ((f"pose on {text}", compare(first, second)) for text, first, second in _pairs(sets, pairs))
    return [Finding(text, estimate, "°", -1) for text, estimate in made if estimate is not None]


def _grounding(sets: Sets, pairs: Pairs, claimed: int) -> list[Finding]:
    """Objects found, percent."""
    made = ((f"objects on {text}", forgotten(first, second)) for text, first, second in _pairs(sets, pairs))
    return [Finding(text, _percent(estimate), " %", claimed) for text, estimate in made if estimate is not None]


def _blending(sets: Sets, pairs: Pairs) -> list[Finding]:
    """Pose and box answers that mix formats, percent."""
    made = []
    for text, first, second in _pairs(sets, pairs):
        keys = [row["key"] for row in first.runs[0].rows if row["task"] in ("pose", "where")]
        estimate = metrics.paired_difference(_blended(first), _blended(second), keys)
        made.append(Finding(f"blended answers on {text}", _percent(estimate), " %", 1))
    return made


def _blended(system: System) -> Array:
    """(n,) share of the runs whose answer mixes the formats, for each pose and box question."""
    marks = [[row["kind"] == "blended" for row in run.rows if row["task"] in ("pose", "where")] for run in system.runs]
    return np.mean(np.array(marks, dtype=float), axis=0)


def _percent(estimate: Estimate) -> Estimate:
    return Estimate(100 * estimate.mean, 100 * estimate.low, 100 * estimate.high, estimate.n)
