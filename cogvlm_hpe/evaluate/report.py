"""What a report says about results: one list of sections in reading order, which `rendering` writes."""

from collections.abc import Callable, Mapping, Sequence

from cogvlm_hpe.evaluate import gallery, plots, repeats
from cogvlm_hpe.evaluate.rendering import Section
from cogvlm_hpe.evaluate.results import (
    CONSTANT,
    Result,
    by_set,
    front_back_table,
    invalid_table,
    protocol_table,
    score_table,
    words_table,
)
from cogvlm_hpe.evaluate.systems import System, comparison_table, first_runs, in_order, in_short, overview, systems_of

HEADS = 6

COLUMNS = {
    "set": "the images judged on; a set of a kind that training never saw shows how well a skill carries over",
    "system": "the model judged; the constant pose answers every head with the one pose that suits this set best",
    "heads": "heads asked about: every labelled head that is at least half visible",
    "geodesic": "the number that matters most: mean angle, in degrees, of the turn that takes the predicted head to "
    "the true one; 0 is perfect, 180 the worst. ± is the standard deviation over seeds, of a system that was trained "
    "several times; in brackets the 95 % interval from resampling images (too narrow where a few people or recordings "
    "are in all of them)",
    "median": "half of the heads have a smaller geodesic error than this, in degrees",
    "p90": "nine of ten heads have a smaller one",
    "MAE": "mean absolute error in degrees over yaw, pitch and roll: what papers print; near yaw ±90 pitch and roll "
    "are ill-defined, so that it looks worse than the picture is",
    "MAE yaw/pitch/roll": "the same, then of each angle",
    "grounding": "share of objects found: the answered box overlaps the true one by half or more (IoU ≥ 0.5); it "
    "shows what the model has forgotten while it learned poses",
    "mean IoU": "how far answered and true boxes overlap, on average: 1 is the same box, no box counts as 0",
    "not a pose": "share of pose questions answered by anything but a well-formed pose, and how many of those mix the "
    "formats of poses and boxes; none is left out: in the errors they count as the constant pose",
    "not a box": "the same of box questions, of those about objects; they count as objects not found",
    "wrong format": "not a pose and not a box, run by run",
    "blended": "share of answers that mix the formats of poses and boxes, for pose and for box questions",
}


def sections(results: Sequence[Result], about: Mapping[str, str] | None = None) -> list[Section]:
    """What the report says, in reading order. `about`: a sentence on each of some systems; those come first."""
    results = in_order(results, about or {})
    systems = systems_of(results)
    shown = first_runs(systems)
    parts = [
        Section("In short", terms=in_short(results)),
        Section("Result", _RESULT, overview=overview(results, about)),
        Section("What the columns mean", terms=COLUMNS),
    ]
    parts += _picture("What an error looks like", "errors", _ERRORS, plots.error_examples(shown))
    headings, rows = comparison_table(results)
    if rows:
        parts.append(Section("Gain and forgetting, head by head", _PAIRS, table=(headings, rows)))
    parts += _pictures(shown, systems)
    parts.append(Section("Every run", _RUNS, table=score_table(results)))
    for title, text, make in _TABLES:
        headings, rows = make(results if make is repeats.table else shown)
        if rows:
            parts.append(Section(title, text, table=(headings, rows)))
    heads = gallery.heads(shown)
    if heads:
        parts.append(Section("Gallery", _GALLERY, gallery=heads))
    return [*parts, _provenance(results)]


_RESULT = (
    "A row is a system, and beside it stand the sets of images it was judged on. It read whole images (a network on "
    "crops: heads cut out) and was asked for the pose of one head at a time, and for the place of objects. Look at "
    "geodesic first: small is good. Then at grounding: it should be no smaller than before poses were learned. The "
    f"best number of a column is marked. The {CONSTANT} is a floor without any skill, fitted to the judged heads "
    "themselves, so beating it clearly means that something was learned."
)
_ERRORS = (
    "One head with its true axes (solid) and, dashed, axes that are off by so many degrees: red to the side, green "
    "down, blue out of the face."
)
_PAIRS = (
    "Difference of the geodesic error in degrees on the same heads (negative is better), and of the share of objects "
    "found (positive is better), with 95 % intervals from resampling images; of several seeds the mean of each head. "
    "Of up to five systems every pair, of more each against the first and against the best. Comparing question by "
    "question is sharper than comparing two means with intervals of their own; but of twenty pairs that do not "
    "differ, one looks as if it did."
)
_RUNS = (
    "The same numbers run by run, each with the interval from resampling images. The tables below this one, the "
    "curves and the heads are of one run of each system: that of the smallest seed."
)


