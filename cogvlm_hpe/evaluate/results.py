"""Result folders side by side: the rows of the report's tables, and paired comparisons between systems."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cogvlm_hpe.evaluate import metrics
from cogvlm_hpe.evaluate.metrics import Array, Estimate
from cogvlm_hpe.evaluate.reduce import METRICS, PREDICTIONS, RUN
from cogvlm_hpe.evaluate.summary import Row, charged_triples, pose_triples
from launcher.errors import UserError

CONSTANT = "constant pose"
WORDS = ("what", "facing", "tags")
"""Tasks answered in words."""


@dataclass(frozen=True)
class Result:
    """One evaluation: a system on a set. `name` is unique among the results on that set."""

    folder: Path
    name: str
    metrics: dict[str, Any]

    @property
    def set_name(self) -> str:
        """Name of the set it was judged on."""
        return str(self.metrics["set"]["name"])

    @property
    def tasks(self) -> dict[str, Any]:
        """Scores by task."""
        return self.metrics["tasks"]

    @cached_property
    def run(self) -> dict[str, Any]:
        """run.json, or nothing where it is missing."""
        path = self.folder / RUN
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @cached_property
    def pose_rows(self) -> list[Row]:
        """The rows of pose questions, in key order. Raises UserError where the file is damaged."""
        return [row for row in read_rows(self.folder / PREDICTIONS) if row["task"] == "pose"]

    @cached_property
    def geodesic_deg(self) -> Array:
        """(n,) errors of the pose questions; an answer that is no pose has the constant pose's error."""
        charged, _ = charged_triples(self.pose_rows)
        return metrics.geodesic_errors_deg(charged, pose_triples(self.pose_rows, "truth"))

    @cached_property
    def constant_deg(self) -> Array:
        """(n,) errors of the constant pose on the same heads."""
        truth = pose_triples(self.pose_rows, "truth")
        _, constant = charged_triples(self.pose_rows)
        return metrics.geodesic_errors_deg(np.broadcast_to(constant, truth.shape), truth)


def read_rows(path: Path) -> list[Row]:
    """The lines of a predictions.jsonl. Raises UserError naming the line that is damaged."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise UserError(f"{path}, line {number}: not JSON; evaluate again") from None
    return rows


def load_results(folders: Iterable[Path]) -> list[Result]:
    """Every finished result in or below `folders`, in their order. Raises UserError where a folder holds none."""
    results: list[Result] = []
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder; name result folders of `cogvlm-hpe evaluate`")
        found = sorted(path.parent for path in Path(folder).rglob(METRICS) if (path.parent / PREDICTIONS).is_file())
        if not found:
            raise UserError(
                f"{folder}: no result in it (no {METRICS} beside a {PREDICTIONS}); run `cogvlm-hpe evaluate`"
            )
        known = {result.folder for result in results}
        results += [_load(place) for place in (path.resolve() for path in found) if place not in known]
    return _with_unique_names(results)


def _load(folder: Path) -> Result:
    try:
        value = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        return Result(folder, str(value["system"]), {"set": value["set"], "tasks": value["tasks"]} | value)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / METRICS}: not a result of `cogvlm-hpe evaluate` ({error!r}); evaluate again"
        ) from None


def _with_unique_names(results: list[Result]) -> list[Result]:
    seen: dict[tuple[str, str], int] = {}
    for result in results:
        seen[result.set_name, result.name] = seen.get((result.set_name, result.name), 0) + 1
    return [
        replace(result, name=f"{result.name} ({result.folder.parent.name}/{result.folder.name})")
        if seen[result.set_name, result.name] > 1
        else result
        for result in results
    ]


def by_set(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of each set, sets and systems in the order they were given."""
    sets: dict[str, list[Result]] = {}
    for result in results:
        sets.setdefault(result.set_name, []).append(result)
    return sets


def score_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the result table: for each set the constant pose, then every system."""
    heads = [
        "set",
        "system",
        "heads",
        "geodesic",
        "median",
        "MAE yaw/pitch/roll",
        "grounding",
        "wrong format",
        "blended",
    ]
    rows = []
    for name, group in by_set(results).items():
        posed = [result for result in group if "pose" in result.tasks]
        if posed:
            pose = posed[0].tasks["pose"]
            rows.append([name, CONSTANT, str(pose["n"]), *_errors(pose["constant_pose"]), "–", "–", "–"])
        rows += [_score_row(result) for result in group]
    return heads, rows


def words_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: share of questions answered in words exactly as they should be."""
    rows = []
    for result in results:
        cells = [
            _percent(result.tasks[task]["accuracy"]["mean"], result.tasks[task]["accuracy"]["ci95"])
            if task in result.tasks
            else "–"
            for task in WORDS
        ]
        if any(cell != "–" for cell in cells):
            rows.append([result.set_name, result.name, *cells])
    return ["set", "system", *WORDS], rows


def _score_row(result: Result) -> list[str]:
    pose, where = result.tasks.get("pose"), result.tasks.get("where")
    cells = [result.set_name, result.name]
    cells += [str(pose["n"]), *_errors(pose["all"])] if pose else ["–"] * 4
    cells.append(_percent(where["accuracy"]["mean"], where["accuracy"]["ci95"]) if where else "–")
    asked = [(task, label) for task, label in ((pose, "pose"), (where, "box")) if task]
    wrong = [f"{_percent(1 - task['n_valid'] / task['n'])} {label}" for task, label in asked]
    blended = [f"{_percent(task['format']['blended'])} {label}" for task, label in asked]
    return [*cells, ", ".join(wrong) or "–", ", ".join(blended) or "–"]


def _errors(scores: dict[str, Any]) -> list[str]:
    geodesic, mae = scores["geodesic"], scores["mae"]
    low, high = geodesic["ci95"]
    return [
        f"{geodesic['mean']:.1f} [{low:.1f}, {high:.1f}]",
        f"{geodesic['median']:.1f}",
        f"{mae['mean']:.1f} ({mae['yaw']:.1f}/{mae['pitch']:.1f}/{mae['roll']:.1f})",
    ]


def _percent(share: float, interval: Sequence[float] | None = None) -> str:
    text = f"{100 * share:.1f} %"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def compare(a: Result, b: Result | None) -> Estimate | None:
    """Mean of a's geodesic error minus b's on the same heads, with its interval; `b` None: against the constant pose.

    None where the two were not judged on the same heads.
    """
    groups = [row["key"] for row in a.pose_rows]
    if b is None:
        return metrics.paired_difference(a.geodesic_deg, a.constant_deg, groups)
    if [row["id"] for row in a.pose_rows] != [row["id"] for row in b.pose_rows]:
        return None
    return metrics.paired_difference(a.geodesic_deg, b.geodesic_deg, groups)


def comparison_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: each system against the constant pose and against the set's first system, head by head."""
    rows = []
    for name, group in by_set(results).items():
        posed = [result for result in group if "pose" in result.tasks]
        for result in posed:
            first = "–" if result is posed[0] else _difference(compare(result, posed[0]))
            rows.append([name, result.name, _difference(compare(result, None)), first])
    return ["set", "system", f"against the {CONSTANT}", "against the first system"], rows


def _difference(estimate: Estimate | None) -> str:
    if estimate is None:
        return "other heads"
    verdict = "better" if estimate.high < 0 else "worse" if estimate.low > 0 else "no clear difference"
    return f"{estimate.mean:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}]: {verdict}"
