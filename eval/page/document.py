"""A document of headings, paragraphs, tables, charts and pictures, as one HTML page or as Markdown.

    from eval.page.document import Heading, Text, html, markdown
    html("Title", [Heading("One"), Text("Words.")])

The page is self-contained: no script, nothing loaded from elsewhere. All text is escaped here, so blocks hold plain
text. Markdown leaves out the collapsible parts, and links to the charts as files beside it.
"""

import base64
import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from eval.page.text_tables import aligned
from ssl_vit.errors import plural


@dataclass
class Heading:
    """The heading of a section; level 2 has an entry in the page's contents."""

    text: str
    level: int = 2


@dataclass
class Text:
    """A paragraph. kind: "", "lead", or "warning" for one that must not be overlooked."""

    text: str
    kind: str = ""


@dataclass
class Code:
    text: str


@dataclass
class Items:
    """A list of (term, explanation)."""

    items: list[tuple[str, str]]


@dataclass
class Cell:
    """text, with a small note under it; best: marked as the best of its column, or not distinguishable from it."""

    text: str = ""
    note: str = ""
    best: bool = False


@dataclass
class Table:
    """head: names over groups of columns, and the columns' names; parts: (title, rows), each row a name and its cells.

    sources: (run, row id) of every number in it, in a collapsible part under the caption.
    """

    head: list[tuple[str, list[str]]]
    parts: list[tuple[str, list[tuple[Cell, list[Cell]]]]]
    caption: str
    sources: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Figure:
    """A chart, or several of one size side by side: (file name without .svg, SVG text)."""

    charts: list[tuple[str, str]]
    caption: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    small: bool = False


@dataclass
class Gallery:
    """Pictures side by side, with captions."""

    pictures: list[tuple[Path, str]]


@dataclass
class Confusion:
    """A confusion matrix: how often images of each class (row) were predicted as each class (column).

    Shades show the fraction of the row. counts: (K, K); images: the number of images of each class.
    """

    names: list[str]
    counts: np.ndarray
    images: list[int]
    caption: str


@dataclass
class Thumbnails:
    """Small pictures, uint8 (H, W, 3), with captions; for None the caption alone."""

    pictures: list[tuple[np.ndarray | None, str]]
    caption: str


@dataclass
class Folded:
    """Collapsible details."""

    summary: str
    blocks: list["Block"]


def halves(parts: dict[bool, list]) -> list[tuple[str, list]]:
    """A table's parts, of rows by whether they are controls; without one that has none."""
    return [(title, parts[control]) for title, control in (("", False), ("Controls", True)) if parts[control]]


def named(label: str, note: str = "") -> Cell:
    """A row's name; the part in brackets goes into the small line under it."""
    name, _, rest = label.partition(" (")
    return Cell(name, "; ".join(filter(None, (rest.removesuffix(")"), note))))


Block = Heading | Text | Code | Items | Table | Figure | Gallery | Confusion | Thumbnails | Folded

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
WIDE = 7  # columns; a table with more may not fit a desktop screen either


def html(title: str, blocks: Sequence[Block]) -> str:
    """One self-contained page."""
    sections = [b.text for b in blocks if isinstance(b, Heading) and b.level == 2]
    anchors = distinct([re.sub(r"[\W_]+", "-", text.lower()).strip("-") for text in sections])
    links = "".join(f'<a href="#{a}">{escape(text)}</a>' for a, text in zip(anchors, sections, strict=True))
    body = "\n".join(map(_html, blocks))
    for anchor in anchors:
        body = body.replace("<h2>", f'<h2 id="{anchor}">', 1)
    lead, cut, rest = body.partition("<h2")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n<h1>{escape(title)}</h1>\n"
        f"{lead}<nav>{links}</nav>\n{cut}{rest}\n</main></body></html>\n"
    )


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with numbers where one comes again: a, b, a-2."""
    found: list[str] = []
    for name in names:
        others = (f"{name}-{i}" for i in itertools.count(2))
        found.append(name if name not in found else next(other for other in others if other not in found))
    return found


def markdown(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The same without the collapsible parts. folder: where the file will be; pictures beneath it are linked."""
    parts = [_markdown(block, folder) for block in blocks]
    return "\n\n".join([f"# {plain(title)}", *filter(None, parts)]) + "\n"


