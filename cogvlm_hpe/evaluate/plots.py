"""The report's pictures as PNG bytes, drawn by matplotlib without a display."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from cogvlm_hpe.evaluate import metrics
from cogvlm_hpe.evaluate.results import CONSTANT, Result, by_set
from cogvlm_hpe.evaluate.summary import KINDS, Row, pose_triples
from cogvlm_hpe.evaluate.systems import System
from launcher.errors import UserError

_KIND_COLOURS = {
    "pose": "#2a9d8f",
    "box": "#4c78a8",
    "blended": "#d62828",
    "out_of_range": "#e9a03b",
    "other": "#b0b0b0",
}
_GREY = "#999999"
_MOST_SYSTEMS = 6
_LABEL_CHARACTERS = 28
_TILE_PX, _TILE_CHARACTERS = 200, 34
_EXAMPLES_DEG = (5, 15, 30, 60, 90)
UPPER_LEFT = "Upper left is good: small pose errors, and objects are still found. Crosses are 95 % intervals."
"""How `pose_and_grounding` is read."""
_OBLIQUE = np.array([1.0, 1.0, 1.0]) / np.sqrt(3.0)


def geodesic_bars(systems: Sequence[System]) -> bytes | None:
    """Mean geodesic error of each system and set with its 95 % interval, beside the constant pose."""
    sets: dict[str, list[System]] = {}
    for system in systems:
        if system.has("pose"):
            sets.setdefault(system.set_name, []).append(system)
    if not sets:
        return None
    names = list(dict.fromkeys(system.name for system in systems))
    figure, axes = _row_of_axes(len(sets), height=1.6 + 0.35 * max(map(len, sets.values())))
    for axis, (name, group) in zip(axes, sets.items(), strict=True):
        bars = [(system.name, system.geodesic) for system in group]
        bars.append((CONSTANT, metrics.Estimate(*_floor(group[0]), 0)))
        means = np.array([score.mean for _, score in bars])
        spans = np.abs(np.array([(score.low, score.high) for _, score in bars]).T - means)
        colours = [_colour(names, system.name) for system in group] + [_GREY]
        axis.barh(range(len(bars)), means, xerr=spans, color=colours, capsize=3)
        axis.set_yticks(range(len(bars)), [_short(label) for label, _ in bars])
        axis.axvline(means[-1], color=_GREY, linestyle="--")
        axis.invert_yaxis()
        axis.set_title(name)
        axis.set_xlabel("mean geodesic error (deg), 95 % interval")
    return _png(figure)


def _floor(system: System) -> tuple[float, float, float]:
    score = system.runs[0].tasks["pose"]["constant_pose"]["geodesic"]
    return (score["mean"], *score["ci95"])


def pose_and_grounding(systems: Sequence[System]) -> bytes | None:
    """Objects found over the mean geodesic error, a cross of 95 % intervals for each system; None with fewer than two.

    Only of systems that were asked about both.
    """
    sets: dict[str, list[System]] = {}
    for system in systems:
        if system.has("pose") and system.has("where"):
            sets.setdefault(system.set_name, []).append(system)
    if max(map(len, sets.values()), default=0) < 2:
        return None
    names = list(dict.fromkeys(system.name for system in systems))
    figure, axes = _row_of_axes(len(sets), height=3.6)
    for axis, (name, group) in zip(axes, sets.items(), strict=True):
        for system in group:
            error, found = system.geodesic, system.grounding
            axis.errorbar(
                error.mean, 100 * found.mean, 100 * _span(found), _span(error), fmt="o", capsize=3,
                label=_short(system.name), color=_colour(names, system.name),
            )  # fmt: skip
        axis.set_ylim(-4, 104)
        axis.set_xlim(left=0)
        axis.set_title(name)
        axis.set_xlabel("mean geodesic error (deg)")
        axis.set_ylabel("grounding (%)")
    _legend(figure, axes, inside=False)
    return _png(figure)


def _span(score: metrics.Estimate) -> np.ndarray:
    """(2, 1) how far the interval reaches below and above the mean."""
    return np.array([[score.mean - score.low], [score.high - score.mean]])


def error_by_yaw(results: Sequence[Result]) -> bytes | None:
    """Mean geodesic error over bins of the true |yaw|: frontal heads left, heads seen from behind right."""
    return _error_by_bins(results, "by_yaw", metrics.YAW_EDGES_DEG, "true |yaw| (deg)")


def error_by_size(results: Sequence[Result]) -> bytes | None:
    """Mean geodesic error over bins of the head's height: heads far away left, near ones right."""
    return _error_by_bins(results, "by_size", metrics.SIZE_EDGES, "height of the head, of the image's")


