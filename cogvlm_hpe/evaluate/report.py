"""Results as a page: one list of sections, written as Markdown with pictures beside it and as one HTML file."""

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_hpe.evaluate import gallery, plots, repeats
from cogvlm_hpe.evaluate.results import (
    CONSTANT,
    Result,
    by_set,
    comparison_table,
    front_back_table,
    invalid_table,
    protocol_table,
    score_table,
    words_table,
)

PICTURES = "report"
HEADS = 6

COLUMNS = {
    "set": "the images judged on; a set of a kind that training never saw shows how well a skill carries over",
    "system": "the model judged; the constant pose answers every head with the one pose that suits this set best",
    "heads": "heads asked about: every labelled head that is at least half visible",
    "geodesic": "mean angle, in degrees, of the turn that takes the predicted head to the true one; 0 is perfect, "
    "180 the worst; in brackets the 95 % interval from resampling images",
    "median": "half of the heads have a smaller geodesic error than this, in degrees",
    "MAE yaw/pitch/roll": "mean absolute error in degrees over the three angles, then of each; near yaw ±90 pitch and "
    "roll are ill-defined, so that they look worse than the picture is",
    "grounding": "share of objects found: the answered box overlaps the true one by half or more (IoU ≥ 0.5); it "
    "shows what the model has forgotten while it learned poses",
    "wrong format": "share of pose questions answered by anything but a well-formed pose, and of box questions by "
    "anything but a box; none is left out: in the errors they count as the constant pose, and as objects not found",
    "blended": "share of answers that mix the formats of poses and boxes, for pose and for box questions",
}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-size:14px}td,th{border:1px solid #ccc;padding:4px 8px;"
    "text-align:left}th{background:#f3f3f3}img{max-width:100%}dt{font-weight:600}dd{margin:0 0 .4rem 1rem}"
    "th{cursor:pointer}th[data-order=up]::after{content:' ▲'}th[data-order=down]::after{content:' ▼'}"
    "label{margin-right:1rem}.heads{display:flex;flex-wrap:wrap;gap:10px;margin:1rem 0}figure{margin:0;width:150px;"
    "font-size:12px}figure img{width:128px;height:128px;display:block}code{word-break:break-all}"
)


@dataclass(frozen=True)
class Section:
    """A heading with text, then a table, a list of terms or a picture."""

    title: str
    text: str = ""
    table: tuple[list[str], list[list[str]]] | None = None
    terms: dict[str, str] | None = None
    picture: tuple[str, bytes] | None = None
    gallery: list[dict[str, Any]] | None = None  # in the page only


def sections(results: Sequence[Result]) -> list[Section]:
    """What the report says, in reading order."""
    parts = [
        Section(
            "Scores",
            "Each system read whole images and was asked, in words, for the pose of one head at a time and for the "
            f"place of objects. The {CONSTANT} is a floor without any skill: it is fitted to the judged heads "
            "themselves, so beating it clearly means that something was learned.",
            table=score_table(results),
        ),
        Section("What the columns mean", terms=COLUMNS),
    ]
    headings, rows = comparison_table(results)
    if rows:
        parts.append(
            Section(
                "Gain and forgetting, head by head",
                "Every pair of systems: difference of the geodesic error in degrees on the same heads (negative is "
                "better), and of the share of objects found (positive is better), with 95 % intervals from resampling "
                "images. Comparing question by question is sharper than comparing two means with intervals of their "
                "own; but of twenty pairs that do not differ, one looks as if it did.",
                table=(headings, rows),
            )
        )
    for title, text, make in _TABLES:
        headings, rows = make(results)
        if rows:
            parts.append(Section(title, text, table=(headings, rows)))
    parts += _pictures(results)
    shown = gallery.heads(results)
    if shown:
        parts.append(Section("Gallery", _GALLERY, gallery=shown))
    return [*parts, _provenance(results)]


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
    ("Answers of another kind", "What was answered where a pose or a box was asked for.", invalid_table),
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
    "spread over the set. True axes solid, predicted axes dashed. The address of this page keeps what is chosen."
)


