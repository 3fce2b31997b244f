"""Systems on sets: the runs of each, which differ by the seed of their training, as one; compared head by head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cogvlm_hpe.evaluate import metrics
from cogvlm_hpe.evaluate.metrics import Array, Estimate
from cogvlm_hpe.evaluate.results import CONSTANT, Result, by_set
from cogvlm_hpe.evaluate.summary import IOU_HIT

COLUMNS = ("geodesic", "MAE", "not a pose", "grounding", "not a box")
"""Of the overview, for each set."""
NOTHING = "–"
"""What a cell holds where nothing was asked."""
_ALL_PAIRS = 5
_FLOOR = "no model: answers every head with the one pose that suits the set best, which is no better than not looking"


@dataclass(frozen=True)
class System:
    """A system on a set: its runs, at least one, all asked about the same heads and objects."""

    name: str
    runs: tuple[Result, ...]

    @property
    def set_name(self) -> str:
        """The set it was judged on."""
        return self.runs[0].set_name

    @cached_property
    def geodesic_deg(self) -> Array:
        """(n,) errors of the pose questions in degrees, each the mean over the runs."""
        return np.mean([run.geodesic_deg for run in self.runs], axis=0)

    @property
    def error_deg(self) -> float:
        """Mean of `geodesic_deg`."""
        return float(self.geodesic_deg.mean())

    @cached_property
    def geodesic(self) -> Estimate:
        """Mean of `geodesic_deg`; the interval is from resampling images."""
        return metrics.bootstrap_mean(self.geodesic_deg, [row["key"] for row in self.runs[0].pose_rows])

    @cached_property
    def mae(self) -> Estimate:
        """Mean of the errors of yaw, pitch and roll, degrees, over heads and runs; the interval is as above."""
        errors = np.mean([run.mae_deg for run in self.runs], axis=0)
        return metrics.bootstrap_mean(errors, [row["key"] for row in self.runs[0].pose_rows])

    @cached_property
    def hits(self) -> Array:
        """(n,) shares of the runs that found each object."""
        found = [
            [bool(row["errors"]) and row["errors"]["iou"] >= IOU_HIT for row in run.rows_of("where")]
            for run in self.runs
        ]
        return np.mean(np.array(found, dtype=float), axis=0)

    @cached_property
    def grounding(self) -> Estimate:
        """Mean of `hits`; the interval is from resampling images."""
        return metrics.bootstrap_mean(self.hits, [row["key"] for row in self.runs[0].rows_of("where")])

    def asked(self, task: str) -> list[tuple[Any, ...]]:
        """About which heads or objects it was asked, and what is true of them; about objects also in which words.

        A head's question holds a prompt that each system has of its own; an object is named by the question alone.
        """
        keys = ("id", "question", "truth") if task == "where" else ("id", "truth")
        return [tuple(row.get(key) for key in keys) for row in self.runs[0].rows_of(task)]

    def has(self, task: str) -> bool:
        """Whether it was asked so."""
        return task in self.runs[0].tasks


def systems_of(results: Sequence[Result]) -> list[System]:
    """Results with those of one system and set as one; runs that were not asked the same stay by themselves."""
    grouped: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        grouped.setdefault((result.set_name, result.system), []).append(result)
    systems = []
    for (_, name), runs in grouped.items():
        keys = ("id", "task", "truth")
        asked = {repr([[row[key] for key in keys] for row in run.rows]) for run in runs} if len(runs) > 1 else set()
        if len(asked) > 1:
            systems += [System(run.name, (run,)) for run in runs]
        else:
            systems.append(System(name, tuple(sorted(runs, key=lambda run: run.seed or 0))))
    return systems


def first_runs(systems: Sequence[System]) -> list[Result]:
    """One run of each system: that of the smallest seed."""
    return [system.runs[0] for system in systems]


def in_order(results: Sequence[Result], about: Mapping[str, str]) -> list[Result]:
    """Results with the systems of `about` first, in its order."""
    places = {name: place for place, name in enumerate(about)}
    return sorted(results, key=lambda result: places.get(result.system, len(places)))


@dataclass(frozen=True)
class Overview:
    """A row for each system; for each of `sets` the columns COLUMNS. `best` are (row, column) of the best numbers."""

    sets: list[str]
    rows: list[list[str]]
    about: list[str]
    best: set[tuple[int, int]]

    def columns_of(self, name: str) -> slice:
        """Those of one set in a row."""
        start = 1 + self.sets.index(name) * len(COLUMNS)
        return slice(start, start + len(COLUMNS))


def overview(results: Sequence[Result], about: Mapping[str, str] | None = None) -> Overview:
    """Every system in one row. `about` says in a sentence what a system is, by its name."""
    said = {CONSTANT: _FLOOR} | dict(about or {})
    sets, systems = list(by_set(results)), systems_of(results)
    names = list(dict.fromkeys(system.name for system in systems))
    known = {(system.name, system.set_name): system for system in systems}
    rows, values = [], []
    floors = {name: next((s for s in systems if s.set_name == name and s.has("pose")), None) for name in sets}
    if any(floors.values()):
        rows.append([CONSTANT, *(cell for name in sets for cell in _floor_cells(floors[name]))])
        values.append([np.nan] * len(COLUMNS) * len(sets))
    for name in names:
        cells = [_cells(known.get((name, place))) for place in sets]
        rows.append([name, *(text for part in cells for text, _ in part)])
        values.append([value for part in cells for _, value in part])
    return Overview(sets, rows, [said.get(row[0], "") for row in rows], _best(np.array(values)))


def _best(values: Array) -> set[tuple[int, int]]:
    """(row, column) in the table of the smallest of each column of (rows, columns) values, unless most share it."""
    best = set()
    for column, numbers in enumerate(values.T if values.size else []):
        known = numbers[np.isfinite(numbers)]
        smallest = np.flatnonzero(numbers == known.min()) if len(known) else known
        if 0 < len(smallest) <= len(known) / 2:
            best |= {(int(row), column + 1) for row in smallest}
    return best


def _floor_cells(system: System | None) -> list[str]:
    if system is None:
        return [NOTHING] * len(COLUMNS)
    pose = system.runs[0].tasks["pose"]
    scores = [pose["constant_pose"][name] for name in ("geodesic", "mae")]
    errors = [Estimate(of["mean"], of["ci95"][0], of["ci95"][1], pose["n"]) for of in scores]
    return [*(_spread(error, ()) for error in errors), *[NOTHING] * 3]


def _cells(system: System | None) -> list[tuple[str, float]]:
    """Text and value (the smaller the better) of each column; NaN where there is none."""
    cells = [(NOTHING, float("nan"))] * len(COLUMNS)
    if system is None:
        return cells
    tasks = [run.tasks for run in system.runs]
    if system.has("pose"):
        means = [[task["pose"]["all"][name]["mean"] for task in tasks] for name in ("geodesic", "mae")]
        cells[0] = _spread(system.geodesic, means[0]), system.geodesic.mean
        cells[1] = _spread(system.mae, means[1]), system.mae.mean
        cells[2] = _misshapen([task["pose"] for task in tasks])
    if system.has("where"):
        found = [task["where"]["accuracy"]["mean"] for task in tasks]
        cells[3] = _spread(system.grounding, found, " %", 100), -system.grounding.mean
        cells[4] = _misshapen([task["where"] for task in tasks])
    return cells


def _spread(estimate: Estimate, runs: Sequence[float], unit: str = "", scale: float = 1) -> str:
    """The mean, of several runs with their standard deviation, and the interval."""
    mean, low, high = (scale * value for value in (estimate.mean, estimate.low, estimate.high))
    deviation = f" ± {scale * np.std(runs, ddof=1):.1f}" if len(runs) > 1 else ""
    return f"{mean:.1f}{unit}{deviation} [{low:.1f}, {high:.1f}]"


def _misshapen(scores: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """Of one task's scores, a run each: the share of answers in another form than was asked for."""
    wrong = float(np.mean([1 - of["n_valid"] / of["n"] for of in scores]))
    blended = float(np.mean([of["format"]["blended"] for of in scores]))
    return f"{100 * wrong:.1f} %" + (f" ({100 * blended:.1f} blended)" if blended else ""), wrong


