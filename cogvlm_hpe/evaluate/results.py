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
from cogvlm_hpe.evaluate.summary import ANGLES, IOU_HIT, KINDS, Row, charged_triples, pose_triples
from launcher.errors import UserError

CONSTANT = "constant pose"
WORDS = ("what", "facing", "tags")
"""Tasks answered in words."""
_EXAMPLE, _EXAMPLES = 48, 3


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

    @property
    def merge(self) -> dict[str, Any]:
        """How the judged adapter was merged, or nothing where it was not."""
        return self.metrics.get("model", {}).get("merge") or {}

    @cached_property
    def rows(self) -> list[Row]:
        """All rows, in key order. Raises UserError where the file is damaged."""
        return read_rows(self.folder / PREDICTIONS)

    @cached_property
    def pose_rows(self) -> list[Row]:
        """The rows of pose questions, in key order. Raises UserError where the file is damaged."""
        return [row for row in self.rows if row["task"] == "pose"]

    @cached_property
    def geodesic_deg(self) -> Array:
        """(n,) errors of the pose questions; an answer that is no pose has the constant pose's error."""
        return metrics.geodesic_errors_deg(self._charged[0], self._truth)

    @cached_property
    def constant_deg(self) -> Array:
        """(n,) errors of the constant pose on the same heads."""
        return metrics.geodesic_errors_deg(np.broadcast_to(self._charged[1], self._truth.shape), self._truth)

    @cached_property
    def _charged(self) -> tuple[Array, Array]:
        return charged_triples(self.pose_rows)

    @cached_property
    def _truth(self) -> Array:
        return pose_triples(self.pose_rows, "truth")


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


def forgotten(a: Result, b: Result) -> Estimate | None:
    """Share of objects that a finds minus b's, on the same ones, with its interval; None where they differ."""
    sides = [[row for row in result.rows if row["task"] == "where"] for result in (a, b)]
    if not sides[0] or [row["id"] for row in sides[0]] != [row["id"] for row in sides[1]]:
        return None
    hits = [np.array([bool(row["errors"]) and row["errors"]["iou"] >= IOU_HIT for row in side]) for side in sides]
    return metrics.paired_difference(hits[0], hits[1], [row["key"] for row in sides[0]])


def comparison_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: each system against the constant pose and every system before it, gain beside forgetting."""
    rows = []
    for name, group in by_set(results).items():
        posed = [result for result in group if "pose" in result.tasks]
        for place, result in enumerate(posed):
            rows.append([name, result.name, CONSTANT, difference(compare(result, None)), "–"])
            for other in posed[:place]:
                objects = forgotten(result, other)
                lost = difference(objects, scale=100.0, unit=" %", better=1) if objects else "–"
                rows.append([name, result.name, other.name, difference(compare(result, other)), lost])
    return ["set", "system", "against", "pose", "grounding"], rows


def difference(estimate: Estimate | None, scale: float = 1.0, unit: str = "", better: int = -1) -> str:
    """`-5.2 [-7.0, -3.1]: better`; `better` is the sign that is."""
    if estimate is None:
        return "other heads"
    mean, low, high = (scale * value for value in (estimate.mean, estimate.low, estimate.high))
    sign = 1 if low > 0 else -1 if high < 0 else 0
    verdict = "no clear difference" if not sign else "better" if sign == better else "worse"
    return f"{mean:+.1f}{unit} [{low:+.1f}, {high:+.1f}]: {verdict}"


def protocol_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: errors of valid answers as published numbers count them, and of all answers, with their n."""
    heads = ["set", "system", "protocol", "heads", "answered", "MAE", "yaw/pitch/roll", "MAEV", "MAE of all"]
    rows = []
    for result in results:
        pose = result.tasks.get("pose", {})
        if "protocols" not in pose:
            continue
        parts = {"full": pose, **pose["protocols"], "aligned": pose["aligned"] | {"n": pose["n"]}}
        for name, part in parts.items():
            valid = part.get("valid", part)
            if not part["n"] or valid["mae"]["mean"] is None:
                continue
            mae = valid["mae"]
            title = f"{name} (turned by {part['turn_deg']:.1f} deg)" if name == "aligned" else name
            charged = f"{part['all']['mae']['mean']:.2f}" if "all" in part else "–"
            answered = part.get("n_valid", pose["n_valid"])
            cells = [str(part["n"]), str(answered), f"{mae['mean']:.2f}"]
            cells += ["/".join(f"{mae[angle]:.2f}" for angle in ANGLES), f"{valid['maev']['mean']:.2f}", charged]
            rows.append([result.set_name, result.name, title, *cells])
    return heads, rows


def front_back_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: of the heads that face the camera or not, how many were answered so."""
    rows = []
    for result in results:
        counts = result.tasks.get("pose", {}).get("front_back", {})
        rows += [
            [result.set_name, result.name, side, *(_of(said[word], sum(said.values())) for word in said)]
            for side, said in counts.items()
            if sum(said.values())
        ]
    return ["set", "system", "true", "answered front", "answered back", "no pose"], rows


def _of(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.1f} %)"


def invalid_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: answers of another kind than was asked for, counted by kind, with examples."""
    rows = []
    for result in results:
        for task, wanted in (("pose", "pose"), ("where", "box")):
            asked = [row for row in result.rows if row["task"] == task]
            for kind in KINDS:
                texts = [row["text"] for row in asked if row["kind"] == kind != wanted]
                if texts:
                    examples = "  ".join(repr(text[:_EXAMPLE]) for text in list(dict.fromkeys(texts))[:_EXAMPLES])
                    rows.append([result.set_name, result.name, wanted, kind, _of(len(texts), len(asked)), examples])
    return ["set", "system", "asked for", "answered", "how many", "examples"], rows