def plain(text: str) -> str:
    """Text escaped for Markdown, in one line."""
    return re.sub(r"([\\`*<>\[\]|#])", r"\\\1", " ".join(text.split()))


def markdown_table(table: Table) -> str:
    """With aligned columns, so that it reads well in a terminal too."""
    names = [", ".join(filter(None, (over, below))) for over, columns in table.head for below in columns]
    rows = [["", *names]]
    for title, part in table.parts:
        rows += [[f"*{plain(title)}*"] + [""] * len(names)] if title else []
        for name, cells in part:
            rows.append([_cell(name)] + [_cell(cell) for cell in cells])
    return aligned(rows)


def terminal(table: Table) -> str:
    """The same for a terminal of 100 characters: one or more tables for each group of columns."""
    parts, start = [], 0
    for over, columns in table.head:
        while columns:
            count = len(columns)
            while count > 1 and len(_columns(table, columns[:count], start).partition("\n")[0]) > 100:
                count -= 1
            parts += [plain(over)] if over else []
            parts.append(_columns(table, columns[:count], start))
            columns, start = columns[count:], start + count
    return "\n\n".join(parts)


def _columns(table: Table, names: list[str], start: int) -> str:
    """The columns of these names from `start` on as Markdown, without the rows that are empty there."""
    rows = [(title, [(name, cells[start : start + len(names)]) for name, cells in part]) for title, part in table.parts]
    rows = [(title, [row for row in part if any(cell.text for cell in row[1])]) for title, part in rows]
    return markdown_table(Table([("", names)], [(title, part) for title, part in rows if part], ""))


def _cell(cell: Cell) -> str:
    text = f"**{plain(cell.text)}**" if cell.best else plain(cell.text)
    return text + (f" ({plain(cell.note)})" if cell.note else "")


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return "#" * level + " " + plain(text)
        case Text(text, kind):
            return ("> **Note:** " if kind == "warning" else "") + plain(text)
        case Code(text):
            return f"```bash\n{text}\n```"
        case Items(items):
            return "\n".join(f"- **{plain(term)}**: {plain(words)}" for term, words in items)
        case Table():
            return markdown_table(block) + "\n\n" + plain(block.caption)
        case Figure(charts, caption):
            return "\n".join(f"![{name}]({name}.svg)" for name, _ in charts) + "\n\n" + plain(caption)
        case Gallery(pictures):
            beneath = [(path, words) for path, words in pictures if path.resolve().is_relative_to(folder.resolve())]
            lines = [f"- [{plain(words)}](<{p.resolve().relative_to(folder.resolve())}>)" for p, words in beneath]
            return "\n".join(lines) or "The pictures are on the HTML page."
        case Folded(summary, _):
            return f"- {plain(summary)}: on the HTML page"
        case Confusion() | Thumbnails():
            return ""


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text, kind):
            return f'<p class="{kind}">{_unbroken(text)}</p>' if kind else f"<p>{_unbroken(text)}</p>"
        case Code(text):
            return f"<pre>{escape(text)}</pre>"
        case Items(items):
            return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in items) + "</dl>"
        case Table():
            return _html_table(block)
        case Figure(charts, caption, sources, small):
            drawn = "".join(f"<div>{svg}</div>" for _, svg in charts)
            kind = "charts small" if small else "charts"
            words = f"<figcaption>{escape(caption)}{_rows(sources)}</figcaption>"
            return f'<figure><div class="{kind}">{drawn}</div>{words}</figure>'
        case Gallery(pictures):
            return (
                f'<div class="gallery" tabindex="0">{"".join(_picture(path, words) for path, words in pictures)}</div>'
            )
        case Confusion():
            return _html_confusion(block)
        case Thumbnails(pictures, caption):
            drawn = "".join(_thumbnail(*picture) for picture in pictures)
            return f'<div class="thumbs">{drawn}</div><div class="caption">{escape(caption)}</div>'
        case Folded(summary, blocks):
            inner = "".join(map(_html, blocks))
            return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def _html_table(table: Table) -> str:
    over = "".join(
        f'<th colspan="{len(columns)}" scope="colgroup"{" class=over" if name else ""}>{escape(name)}</th>'
        for name, columns in table.head
    )
    over = f"<tr><th></th>{over}</tr>" if any(name for name, _ in table.head) else ""
    below = "".join(f'<th scope="col">{escape(c)}</th>' for _, columns in table.head for c in columns)
    width = sum(len(columns) for _, columns in table.head)
    bodies = []
    for title, rows in table.parts:
        lines = []
        if title:
            lines.append(f'<tr class="part"><th scope="rowgroup">{escape(title)}</th><td colspan="{width}"></td></tr>')
        for name, cells in rows:
            drawn = "".join(f"<td{' class=best' if c.best else ''}>{_words(c)}</td>" for c in cells)
            lines.append(f'<tr><th scope="row">{_words(name)}</th>{drawn}</tr>')
        bodies.append("<tbody>" + "\n".join(lines) + "</tbody>")
    kind = "scroll wide" if width > WIDE else "scroll"
    return (
        f'<div class="{kind}" tabindex="0"><table><thead>{over}<tr><th></th>{below}</tr></thead>'
        f"{''.join(bodies)}</table></div>{_caption(table.caption, _rows(table.sources))}"
    )