def _error_by_bins(results: Sequence[Result], key: str, edges: Sequence[float], label: str) -> bytes | None:
    sets = _posed(results)
    if not sets:
        return None
    figure, axes = _row_of_axes(len(sets), height=3.4)
    few = max(map(len, sets.values())) <= _MOST_SYSTEMS
    for axis, (name, group) in zip(axes, sets.items(), strict=True):
        for i, result in enumerate(group):
            places, bins = _filled(result, key)
            means = np.array([b["geodesic_mean"] for b in bins])
            spans = np.abs(np.array([b["ci95"] for b in bins]).T - means) if few else None
            aside = 0.02 * i if few else 0.0  # so that the intervals stand apart
            axis.errorbar(places + aside, means, yerr=spans, marker="o", capsize=3, **_line(results, result))
        places, bins = _filled(group[0], key)
        axis.plot(places, [b["constant_pose"] for b in bins], "--", color=_GREY, label=CONSTANT)
        axis.set_title(f"{name} (heads: {', '.join(str(b['n']) for b in bins)})")
        axis.set_xticks(range(len(edges)), [f"{edge:g}" for edge in edges])
        axis.set_xlabel(label)
        axis.set_ylabel("mean geodesic error (deg)")
        axis.set_ylim(bottom=0)
    _legend(figure, axes, few)
    return _png(figure)


