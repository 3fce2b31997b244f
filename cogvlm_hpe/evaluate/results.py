"""Result folders side by side, and the rows of the report's tables about them."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cogvlm_hpe.evaluate import metrics
from cogvlm_hpe.evaluate.metrics import Array
from cogvlm_hpe.evaluate.reduce import METRICS, PREDICTIONS, RUN
from cogvlm_hpe.evaluate.summary import ANGLES, KINDS, Row, charged_triples, pose_triples
from launcher.errors import UserError

CONSTANT = "constant pose"
WORDS = ("what", "facing", "tags")
"""Tasks answered in words."""
_EXAMPLE, _EXAMPLES = 48, 3
_SEED = re.compile(r"(.+?)[\s,_-]+seed[\s_-]*(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Result:
    """One evaluation: a system on a set. `name` is unique among the results on that set, `label` names the set."""

    folder: Path
    name: str
    metrics: dict[str, Any]
    label: str = ""

    @property
    def set_name(self) -> str:
        """The set it was judged on: its name, with split and number of images where another set shares it."""
        return self.label or str(self.metrics["set"]["name"])

    @property
    def system(self) -> str:
        """The name without the seed: what all runs of one system share."""
        found = _SEED.fullmatch(self.name)
        return found[1] if found else self.name

    @property
    def seed(self) -> int | None:
        """Of a name that ends in `seed N`, that number."""
        found = _SEED.fullmatch(self.name)
        return int(found[2]) if found else None

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
        return self.rows_of("pose")

    def rows_of(self, task: str) -> list[Row]:
        """The rows of one task's questions, in key order. Raises UserError where the file is damaged."""
        return [row for row in self.rows if row["task"] == task]

    @cached_property
    def geodesic_deg(self) -> Array:
        """(n,) errors of the pose questions; an answer that is no pose has the constant pose's error."""
        return metrics.geodesic_errors_deg(self._charged[0], self._truth)

    @cached_property
    def mae_deg(self) -> Array:
        """(n,) errors of yaw, pitch and roll, their mean, of the same questions charged in the same way."""
        return metrics.angle_errors_deg(self._charged[0], self._truth).mean(axis=1)

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
    return _with_unique_names(_with_set_labels(results))


def _load(folder: Path) -> Result:
    try:
        value = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        return Result(folder, str(value["system"]), {"set": value["set"], "tasks": value["tasks"]} | value)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / METRICS}: not a result of `cogvlm-hpe evaluate` ({error!r}); evaluate again"
        ) from None


def _with_set_labels(results: list[Result]) -> list[Result]:
    """Two splits of one set, or two sizes of one split, are not the same images."""
    known: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        known.setdefault(result.set_name, []).append(result.metrics["set"])

    def label(result: Result) -> str:
        sets, own = known[result.set_name], result.metrics["set"]
        splits, sizes = ({said.get(key) for said in sets} for key in ("split", "images"))
        words = [result.set_name] + [str(own.get("split"))] * (len(splits) > 1 and own.get("split") is not None)
        same = {said.get("images") for said in sets if said.get("split") == own.get("split")}
        return " ".join(words + [f"({own.get('images')} images)"] * (len(same) > 1 and len(sizes) > 1))

    return [replace(result, label=label(result)) for result in results]


def _with_unique_names(results: list[Result]) -> list[Result]:
    """Results of one name on one set get the shortest tail of their folder, of at least two parts, that tells them."""
    same: dict[tuple[str, str], list[Path]] = {}
    for result in results:
        same.setdefault((result.set_name, result.name), []).append(result.folder)

    def name(result: Result) -> str:
        folders = same[result.set_name, result.name]
        if len(folders) == 1:
            return result.name
        depths = range(2, 1 + max(len(folder.parts) for folder in folders))
        depth = next(d for d in depths if len({folder.parts[-d:] for folder in folders}) == len(folders))
        return f"{result.name} ({'/'.join(result.folder.parts[-depth:])})"

    return [replace(result, name=name(result)) for result in results]


def by_set(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of each set, sets and systems in the order they were given."""
    sets: dict[str, list[Result]] = {}
    for result in results:
        sets.setdefault(result.set_name, []).append(result)
    return sets


def score_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: for each set the constant pose, then every run of every system."""
    heads = ["set", "system", "heads", "geodesic", "median", "p90", "MAE yaw/pitch/roll", "grounding", "mean IoU"]
    heads += ["wrong format", "blended"]
    rows = []
    for name, group in by_set(results).items():
        posed = [result for result in group if "pose" in result.tasks]
        if posed:
            pose = posed[0].tasks["pose"]
            rows.append([name, CONSTANT, str(pose["n"]), *_errors(pose["constant_pose"]), *["–"] * 4])
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
    cells += [str(pose["n"]), *_errors(pose["all"])] if pose else ["–"] * 5
    cells.append(_percent(where["accuracy"]["mean"], where["accuracy"]["ci95"]) if where else "–")
    cells.append(f"{where['iou']['mean']:.2f}" if where else "–")
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
        f"{geodesic['p90']:.1f}",
        f"{mae['mean']:.1f} ({mae['yaw']:.1f}/{mae['pitch']:.1f}/{mae['roll']:.1f})",
    ]


def _percent(share: float, interval: Sequence[float] | None = None) -> str:
    text = f"{100 * share:.1f} %"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


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
            asked = result.rows_of(task)
            for kind in KINDS:
                texts = [row["text"] for row in asked if row["kind"] == kind != wanted]
                if texts:
                    examples = "  ".join(repr(text[:_EXAMPLE]) for text in list(dict.fromkeys(texts))[:_EXAMPLES])
                    rows.append([result.set_name, result.name, wanted, kind, _of(len(texts), len(asked)), examples])
    return ["set", "system", "asked for", "answered", "how many", "examples"], rows
