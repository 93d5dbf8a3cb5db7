"""A table as text: the shape that every format is made from, and its Markdown, LaTeX and HTML.

Cells hold text as it came; escaping is done here and nowhere before.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from harness import markup

PROSE_WIDTH = 118  # of lines of prose in Markdown, where there is room
LEAST_WIDTH = 60


class Cell(NamedTuple):  # hundreds of thousands are made: a frozen class takes four times as long to fill
    """One value.

    interval, half_width: the same 95 % interval as "[19.0–20.6]" and as "±0.80"; Markdown has room for the latter.
    sign: a mark explained in `Block.signs`. notes: numbers of `Block.notes`.
    """

    value: str = ""
    interval: str = ""
    half_width: str = ""
    sign: str = ""
    bold: bool = False
    notes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """Cells under the heads; a row with a `group` is a heading and has no cells."""

    cells: tuple[Cell, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Block:
    """Rows that may be compared, with all that is needed to read them."""

    title: str
    protocol: tuple[str, ...]
    heads: tuple[str, ...]
    arrows: tuple[str, ...]  # "↓", "↑" or "" per head
    rows: tuple[Row, ...]
    signs: tuple[str, ...]  # what the signs in the cells mean
    notes: tuple[str, ...]  # numbered from 1
    absent: str = ""  # systems without a record
    naming: int = 2  # leading columns that say which row it is
    seam: int | None = None  # column before which a table that is too wide is best cut: the first of speed

    @cached_property
    def words(self) -> frozenset[int]:
        """Columns of words, set to the left: the first, and those after the naming ones that have no direction."""
        return frozenset(k for k, arrow in enumerate(self.arrows) if k == 0 or (k >= self.naming and not arrow))

    @cached_property
    def has_intervals(self) -> bool:
        """Whether any cell has one."""
        return any(cell.interval for row in self.rows for cell in row.cells)


# ---------------------------------------------------------------------------------------------------- Markdown


def to_markdown(title: str, blocks: Sequence[Block], absent: str = "", width: int = 160) -> str:
    """Markdown that is readable as it stands: cells are padded, prose is wrapped, wide tables are split.

    width: characters that a line of a table may have, if its columns allow.
    """
    return markdown_page(title, [markdown_block(block, width) for block in blocks], absent, width)


def markdown_page(title: str, blocks: Sequence[str], absent: str = "", width: int = 160) -> str:
    """The same from blocks that are Markdown already."""
    parts = [f"## {markup.markdown(title)}" if title else "", *blocks]
    parts.append(_wrapped(f"not run here: {markup.markdown(absent)}", width) if absent else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_block(block: Block, width: int = 160) -> str:
    """One block with its heading, without an end of line."""
    signs = [*block.signs, *(["±: half of the 95 % interval"] if block.has_intervals else [])]
    below = [f"- {markup.markdown('; '.join(signs))}"] if signs else []
    below += [f"- {_superscript((k,))} {markup.markdown(text)}" for k, text in enumerate(block.notes, 1)]
    below += [f"- not run here: {markup.markdown(block.absent)}"] if block.absent else []
    parts = [
        f"### {markup.markdown(block.title)}",
        "\n".join(_wrapped(f"- {markup.markdown(line)}", width) for line in block.protocol),
        *_markdown_tables(block, width),
        "\n".join(_wrapped(line, width) for line in below),
    ]
    return "\n\n".join(part for part in parts if part)


def _wrapped(text: str, width: int) -> str:
    """Prose in lines that fit where a table has `width` characters."""
    fitting = min(PROSE_WIDTH, max(width, LEAST_WIDTH))
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, fitting, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _markdown_tables(block: Block, width: int) -> list[str]:
    """The rows as one table, or where that is wider than `width` as several that repeat what names a row."""
    words = block.words
    head = [markup.markdown(text) for text in block.heads]
    body = [[_markdown_cell(cell) for cell in row.cells] for row in block.rows]
    widths = [max(3, *(len(line[k]) for line in [head, *body] if line)) for k in range(len(head))]

    def padded(line: list[str], columns: list[int]) -> str:
        cells = [f" {line[k].ljust(widths[k])}" if k in words else line[k].rjust(widths[k]) for k in columns]
        return f"|{' |'.join(cells)} |"

    tables = []
    for columns in _columns_by_part(widths, block, width):
        rule = ["-" * (widths[k] + 2) if k in words else "-" * widths[k] + ":" for k in columns]
        lines = [padded(head, columns), f"|{'|'.join(rule)}|"]
        for row, line in zip(block.rows, body, strict=True):
            # a heading is wider than its column: padding every row to it would push the numbers off the screen
            heading = f"| *{markup.markdown(row.group)}* |{' |' * (len(columns) - 1)}"
            lines.append(heading if row.group else padded(line, columns))
        tables.append("\n".join(lines))
    return tables


def _columns_by_part(widths: list[int], block: Block, width: int) -> list[list[int]]:
    """Column numbers of each part: the naming ones in all of them; as few parts as fit `width`.

    Parts end where the block has its seam if that takes no more of them, else they are of even width.
    """

    def filled(limit: int, seam: int | None = None) -> list[list[int]]:
        parts = [list(range(block.naming))]
        for k in range(block.naming, len(widths)):
            full = sum(widths[c] + 2 for c in [*parts[-1], k]) + 4 > limit
            if len(parts[-1]) > block.naming and (full or k == seam):
                parts.append(list(range(block.naming)))
            parts[-1].append(k)
        return parts

    fewest = len(filled(width))
    seamed = filled(width, block.seam)
    if fewest > 1 and block.seam is not None and len(seamed) == fewest:
        return seamed
    return next(parts for limit in range(width + 1) if len(parts := filled(limit)) == fewest)


def _markdown_cell(cell: Cell) -> str:
    value, _, half_width, sign, bold, notes = cell
    text = markup.markdown(value)
    if bold:
        text = f"**{text}**"
    if notes:
        text += _superscript(notes)
    return _spaced(text, half_width, sign) if half_width or sign else text


def _spaced(*parts: str) -> str:
    return " ".join(filter(None, parts))


@lru_cache
def _superscript(numbers: Sequence[int]) -> str:
    return "˒".join(str(n).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")) for n in numbers)


# ---------------------------------------------------------------------------------------------------- LaTeX


LATEX_WIDTH = 100  # characters of the smallest size on the narrowest usual page, that of `article`
LATEX_ROWS = 55  # of them on one page


def to_latex(title: str, blocks: Sequence[Block], absent: str = "") -> str:
    """`table*` floats, to be read in with \\input; needs no package.

    A float cannot break: rows beyond a page and columns beyond its width go into further floats of the same block,
    and what is said about a block stands below them as text.
    """
    return latex_page([latex_block(title, block) for block in blocks], absent)


def latex_page(blocks: Sequence[str], absent: str = "") -> str:
    """The same from blocks that are LaTeX already."""
    return "\n\n".join([*blocks, *([f"not run here: {markup.latex(absent)}"] if absent else [])]) + "\n"


def latex_block(title: str, block: Block) -> str:
    """The floats of one block and the text below them, without an end of line."""
    caption = markup.latex(f"{title}: {block.title}" if title else block.title)
    by_column = list(zip(*(row.cells for row in block.rows if row.cells), strict=True)) or [()] * len(block.heads)
    widths = [
        max(len(head), *map(_latex_length, column), 1) for head, column in zip(_heads(block), by_column, strict=True)
    ]
    parts = []
    for columns in _columns_by_part(widths, block, LATEX_WIDTH):
        for first in range(0, max(1, len(block.rows)), LATEX_ROWS):
            rows = _with_heading(block.rows, first, first + LATEX_ROWS)
            parts.append(_latex_float(caption + (", continued" if parts else ""), block, columns, rows))
    below = [markup.latex(line) for line in (*block.protocol, *block.signs, *_interval_sign(block))]
    below += [f"$^{{{k}}}$ {markup.latex(text)}" for k, text in enumerate(block.notes, 1)]
    below += [f"not run here: {markup.latex(block.absent)}"] if block.absent else []
    below.insert(0, rf"\textbf{{{caption}}}")
    notes = ["{\\scriptsize\\raggedright\\noindent", "\\par\\noindent\n".join(below), "\\par}"]
    return "\n\n".join([*parts, "\n".join(notes)])


def _with_heading(rows: Sequence[Row], first: int, last: int) -> list[Row]:
    """Rows of one page, below the heading that they belong to, and no heading as the last of them."""
    before = next((row for row in reversed(rows[:first]) if row.group), None)
    page = list(rows[first:last])
    if page and not page[0].group and before is not None:
        page.insert(0, before)
    return page[:-1] if len(page) > 1 and page[-1].group and last < len(rows) else page


def _latex_length(cell: Cell) -> int:
    value, interval, _, sign, _, notes = cell
    length = len(value) + (len(",".join(map(str, notes))) // 2 if notes else 0)
    if interval or sign:
        spaces = bool(interval) + bool(sign)
        length += len(interval) + len(sign) + (spaces if value else spaces - 1)
    return length


def _latex_float(caption: str, block: Block, columns: Sequence[int], rows: Sequence[Row]) -> str:
    heads = _heads(block)
    lines = [
        r"\begin{table*}",
        rf"\caption{{{caption}}}",
        r"\centering\tiny\setlength{\tabcolsep}{2pt}",
        rf"\begin{{tabular}}{{{''.join('l' if k in block.words else 'r' for k in columns)}}}",
        r"\hline",
        " & ".join(markup.latex(heads[k]) for k in columns) + r" \\",
        r"\hline",
        *(_latex_row(row, columns) for row in rows),
        r"\hline",
        r"\end{tabular}",
        r"\end{table*}",
    ]
    return "\n".join(lines)


def _latex_row(row: Row, columns: Sequence[int]) -> str:
    if row.group:
        return rf"\multicolumn{{{len(columns)}}}{{l}}{{\emph{{{markup.latex(row.group)}}}}} \\"
    return " & ".join([_latex_cell(row.cells[k]) for k in columns]) + r" \\"


def _latex_cell(cell: Cell) -> str:
    value, interval, _, sign, bold, notes = cell
    text = markup.latex(value)
    # braces keep a leading bracket from being taken for the option of the \\ before it
    text = rf"{{\textbf{{{text}}}}}" if bold else f"{{{text}}}"
    if notes:
        text += f"$^{{{','.join(map(str, notes))}}}$"
    return _spaced(text, markup.latex(interval), markup.latex(sign)) if interval or sign else text


# ---------------------------------------------------------------------------------------------------- HTML

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 96rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; overflow-wrap: anywhere; }
ul { margin: .5rem 0; padding-left: 1.2rem; font-size: .87rem; opacity: .85; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th.words, td.words { text-align: left; }
thead th { border-bottom: 2px solid currentColor; vertical-align: bottom; }
tr.group th { text-align: left; background: var(--soft); font-weight: 600; }
tbody tr:hover td { background: var(--soft); }
small { opacity: .7; }
sup { line-height: 0; }
figure { margin: 1.5rem 0; max-width: 42rem; }
figcaption { font-weight: 600; }
"""


