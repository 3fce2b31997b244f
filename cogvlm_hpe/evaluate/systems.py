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

COLUMNS = ("geodesic", "MAE", "grounding", "wrong format")
"""Of the overview, for each set."""
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

    def ids(self, task: str) -> list[str]:
        """Which heads or objects it was asked about."""
        return [row["id"] for row in self.runs[0].rows_of(task)]

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
        asked = {repr([(row["id"], row["task"]) for row in run.rows]) for run in runs} if len(runs) > 1 else set()
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

    @property
    def headings(self) -> list[str]:
        """Of a table with one row of headings."""
        pairs = [f"{name}: {column}" for name in self.sets for column in COLUMNS]
        return ["system", *(pairs if len(self.sets) > 1 else COLUMNS)]


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
        return ["–"] * len(COLUMNS)
    scores = system.runs[0].tasks["pose"]["constant_pose"]
    errors = [_spread([scores[name]["mean"]], scores[name]["ci95"]) for name in ("geodesic", "mae")]
    return [*errors, "–", "–"]


def _cells(system: System | None) -> list[tuple[str, float]]:
    """Text and value (the smaller the better) of each column; NaN where there is none."""
    nothing = ("–", float("nan"))
    if system is None:
        return [nothing] * len(COLUMNS)
    cells = [nothing, nothing, nothing, nothing]
    tasks = [run.tasks for run in system.runs]
    if system.has("pose"):
        geodesic = [task["pose"]["all"]["geodesic"]["mean"] for task in tasks]
        mae = [task["pose"]["all"]["mae"]["mean"] for task in tasks]
        wrong = [1 - task["pose"]["n_valid"] / task["pose"]["n"] for task in tasks]
        blended = float(np.mean([task["pose"]["format"]["blended"] for task in tasks]))
        mixed = f" ({100 * blended:.1f} blended)" if blended else ""
        cells[0] = _spread(geodesic, tasks[0]["pose"]["all"]["geodesic"]["ci95"]), float(np.mean(geodesic))
        cells[1] = _spread(mae, tasks[0]["pose"]["all"]["mae"]["ci95"]), float(np.mean(mae))
        cells[3] = f"{100 * np.mean(wrong):.1f} %{mixed}", float(np.mean(wrong))
    if system.has("where"):
        found = [100 * task["where"]["accuracy"]["mean"] for task in tasks]
        interval = [100 * share for share in tasks[0]["where"]["accuracy"]["ci95"]]
        cells[2] = _spread(found, interval, " %"), -float(np.mean(found))
    return cells


def _spread(values: Sequence[float], interval: Sequence[float] | None = None, unit: str = "") -> str:
    """The mean with the standard deviation over runs, or of a single run with its interval."""
    text = f"{np.mean(values):.1f}{unit}"
    if len(values) > 1:
        return f"{text} ± {np.std(values, ddof=1):.1f} ({len(values)})"
    return text if interval is None else f"{text} [{interval[0]:.1f}, {interval[1]:.1f}]"


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

    None where the two were not judged on the same heads.
    """
    groups = [row["key"] for row in a.runs[0].pose_rows]
    if b is None:
        return metrics.paired_difference(a.geodesic_deg, a.runs[0].constant_deg, groups)
    if a.ids("pose") != b.ids("pose"):
        return None
    return metrics.paired_difference(a.geodesic_deg, b.geodesic_deg, groups)


def forgotten(a: System, b: System) -> Estimate | None:
    """Share of objects that a finds minus b's, on the same ones, with its interval; None where they differ."""
    if not a.ids("where") or a.ids("where") != b.ids("where"):
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
                lost = difference(objects, scale=100.0, unit=" %", better=1) if objects else "–"
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
        return "other heads"
    mean, low, high = (scale * value for value in (estimate.mean, estimate.low, estimate.high))
    sign = 1 if low > 0 else -1 if high < 0 else 0
    verdict = "no clear difference" if not sign else "better" if sign == better else "worse"
    return f"{mean:+.1f}{unit} [{low:+.1f}, {high:+.1f}]: {verdict}"