def in_short(results: Sequence[Result]) -> dict[str, str]:
    """For each set a sentence: who errs least, and who finds most."""
    said = {}
    for name in by_set(results):
        here = [system for system in systems_of(results) if system.set_name == name]
        posed, grounded = ([system for system in here if system.has(task)] for task in ("pose", "where"))
        parts = []
        if posed:
            best, floor = min(posed, key=lambda s: s.error_deg), float(posed[0].runs[0].constant_deg.mean())
            error = f"{best.error_deg:.1f}° on average over {len(best.geodesic_deg)} heads"
            parts.append(f"{best.name} reads poses best: it errs by {error}; the {CONSTANT} by {floor:.1f}°.")
        if grounded:
            finder = max(grounded, key=lambda s: s.hits.mean())
            parts.append(f"{finder.name} finds most objects: {100 * finder.hits.mean():.1f} %.")
        said[name] = " ".join(parts)
    return said


def compare(a: System, b: System | None) -> Estimate | None:
    """Mean of a's geodesic error minus b's on the same heads, with its interval; `b` None: against the constant pose.

    None where the two were not judged on the same heads and labels.
    """
    groups = [row["key"] for row in a.runs[0].pose_rows]
    if b is None:
        return metrics.paired_difference(a.geodesic_deg, a.runs[0].constant_deg, groups)
    if a.asked("pose") != b.asked("pose"):
        return None
    return metrics.paired_difference(a.geodesic_deg, b.geodesic_deg, groups)