def to_html(title: str, blocks: Sequence[Block], absent: str = "", figures: Sequence[str] = ()) -> str:
    """One page without scripts or requests; figures: HTML that stands below the tables."""
    return html_page(title, [html_block(block) for block in blocks], absent, figures)


def html_page(title: str, blocks: Sequence[str], absent: str = "", figures: Sequence[str] = ()) -> str:
    """The same from blocks that are HTML already."""
    body = [f"<h1>{markup.html(title)}</h1>", *blocks]
    if absent:
        body.append(f"<p>not run here: {markup.html(absent)}</p>")
    if figures:
        body += ["<h2>Learning curves</h2>", *figures]
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{markup.html(title)}</title><style>{STYLE}</style></head>",
        "<body>",
        *body,
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def html_block(block: Block) -> str:
    """One block with its heading, without an end of line."""
    below = [markup.html(sign) for sign in (*block.signs, *_interval_sign(block))]
    below += [f"<sup>{k}</sup> {markup.html(text)}" for k, text in enumerate(block.notes, 1)]
    below += [f"not run here: {markup.html(block.absent)}"] if block.absent else []
    parts = [
        f"<h2>{markup.html(block.title)}</h2>",
        _html_list(markup.html(line) for line in block.protocol),
        _html_table(block),
        _html_list(below),
    ]
    return "\n".join(parts)


