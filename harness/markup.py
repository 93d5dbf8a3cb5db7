"""Text from outside (model names, error messages, notes) made safe to print in Markdown, LaTeX, HTML and CSV."""

from __future__ import annotations

import html as html_entities
import re
import unicodedata
from functools import lru_cache

REMEMBERED = 2**16  # texts: the same cells stand in thousands of rows

# Control characters can drive a terminal; format characters can turn the direction of what follows around.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Co", "Cn")

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    "≈": r"$\approx$",
    "✗": r"$\times$",
    "×": r"$\times$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "±": r"$\pm$",
    "–": "--",
    "·": r"$\cdot$",
    "…": r"\ldots{}",
    "‖": r"$\|$",
}
# Letters of Latin-1 that TeX's default encoding has: the rest would stop pdflatex.
_LATEX_LETTERS = frozenset(map(chr, range(0xC0, 0x100))) - set("ÐðÞþ×÷")


def plain(text: str) -> str:
    """One line without control or direction characters; runs of white space become one space."""
    if text.isprintable():  # nearly all texts; what follows looks at one character after the other
        return re.sub(r" +", " ", text).strip()
    spaced = "".join(
        " " if character.isspace() else character
        for character in text
        if character.isspace() or unicodedata.category(character) not in _UNPRINTABLE
    )
    return re.sub(r" +", " ", spaced).strip()


@lru_cache(REMEMBERED)
def markdown(text: str) -> str:
    """Text that a Markdown renderer shows as it is, also inside a table cell."""
    escaped = re.sub(r"([\\`*\[\]|~$])", r"\\\1", plain(text))
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", escaped)  # inside a word it means nothing
    return re.sub(r"^([#+-]|\d+[.)])(?=\s|$)", r"\\\1", escaped)


@lru_cache(REMEMBERED)
def latex(text: str) -> str:
    """Text that pdflatex sets as it is; a character without a command becomes its code point."""
    return "".join(_latex_character(character) for character in plain(text))


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    if character.isascii() or character in _LATEX_LETTERS:
        return character
    return f"[U+{ord(character):04X}]"


@lru_cache(REMEMBERED)
def html(text: str) -> str:
    """Text for an element or a quoted attribute."""
    return html_entities.escape(plain(text), quote=True)


def csv(text: str) -> str:
    """Text that a spreadsheet takes for text, not for a formula."""
    line = plain(text)
    return f"'{line}" if line[:1] in ("=", "+", "-", "@") else line
