"""A document of headings, paragraphs, tables, charts and pictures, as one HTML page or as Markdown.

    from eval.pages import Heading, Text, html, markdown
    html("Title", [Heading("One"), Text("Words.")])

The page stands alone: no script, nothing loaded from elsewhere. All text is escaped here, so blocks hold it as it is.
Markdown leaves out what the page folds away, and shows the charts from files beside it.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image

from eval.tables import aligned


@dataclass
class Heading:
    """Of a section; level 2 has an entry in the page's contents."""

    text: str
    level: int = 2


@dataclass
class Text:
    """A paragraph. kind: "", "lead", or "warning" for one that must be seen."""

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
    """text, with a small note under it; best: marked as the best of its column, or one of those not told from it."""

    text: str = ""
    note: str = ""
    best: bool = False


@dataclass
class Table:
    """head: names over columns, and the columns' own; parts: (title, rows), each row a name and its cells.

    sources: (run, row id) of every figure in it, folded away under the caption.
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
    """Pictures side by side, with what they show."""

    pictures: list[tuple[Path, str]]


@dataclass
class Folded:
    """What only he reads who wants to know it exactly."""

    summary: str
    blocks: list["Block"]


Block = Heading | Text | Code | Items | Table | Figure | Gallery | Folded

STYLE = """
:root{color-scheme:light dark;--ink:#1d1f23;--soft:#62666d;--rule:#e3e3e0;--ground:#ffffff;--tint:#f6f5f2;
--mark:#0b6fb3;--best:#e4f0f9;--warn:#fff3d6;--edge:#d99a00}
@media (prefers-color-scheme:dark){:root{--ink:#ecebe8;--soft:#a2a6ad;--rule:#33373d;--ground:#16181c;--tint:#1e2126;
--mark:#5cb3f0;--best:#173450;--warn:#3a2e10;--edge:#e8b53c}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:17px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:56px 24px 96px}
h1{font-size:clamp(28px,5vw,44px);line-height:1.12;letter-spacing:-.02em;margin:0 0 16px;
border-top:6px solid var(--mark);padding-top:20px}
h2{font-size:26px;line-height:1.2;letter-spacing:-.01em;margin:72px 0 12px;padding-top:16px;
border-top:1px solid var(--ink)}
h3{font-size:18px;margin:36px 0 8px}
p{max-width:44em;margin:0 0 14px;overflow-wrap:anywhere}
p.lead{font-size:20px;line-height:1.5}
p.warning{background:var(--warn);border-left:4px solid var(--edge);padding:12px 16px;max-width:none}
nav{margin:24px 0 0;font-size:15px;display:flex;flex-wrap:wrap;gap:4px 20px}
a{color:var(--mark);text-underline-offset:3px}
figure{margin:20px 0 36px}
figcaption,.caption{font-size:14px;line-height:1.5;color:var(--soft);max-width:62em;margin-top:10px}
.scroll{overflow-x:auto;border-top:2px solid var(--ink);border-bottom:1px solid var(--ink)}
table{border-collapse:separate;border-spacing:0;min-width:100%;font-size:15px;line-height:1.35}
th,td{padding:9px 14px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule);vertical-align:top}
thead th{font-weight:600;font-size:13px;color:var(--soft);vertical-align:bottom}
thead tr:first-child th[colspan]{text-align:center;color:var(--ink)}
thead th.over::after{content:"";display:block;border-bottom:1px solid var(--soft);margin-top:6px}
th:first-child{position:sticky;left:0;background:var(--ground);text-align:left;font-weight:600;z-index:1;min-width:8em;
max-width:16em;white-space:normal}
tr.part th{font-size:12px;text-transform:uppercase;letter-spacing:.08em;color:var(--soft);padding-top:18px}
tbody:last-child tr:last-child>*{border-bottom:0}
td.best{background:var(--best);font-weight:700}
small{display:block;font-size:12px;font-weight:400;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:28px 40px}
.charts.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,280px),1fr))}
.charts svg{display:block;margin-left:-8px;width:calc(100% + 16px);height:auto;max-width:560px}
.gallery{display:flex;gap:24px;align-items:flex-start;overflow-x:auto;margin:16px 0}
.gallery figure{flex:none;margin:0}
.gallery img{display:block;border:1px solid var(--rule)}
details{margin:10px 0;font-size:15px}
figcaption details,.caption details{font-size:13px;margin:4px 0}
summary{cursor:pointer;color:var(--mark)}
code,pre{font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--tint);padding:14px 16px;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere}
details ul{padding-left:18px;overflow-wrap:anywhere}
dl{max-width:52em}dt{font-weight:600;margin-top:12px}dd{margin:2px 0 0;overflow-wrap:anywhere}
@media (max-width:640px){main{padding:28px 16px 64px}body{font-size:16px}p.lead{font-size:18px}th,td{padding:8px 10px}
h2{margin-top:52px}}
@media print{main{max-width:none;padding:0}nav{display:none}.scroll{overflow:visible}table{font-size:10px}
th:first-child{position:static}th,td{padding:4px 6px}figure,tr{break-inside:avoid}h2,h3{break-after:avoid}
.charts{grid-template-columns:1fr 1fr}}
"""


def html(title: str, blocks: Sequence[Block]) -> str:
    """One self-contained page."""
    sections = [b.text for b in blocks if isinstance(b, Heading) and b.level == 2]
    links = "".join(f'<a href="#{_anchor(text)}">{escape(text)}</a>' for text in sections)
    body = "\n".join(map(_html, blocks))
    lead, cut, rest = body.partition("<h2")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n<h1>{escape(title)}</h1>\n"
        f"{lead}<nav>{links}</nav>\n{cut}{rest}\n</main></body></html>\n"
    )


def markdown(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The same without what is folded away. folder: where it will lie; pictures beneath it are linked."""
    parts = [_markdown(block, folder) for block in blocks]
    return "\n\n".join([f"# {plain(title)}", *filter(None, parts)]) + "\n"