def _filled(result: Result, key: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The bins that hold heads, and where they are drawn: all are equally wide."""
    bins = list(enumerate(result.tasks["pose"][key]))
    return np.array([i + 0.5 for i, b in bins if b["n"]]), [b for _, b in bins if b["n"]]


def error_curves(results: Sequence[Result]) -> bytes | None:
    """Share of heads whose geodesic error is below x, for each x."""
    sets = _posed(results)
    if not sets:
        return None
    figure, axes = _row_of_axes(len(sets), height=3.4)
    for axis, (name, group) in zip(axes, sets.items(), strict=True):
        for result in group:
            _curve(axis, result.geodesic_deg, **_line(results, result))
        _curve(axis, group[0].constant_deg, label=CONSTANT, color=_GREY, linestyle="--")
        axis.set_title(name)
        axis.set_xlim(0, 180)
        axis.set_ylim(0, 1)
        axis.set_xlabel("geodesic error (deg)")
        axis.set_ylabel("share of heads below it")
    _legend(figure, axes, max(map(len, sets.values())) <= _MOST_SYSTEMS)
    return _png(figure)


def _curve(axis: Any, errors_deg: np.ndarray, **style: Any) -> None:
    ordered = np.sort(errors_deg)
    axis.step(np.concatenate([[0], ordered]), np.arange(len(ordered) + 1) / len(ordered), where="post", **style)


def _legend(figure: Any, axes: Sequence[Any], inside: bool) -> None:
    """In each part, or where many systems would hide it, once below."""
    if inside:
        for axis in axes:
            axis.legend(fontsize=7)
        return
    named = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=4, fontsize=8)


def error_examples(results: Sequence[Result]) -> bytes | None:
    """One large head with its true axes and axes that are off by 5 to 90 degrees; None where no image can be read."""
    from PIL import Image
    from scipy.spatial.transform import Rotation

    from cogvlm_hpe.draw import head_tile
    from shards.draw import contact_sheet

    for result in (result for group in _posed(results).values() for result in group[:1]):
        row = min(result.pose_rows, key=lambda row: (abs(abs(row["truth"]["yaw"]) - 25) > 20, -row["head_height"]))
        images = read_images(result.run.get("shards"), {row["key"]})
        if images is None:
            continue
        truth = metrics.rotations(pose_triples([row], "truth"))[0]
        turns = [truth @ Rotation.from_rotvec(np.radians(error) * _OBLIQUE).as_matrix() for error in _EXAMPLES_DEG]
        tiles = [head_tile(images[row["key"]], row["box"], truth, turn, 220) for turn in turns]
        file = io.BytesIO()
        titles = [f"{error} degrees" for error in _EXAMPLES_DEG]
        Image.fromarray(contact_sheet(tiles, titles, columns=len(tiles))).save(file, "PNG")
        return file.getvalue()
    return None


def answer_formats(results: Sequence[Result]) -> bytes | None:
    """Stacked shares of answer formats: for each set pose questions beside box questions, a bar for each system."""
    parts = [
        (task, f"{name}: asked for {title}", [result for result in group if task in result.tasks])
        for name, group in by_set(results).items()
        for task, title in (("pose", "a pose"), ("where", "a box"))
    ]
    parts = [part for part in parts if part[2]]
    if not parts:
        return None
    figure, axes = _row_of_axes(len(parts), height=1.2 + 0.25 * max(len(bars) for _, _, bars in parts))
    for axis, (task, title, bars) in zip(axes, parts, strict=True):
        left = np.zeros(len(bars))
        for kind in KINDS:
            shares = np.array([result.tasks[task]["format"].get(kind, 0.0) for result in bars])
            axis.barh(range(len(bars)), shares, left=left, color=_KIND_COLOURS[kind], label=kind)
            left += shares
        axis.set_yticks(range(len(bars)), [_short(result.system) for result in bars])
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_title(title)
        axis.set_xlabel("share of answers")
    handles, kinds = axes[0].get_legend_handles_labels()
    figure.legend(handles, kinds, loc="outside lower center", ncols=len(kinds), fontsize=8)
    return _png(figure)


def head_sheet(group: Sequence[Result], heads: int) -> bytes | None:
    """Heads of one set (rows spread over it) by system (columns): true axes solid, predicted ones dashed.

    None where the set's images cannot be read any more.
    """
    from PIL import Image

    from shards.draw import contact_sheet

    group = [result for result in group if "pose" in result.tasks]
    if not group:
        return None
    if len(group) > _MOST_SYSTEMS:
        best = sorted(group, key=lambda result: result.tasks["pose"]["all"]["geodesic"]["mean"])[:_MOST_SYSTEMS]
        group = [result for result in group if result in best]
    rows = group[0].pose_rows
    picked = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, heads).astype(int))]
    images = read_images(group[0].run.get("shards"), {row["key"] for row in picked})
    if images is None:
        return None
    answers = [{row["id"]: row for row in result.pose_rows} for result in group]
    tiles, titles = [], []
    for row in picked:
        for result, known in zip(group, answers, strict=True):
            tile, title = _tile(images[row["key"]], row, known.get(row["id"]))
            tiles.append(tile)
            titles.append(f"{title}: {_short(result.system)}"[:_TILE_CHARACTERS])
    file = io.BytesIO()
    Image.fromarray(contact_sheet(tiles, titles, columns=len(group))).save(file, "PNG")
    return file.getvalue()


def _tile(image: np.ndarray, row: Row, answer: Row | None) -> tuple[np.ndarray, str]:
    pixels = head_pixels(image, row, answer, _TILE_PX)
    if answer is None or answer["parsed"] is None:
        return pixels, "not asked" if answer is None else "no pose"
    return pixels, f"{answer['errors']['geodesic']:.0f} deg"


def head_pixels(image: np.ndarray, row: Row, answer: Row | None, side_px: int) -> np.ndarray:
    """(side_px, side_px, 3) uint8: the head of `row` with its true axes and, where there is a pose, the answer's."""
    from cogvlm_hpe.draw import head_tile

    truth = metrics.rotations(pose_triples([row], "truth"))[0]
    known = answer is not None and answer["parsed"] is not None
    predicted = metrics.rotations(pose_triples([answer], "parsed"))[0] if answer is not None and known else None
    return head_tile(image, row["box"], truth, predicted, side_px)


def read_images(shards: str | None, keys: set[str]) -> dict[str, np.ndarray] | None:
    """(H, W, 3) uint8 of each key in the set at `shards`; None where not all of them can be read any more."""
    from shards.index import open_set
    from shards.pixels import decode_pixels

    if shards is None:
        return None
    try:
        shard_set = open_set(shards)
        found = {}
        for i in shard_set.key_order():
            if shard_set.key(int(i)) in keys:
                stored = shard_set.read(int(i))
                found[stored.key] = decode_pixels(stored.image, stored.extension)
    except (UserError, OSError, ValueError):
        return None  # the set may have been moved or removed since: the report goes without this picture
    return found if keys <= found.keys() else None


def merge_sweep(results: Sequence[Result]) -> bytes | None:
    """Pose error and grounding of layer-based merges over the similarity threshold; None without two of one set."""
    sets = {
        name: sorted((r for r in group if r.merge.get("threshold") is not None), key=lambda r: r.merge["threshold"])
        for name, group in _posed(results).items()
    }
    sets = {name: group for name, group in sets.items() if len(group) > 1}
    if not sets:
        return None
    figure, axes = _row_of_axes(len(sets), height=3.4)
    for axis, (name, group) in zip(axes, sets.items(), strict=True):
        thresholds = [result.merge["threshold"] for result in group]
        _band(axis, thresholds, [result.tasks["pose"]["all"]["geodesic"] for result in group], "C0", 1.0)
        axis.set_ylabel("mean geodesic error (deg)", color="C0")
        axis.set_xlabel("similarity threshold of the merge")
        axis.set_title(name)
        if all("where" in result.tasks for result in group):
            other = axis.twinx()
            _band(other, thresholds, [result.tasks["where"]["accuracy"] for result in group], "C1", 100.0)
            other.set_ylabel("grounding (%)", color="C1")
    return _png(figure)


def _band(axis: Any, x: list[float], scores: list[dict[str, Any]], colour: str, scale: float) -> None:
    axis.plot(x, [scale * score["mean"] for score in scores], marker="o", color=colour)
    low, high = ([scale * score["ci95"][side] for score in scores] for side in (0, 1))
    axis.fill_between(x, low, high, color=colour, alpha=0.15)


def _posed(results: Sequence[Result]) -> dict[str, list[Result]]:
    return by_set([result for result in results if "pose" in result.tasks])


def _line(results: Sequence[Result], result: Result) -> dict[str, Any]:
    """Name and colour of a system's line, the same in every part."""
    names = list(dict.fromkeys(other.system for other in results))
    return {"label": _short(result.system), "color": _colour(names, result.system)}


def _colour(names: Sequence[str], name: str) -> Any:
    from matplotlib import colormaps

    return f"C{names.index(name)}" if len(names) <= 10 else colormaps["tab20"](names.index(name) % 20)


def _short(label: str) -> str:
    return label if len(label) <= _LABEL_CHARACTERS else label[: _LABEL_CHARACTERS - 1] + "…"


def _row_of_axes(count: int, height: float) -> tuple[Any, list[Any]]:
    """A figure of `count` parts, two in a row, each `height` inches high."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns, lines = min(2, count), -(-count // 2)
    size = (5.4 * columns, max(2.6, height) * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for empty in axes.flat[count:]:
        empty.set_axis_off()
    return figure, list(axes.flat[:count])


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()