_TABLES: tuple[tuple[str, str, Callable[[Sequence[Result]], tuple[list[str], list[list[str]]]]], ...] = (
    (
        "As others count",
        "Mean errors in degrees over the heads that published numbers are about: full, narrow (true |yaw| < 90) and "
        "backward (> 90) as DirectMHP, which counts answered heads only; aflw2000: all three true angles within 99; "
        "aligned: after one constant turn of the head's axes, fitted to this system and set. The last column counts "
        "every head, with the constant pose where there is no answer.",
        protocol_table,
    ),
    (
        "Front and back",
        "Heads that face the camera (|yaw| up to 90) or not, by what was answered. Error averages hide this mistake.",
        front_back_table,
    ),
    (
        "Answers of another kind",
        "What was answered where a pose or a box was asked for. blended: marks of both formats in one answer; "
        "out_of_range: well written, but its numbers are no angles or no corners; other: words, or numbers too many or "
        "too few.",
        invalid_table,
    ),
    (
        "Judged again",
        "One model judged more than once on a set. Greedy answers change only where two tokens were almost equally "
        "likely, and rounding, which depends on the size of a batch, decided between them; ranks change nothing.",
        repeats.table,
    ),
    (
        "Answers in words",
        "Share of questions answered exactly: what is at a given box, and which way a head faces in words (one of "
        "eight directions, up or down). They tell whether a model reads a region at all.",
        words_table,
    ),
)
_GALLERY = (
    "The best, the median and the worst heads of each system, some of each kind of answer that is no pose, and some "
    "spread over the set (why it is shown: `why`; the format of its answer: `kind`). True axes solid, predicted axes "
    "dashed. The address of this page keeps what is chosen."
)


def _picture(title: str, name: str, text: str, png: bytes | None) -> list[Section]:
    return [Section(title, text, picture=(name, png))] if png else []


def _pictures(results: Sequence[Result], systems: Sequence[System]) -> list[Section]:
    parts = _picture("Mean error", "geodesic", _BARS, plots.geodesic_bars(systems))
    parts += _picture("Pose and grounding", "both", plots.UPPER_LEFT, plots.pose_and_grounding(systems))
    for title, name, text, draw in _PICTURES:
        parts += _picture(title, name, text, draw(results))
    for number, (name, group) in enumerate(by_set(results).items()):
        parts += _picture(f"Heads of {name}", f"heads-{number}", _HEADS, plots.head_sheet(group, HEADS))
    return parts


_BARS = "Short bars are good; the dashed line is the constant pose."
_HEADS = (
    "True axes solid, predicted axes dashed with a white rim: red to the side, green down, blue out of the face. Heads "
    "are spread evenly over the set, not chosen; of more than six systems, those with the smallest error."
)
_PICTURES: tuple[tuple[str, str, str, Callable[[Sequence[Result]], bytes | None]], ...] = (
    (
        "Error by direction",
        "by-yaw",
        "Left: heads that face the camera; right: heads seen from behind. The numbers are heads per bin.",
        plots.error_by_yaw,
    ),
    ("Error by size", "by-size", "Left: small heads, far away; right: large ones.", plots.error_by_size),
    ("Spread of the error", "curves", "The higher and further left a curve, the better.", plots.error_curves),
    (
        "Threshold of the merge",
        "sweep",
        "Layer-based merges by their similarity threshold, with 95 % bands: pose error on the left axis (low is "
        "good), objects found on the right one (high is good).",
        plots.merge_sweep,
    ),
    (
        "Answer formats",
        "formats",
        "A pose question should be answered by a pose and a box question by a box. Red: both formats mixed in one "
        "answer, which is what a bad merge does.",
        plots.answer_formats,
    ),
)


def _provenance(results: Sequence[Result]) -> Section:
    rows = []
    for result in results:
        run, decoding = result.run, result.metrics.get("decoding", {})
        cells = (run.get("start_time"), result.metrics["set"].get("images"), decoding.get("dtype"), run.get("ranks"))
        rows.append([result.set_name, result.name, *(str(cell or "–") for cell in cells), str(result.folder)])
    return Section(
        "Where it comes from", table=(["set", "system", "started", "images", "dtype", "ranks", "folder"], rows)
    )