def _html_list(items: Iterable[str]) -> str:
    lines = [f"<li>{item}</li>" for item in items]
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _html_table(block: Block) -> str:
    kinds = [' class="words"' if k in block.words else "" for k in range(len(block.heads))]
    heads = "".join(
        f'<th scope="col"{kind}>{markup.html(h)}</th>' for h, kind in zip(_heads(block), kinds, strict=True)
    )
    rows = "\n".join(_html_row(row, kinds) for row in block.rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _html_row(row: Row, kinds: list[str]) -> str:
    if row.group:
        return f'<tr class="group"><th scope="colgroup" colspan="{len(kinds)}">{markup.html(row.group)}</th></tr>'
    cells = [f"<td{kind}>{_html_cell(cell)}</td>" for cell, kind in zip(row.cells, kinds, strict=True)]
    return f"<tr>{''.join(cells)}</tr>"


def _html_cell(cell: Cell) -> str:
    value, interval, _, sign, bold, notes = cell
    text = markup.html(value)
    if bold:
        text = f"<strong>{text}</strong>"
    if notes:
        text += f"<sup>{', '.join(map(str, notes))}</sup>"
    if interval:
        interval = f"<small>{markup.html(interval)}</small>"
    return _spaced(text, interval, markup.html(sign)) if interval or sign else text


def _heads(block: Block) -> list[str]:
    return [f"{head} {arrow}".strip() for head, arrow in zip(block.heads, block.arrows, strict=True)]


def _interval_sign(block: Block) -> list[str]:
    return ["[a–b]: 95 % interval"] if block.has_intervals else []
