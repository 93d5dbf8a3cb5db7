"""Last-word cloze questions from prose, in the manner of LAMBADA (Paperno et al. 2016).

A question is a passage whose last word must be named. It qualifies when that word, at least four letters, stands
already in the passage: whoever follows the passage can name it, and whoever sees the last few words only can hardly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

SENTENCE_END = re.compile(r"(?<=[a-z\d)][.!?])\s+(?=[A-Z\"'])")
LAST_WORD = re.compile(r"^(?P<context>.*\s)(?P<word>[A-Za-z]{4,})[.!?]$", re.DOTALL)
CONTEXT_WORDS = range(30, 121)  # words before the one to be named


def questions(documents: list[str]) -> list[dict[str, str | int]]:
    """At most one question a paragraph, in reading order: {"document": int, "context": str, "word": str}."""
    return [
        {"document": index, **question}
        for index, document in enumerate(documents)
        for paragraph in document.split("\n\n")
        if (question := _question(paragraph))
    ]


def _question(paragraph: str) -> dict[str, str] | None:
    """The last sentence of a paragraph that ends with a word said before, after as much of the paragraph as fits."""
    sentences = SENTENCE_END.split(paragraph.strip())
    for last in reversed(range(len(sentences))):
        for first in range(last + 1):
            match = LAST_WORD.match(" ".join(sentences[first : last + 1]))
            if match and len(match["context"].split()) in CONTEXT_WORDS and match["word"] in _words(match["context"]):
                return {"context": match["context"].rstrip(), "word": match["word"]}
    return None


def _words(text: str) -> Iterator[str]:
    return (match.group() for match in re.finditer(r"[A-Za-z]+", text))