def forgotten(a: System, b: System) -> Estimate | None:
    """Share of objects that a finds minus b's, of the same ones in the same words, with its interval; or None."""
    if not a.has("where") or a.asked("where") != b.asked("where"):
        return None
    return metrics.paired_difference(a.hits, b.hits, [row["key"] for row in a.runs[0].rows_of("where")])


def comparison_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: each system against the constant pose and the others, gain beside forgetting.

    Of more than five systems, each against the first one and against the one that errs least.
    """
    rows = []
    for name in by_set(results):
        posed = [system for system in systems_of(results) if system.set_name == name and system.has("pose")]
        for place, system in enumerate(posed):
            rows.append([name, system.name, CONSTANT, difference(compare(system, None)), "–"])
            for other in _others(posed, place):
                objects = forgotten(system, other)
                both = system.has("where") and other.has("where")
                lost = difference(objects, scale=100.0, unit=" %", better=1) if both else NOTHING
                rows.append([name, system.name, other.name, difference(compare(system, other)), lost])
    return ["set", "system", "against", "pose", "grounding"], rows


def _others(systems: Sequence[System], place: int) -> list[System]:
    if len(systems) <= _ALL_PAIRS:
        return list(systems[:place])
    best = min(systems, key=lambda system: system.error_deg)
    chosen: dict[str, Any] = {system.name: system for system in (systems[0], best)}
    chosen.pop(systems[place].name, None)
    return list(chosen.values())


def difference(estimate: Estimate | None, scale: float = 1.0, unit: str = "", better: int = -1) -> str:
    """`-5.2 [-7.0, -3.1]: better`; `better` is the sign that is."""
    if estimate is None:
        return "other questions"
    mean, low, high = (scale * value for value in (estimate.mean, estimate.low, estimate.high))
    sign = 1 if low > 0 else -1 if high < 0 else 0
    verdict = "no clear difference" if not sign else "better" if sign == better else "worse"
    return f"{mean:+.1f}{unit} [{low:+.1f}, {high:+.1f}]: {verdict}"