def _pictures(results: Sequence[Result]) -> list[Section]:
    drawn: list[tuple[str, str, str, Callable[[Sequence[Result]], bytes | None]]] = [
        ("Mean error", "geodesic", "Short bars are good; the dashed line is the constant pose.", plots.geodesic_bars),
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
    ]
    parts = []
    for title, name, text, draw in drawn:
        png = draw(results)
        if png:
            parts.append(Section(title, text, picture=(name, png)))
    for number, (name, group) in enumerate(by_set(results).items()):
        png = plots.head_sheet(group, HEADS)
        if png:
            text = (
                "True axes solid, predicted axes dashed with a white rim: red to the side, green down, blue out of the "
                "face. Heads are spread evenly over the set, not chosen."
            )
            parts.append(Section(f"Heads of {name}", text, picture=(f"heads-{number}", png)))
    return parts


def _provenance(results: Sequence[Result]) -> Section:
    rows = []
    for result in results:
        run, decoding = result.run, result.metrics.get("decoding", {})
        cells = (run.get("start_time"), result.metrics["set"].get("images"), decoding.get("dtype"), run.get("ranks"))
        rows.append([result.set_name, result.name, *(str(cell or "–") for cell in cells), str(result.folder)])
    return Section(
        "Where it comes from", table=(["set", "system", "started", "images", "dtype", "ranks", "folder"], rows)
    )


def markdown(parts: Sequence[Section]) -> str:
    """report.md; pictures are files in the folder `report/` beside it."""
    blocks = ["# Head pose report"]
    for part in parts:
        if part.gallery:
            continue
        blocks.append(f"## {part.title}")
        if part.text:
            blocks.append(part.text)
        if part.terms:
            blocks.append("\n".join(f"- **{term}**: {meaning}" for term, meaning in part.terms.items()))
        if part.table:
            blocks.append(markdown_table(*part.table))
        if part.picture:
            blocks.append(f"![{part.title}]({PICTURES}/{part.picture[0]}.png)")
    return "\n\n".join(blocks) + "\n"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells may hold anything."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def page(parts: Sequence[Section]) -> str:
    """report.html, with its pictures inside."""
    blocks = ["<h1>Head pose report</h1>"]
    for part in parts:
        blocks.append(f"<h2>{html.escape(part.title)}</h2>")
        if part.text:
            blocks.append(f"<p>{html.escape(part.text)}</p>")
        if part.terms:
            terms = (f"<dt>{html.escape(t)}</dt><dd>{html.escape(m)}</dd>" for t, m in part.terms.items())
            blocks.append(f"<dl>{''.join(terms)}</dl>")
        if part.table:
            heads, rows = part.table
            lines = ["".join(f"<th>{html.escape(h)}</th>" for h in heads)]
            lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
            blocks.append("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")
        if part.picture:
            data = base64.b64encode(part.picture[1]).decode()
            blocks.append(f'<img alt="{html.escape(part.title)}" src="data:image/png;base64,{data}">')
        if part.gallery:
            data = gallery.as_script(part.gallery)
            blocks.append(f'<div id="gallery"></div><script type="application/json" id="gallery-data">{data}</script>')
    blocks.append(f"<script>{Path(__file__).with_name('page.js').read_text(encoding='utf-8')}</script>")
    body = "\n".join(blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Head pose report</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def write(parts: Sequence[Section], out: Path) -> None:
    """report.md, report.html and report/*.png in `out`, which may exist; older ones are replaced."""
    (out / PICTURES).mkdir(parents=True, exist_ok=True)
    for part in parts:
        if part.picture:
            (out / PICTURES / f"{part.picture[0]}.png").write_bytes(part.picture[1])
    replace_file(out / "report.md", markdown(parts))
    replace_file(out / "report.html", page(parts))


def replace_file(path: Path, text: str) -> None:
    """Write a file that is seen whole or as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