def _unbroken(text: str) -> str:
    """Text with no line break between a number and its interval or unit."""
    return re.sub(r" (?=[±%=])|(?<=[±=]) ", "&nbsp;", escape(text))


def _words(cell: Cell) -> str:
    return escape(cell.text) + (f"<small>{escape(cell.note)}</small>" if cell.note else "")


def _rows(sources: list[tuple[str, str]]) -> str:
    """The ids of the rows behind a table or chart, by run, in a collapsible part."""
    if not sources:
        return ""
    of_run: dict[str, list[str]] = {}
    for run, row in dict.fromkeys(sources):
        of_run.setdefault(run, []).append(row)
    lines = "".join(f"<li>{escape(run)}: <code>{escape(' '.join(ids))}</code></li>" for run, ids in of_run.items())
    count = sum(map(len, of_run.values()))
    return f"<details><summary>The {plural(count, 'row')} behind it, by run</summary><ul>{lines}</ul></details>"


def _html_confusion(block: Confusion) -> str:
    """The shade of a cell shows its fraction of the row, in tenths; cells with a count of 0 are empty."""
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in block.names)
    lines = []
    for row, (name, counts) in enumerate(zip(block.names, block.counts, strict=True)):
        cells = []
        for column, count in enumerate(counts):
            fraction = count / max(1, counts.sum())
            kinds = [f"s{math.ceil(10 * fraction)}"] if count else []
            kinds += ["right"] if row == column else []
            text = f"{100 * fraction:.0f}" if count else ""
            cells.append(f'<td class="{" ".join(kinds)}">{text}</td>' if kinds else "<td></td>")
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}<td>{block.images[row]:,}</td></tr>')
    return (
        f'<div class="scroll" tabindex="0"><table class="confusion"><thead><tr><th></th>{head}<th scope="col">images'
        f"</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>{_caption(block.caption)}"
    )


def _caption(text: str, more: str = "") -> str:
    """Under a table, with the hint that it scrolls, shown where the screen is narrow."""
    hint = '<span class="hint">If the table is cut off, scroll it sideways. </span>'
    return f'<div class="caption">{hint}{escape(text)}{more}</div>'


def _thumbnail(pixels: np.ndarray | None, words: str) -> str:
    image = "" if pixels is None else _webp(Image.fromarray(np.ascontiguousarray(pixels)), words)
    return f"<figure>{image}<figcaption>{escape(words)}</figcaption></figure>"


def _picture(path: Path, words: str) -> str:
    with Image.open(path) as image:
        drawn = _webp(image.convert("RGB"), words)
    return f"<figure><figcaption>{escape(words)}</figcaption>{drawn}</figure>"


def _webp(image: Image.Image, words: str) -> str:
    small = io.BytesIO()
    image.save(small, "WEBP", quality=75)  # a fifth of a PNG's bytes
    data = base64.b64encode(small.getvalue()).decode()
    return f'<img src="data:image/webp;base64,{data}" alt="{escape(words)}">'