def plain(text: str) -> str:
    """Text as Markdown that shows it literally, in one line."""
    return re.sub(r"([\\`*<>\[\]|#])", r"\\\1", " ".join(text.split()))


def markdown_table(table: Table) -> str:
    """With a column as wide as its widest cell, to be read in a terminal too."""
    names = [", ".join(filter(None, (over, below))) for over, columns in table.head for below in columns]
    rows = [["", *names]]
    for title, part in table.parts:
        rows += [[f"*{plain(title)}*"] + [""] * len(names)] if title else []
        for name, cells in part:
            rows.append([_cell(name)] + [_cell(cell) for cell in cells])
    return aligned(rows)


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
            return "\n".join(lines) or "They are shown on the HTML page."
        case Folded():
            return ""


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f'<h{level} id="{_anchor(text)}">{escape(text)}</h{level}>'
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
                '<div class="gallery" tabindex="0">'
                + "".join(_picture(path, words) for path, words in pictures)
                + "</div>"
            )
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
        lines = [f'<tr class="part"><th scope="rowgroup">{escape(title)}</th><td colspan="{width}"></td></tr>'] * bool(
            title
        )
        for name, cells in rows:
            drawn = "".join(f"<td{' class=best' if c.best else ''}>{_words(c)}</td>" for c in cells)
            lines.append(f'<tr><th scope="row">{_words(name)}</th>{drawn}</tr>')
        bodies.append("<tbody>" + "\n".join(lines) + "</tbody>")
    return (
        f'<div class="scroll" tabindex="0"><table><thead>{over}<tr><th></th>{below}</tr></thead>'
        f'{"".join(bodies)}</table></div><div class="caption">{escape(table.caption)}{_rows(table.sources)}</div>'
    )


def _unbroken(text: str) -> str:
    """Text in which no figure is torn from its interval or its unit."""
    return re.sub(r" (?=[±%=])|(?<=[±=]) ", "&nbsp;", escape(text))


def _words(cell: Cell) -> str:
    return escape(cell.text) + (f"<small>{escape(cell.note)}</small>" if cell.note else "")


def _rows(sources: list[tuple[str, str]]) -> str:
    """The ids of the rows behind a figure, by run, folded away."""
    if not sources:
        return ""
    of_run: dict[str, list[str]] = {}
    for run, row in dict.fromkeys(sources):
        of_run.setdefault(run, []).append(row)
    lines = "".join(f"<li>{escape(run)}: <code>{escape(' '.join(ids))}</code></li>" for run, ids in of_run.items())
    count = sum(map(len, of_run.values()))
    return f"<details><summary>The {count} rows behind it, by run</summary><ul>{lines}</ul></details>"


def _picture(path: Path, words: str) -> str:
    small = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(small, "WEBP", quality=75)  # a fifth of a PNG's bytes
    data = base64.b64encode(small.getvalue()).decode()
    image = f'<img src="data:image/webp;base64,{data}" alt="{escape(words)}" loading="lazy">'
    return f"<figure><figcaption>{escape(words)}</figcaption>{image}</figure>"


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
