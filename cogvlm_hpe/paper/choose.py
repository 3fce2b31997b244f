"""Which of a method's candidates becomes its row: by validation images alone, pose and grounding counting alike."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.files import atomic_folder, write_json_atomic

CHOICE = "choice.json"


@dataclass(frozen=True)
class Candidate:
    """A merged adapter; `value` is what was varied: a quantile, a weight or a density."""

    name: str
    folder: Path
    value: float


def cost(scores: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """Pose error as a share of the constant pose's, minus grounding as a share of the base's; smaller is better.

    `scores` and `base`: the `tasks` of a metrics.json. 0 for a model as good as the constant pose that finds what the
    base finds; -1 for one without any error that has forgotten nothing. An answer that is no pose costs what the
    constant pose would. The rule is ours: the paper's public text gives none.
    """
    pose, found = scores["pose"], scores["where"]["accuracy"]["mean"]
    constant = pose["constant_pose"]["geodesic"]["mean"]
    return pose["all"]["geodesic"]["mean"] / constant - found / max(base["where"]["accuracy"]["mean"], 1e-9)


def choose(rows: Mapping[str, Sequence[Candidate]], judged: Path, out: Path) -> None:
    """Copy the cheapest candidate of each row to OUT/ROW, and say in OUT/choice.json what each one cost.

    `judged` holds a result folder for every candidate, by its name, and one for `base`.
    """
    base = tasks_of(judged, "base")
    costs = {row: {one.name: cost(tasks_of(judged, one.name), base) for one in given} for row, given in rows.items()}
    with atomic_folder(out) as folder:
        best = {}
        for row, given in rows.items():
            first = min(given, key=lambda one: costs[row][one.name])
            best[row] = {"name": first.name, "value": first.value}
            shutil.copytree(first.folder, folder / row)
        write_json_atomic(folder / CHOICE, {"chosen": best, "cost": costs})


def tasks_of(judged: Path, name: str) -> dict[str, Any]:
    """The `tasks` of a result in the folder `judged`."""
    return json.loads((judged / name / "metrics.json").read_text())["tasks"]
