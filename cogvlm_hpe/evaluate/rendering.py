"""Sections of a report as Markdown with pictures beside it, and as one HTML file that needs nothing else."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_hpe.evaluate import gallery
from cogvlm_hpe.evaluate.systems import COLUMNS, NOTHING, Overview

PICTURES = "report"
_TITLE = "Head pose report"
_LONG = 15
_DETAIL = re.compile(r"( \[.*?\]| ± .*| \(.*\))$")


@dataclass(frozen=True)
class Section:
    """A heading with text, then a table, a list of terms or a picture."""

    title: str
    text: str = ""
    table: tuple[list[str], list[list[str]]] | None = None
    overview: Overview | None = None
    terms: dict[str, str] | None = None
    picture: tuple[str, bytes] | None = None
    gallery: list[dict[str, Any]] | None = None  # in the page only


def markdown(parts: Sequence[Section], title: str = _TITLE, pictures: str = PICTURES) -> str:
    """The text; pictures are files in the folder `pictures` beside it."""
    blocks = [f"# {title}"]
    for part in parts:
        if part.gallery:
            continue
        blocks.append(f"## {part.title}")
        if part.text:
            blocks.append(part.text)
        if part.terms:
            blocks.append(_markdown_terms(part.terms))
        if part.overview:
            blocks += _markdown_overview(part.overview)
        if part.table:
            blocks.append(markdown_table(*part.table))
        if part.picture:
            blocks.append(f"![{part.title}]({pictures}/{part.picture[0]}.png)")
    return "\n\n".join(blocks) + "\n"


def _markdown_overview(overview: Overview) -> list[str]:
    """A table for each set, which is as wide as a page; then what the systems are."""
    blocks = []
    for name in overview.sets:
        columns = overview.columns_of(name)
        marked = [
            [f"**{cell}**" if (i, j) in overview.best else cell for j, cell in enumerate(row)]
            for i, row in enumerate(overview.rows)
        ]
        rows = [[row[0], *row[columns]] for row in marked if set(row[columns]) != {NOTHING}]
        blocks += [f"### {name}", markdown_table(["system", *COLUMNS], rows)]
    about = zip(overview.rows, overview.about, strict=True)
    return [*blocks, _markdown_terms({row[0]: text for row, text in about if text})]


def _markdown_terms(terms: dict[str, str]) -> str:
    return "\n".join(f"- **{term}**: {meaning}" for term, meaning in terms.items())


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells may hold anything."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def page(parts: Sequence[Section]) -> str:
    """report.html, with its pictures inside."""
    links = (f'<a href="#section-{i}">{html.escape(part.title)}</a>' for i, part in enumerate(parts))
    blocks = [f"<h1>{_TITLE}</h1>", f"<nav>{' '.join(links)}</nav>"]
    for i, part in enumerate(parts):
        blocks.append(f'<h2 id="section-{i}">{html.escape(part.title)}</h2>')
        blocks += _html_section(part)
    here = Path(__file__)
    blocks.append(f"<script>{here.with_name('page.js').read_text(encoding='utf-8')}</script>")
    body, style = "\n".join(blocks), here.with_name("page.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_TITLE}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body>\n{body}\n</body></html>\n"
    )


def _html_section(part: Section) -> list[str]:
    blocks = []
    if part.text:
        blocks.append(f"<p>{html.escape(part.text)}</p>")
    if part.terms:
        terms = (f"<dt>{html.escape(t)}</dt><dd>{html.escape(m)}</dd>" for t, m in part.terms.items())
        blocks.append(f"<dl>{''.join(terms)}</dl>")
    if part.overview:
        blocks.append(_html_overview(part.overview))
    if part.table:
        heads, rows = part.table
        blocks.append(_html_table([_html_row(heads, "th")], [_html_row(row) for row in rows]))
    if part.picture:
        data = base64.b64encode(part.picture[1]).decode()
        image = f'<img alt="{html.escape(part.title)}" src="data:image/png;base64,{data}">'
        blocks.append(f'<div class="wide">{image}</div>')
    if part.gallery:
        data = gallery.as_script(part.gallery)
        blocks.append(f'<div id="gallery"></div><script type="application/json" id="gallery-data">{data}</script>')
    return blocks


def _html_overview(overview: Overview) -> str:
    sets = (f'<th colspan="{len(COLUMNS)}">{html.escape(name)}</th>' for name in overview.sets)
    heads = [f"<tr><th></th>{''.join(sets)}</tr>", _html_row(["system", *COLUMNS * len(overview.sets)], "th")]
    lines = []
    for i, (row, about) in enumerate(zip(overview.rows, overview.about, strict=True)):
        name = html.escape(row[0]) + (f"<p>{html.escape(about)}</p>" if about else "")
        cells = (
            f'<td class="best">{_html_cell(cell)}</td>' if (i, j) in overview.best else f"<td>{_html_cell(cell)}</td>"
            for j, cell in enumerate(row[1:], 1)
        )  # fmt: skip
        lines.append(f"<tr><td>{name}</td>{''.join(cells)}</tr>")
    return _html_table(heads, lines, "overview")


def _html_table(heads: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """A long one is folded up, unless it is of a `kind` of its own."""
    table = f"<table><thead>{''.join(heads)}</thead><tbody>{''.join(rows)}</tbody></table>"
    wide = f'<div class="{" ".join(["wide", kind]).strip()}">{table}</div>'
    if kind or len(rows) <= _LONG:
        return wide
    return f"<details><summary>{len(rows)} rows</summary>{wide}</details>"


def _html_row(cells: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{_html_cell(cell)}</{tag}>" for cell in cells) + "</tr>"


def _html_cell(cell: str) -> str:
    """The number large, what is said about it small."""
    if not cell[:1].isdigit():
        return html.escape(cell)
    found = _DETAIL.search(cell)
    start = found.start() if found else len(cell)
    detail = f"<small>{html.escape(cell[start:])}</small>" if found else ""
    return html.escape(cell[:start]) + detail


def write(parts: Sequence[Section], out: Path) -> None:
    """report.md, report.html and report/*.png in `out`, which may exist; older ones are replaced."""
    write_pictures(parts, out / PICTURES)
    replace_file(out / "report.md", markdown(parts))
    replace_file(out / "report.html", page(parts))


def write_pictures(parts: Sequence[Section], folder: Path) -> None:
    """The parts' pictures as files that `markdown` points at."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if part.picture:
            (folder / f"{part.picture[0]}.png").write_bytes(part.picture[1])


def replace_file(path: Path, text: str) -> None:
    """Write a file that is seen whole or as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
