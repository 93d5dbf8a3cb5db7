"""Which tokens of two tokenizers are the same piece of a text, and what a teacher's distribution says in the other's.

A teacher that is asked in words reports its likeliest tokens as texts. Where a token of the student's covers exactly
one token of the teacher's, those alternatives that the student knows as one token are what it learns; anywhere else it
learns the token itself (Fu et al. 2023, https://arxiv.org/abs/2301.12726, Section 3 and authors' code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import exp
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # characters [from, to) of a text
Soft = list[tuple[list[int], list[float]]]  # of each token: ids and their probabilities

SPACE = "▁"  # how vocabularies that are not of bytes write a space
SPACES = f"Ġ{SPACE} "  # marks of a space in vocabularies
ALIGNERS = ("offsets", "dtw")


def spans_of_texts(tokens: Sequence[str]) -> list[Span]:
    """Where tokens lie in the text that they make up."""
    return list(pairwise([0, *accumulate(map(len, tokens))]))


def student_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """A text as the tokenizer's ids, and where they lie in it.

    A token reaches from the end of the one before it to its own end, so that every character is in one token; tokens
    that are parts of one character share its end, and all but the last of them are empty.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = found["offset_mapping"]
    following = [end for _, end in offsets[1:]] + [len(text) + 1]
    ends = [end if end < after else start for (start, end), after in zip(offsets, following, strict=True)]
    return found["input_ids"], list(pairwise([0, *accumulate(ends, max)]))


def by_offsets(teacher: Sequence[Span], student: Sequence[Span]) -> list[int | None]:
    """For each token of the student's, the one of the teacher's that covers the same characters, or None."""
    places = {span: place for place, span in enumerate(teacher) if span[0] < span[1]}
    return [places.get(span) for span in student]


def by_warping(teacher: Sequence[str], student: Sequence[str]) -> list[int | None]:
    """The same by dynamic time warping, where a pair costs the edit distance of its texts (authors' code).

    For each token of the student's, the only one of the teacher's that it is paired with, if that one is paired with no
    other and both read the same; else None. Takes time in proportion to the product of both lengths.
    """
    if not teacher or not student:
        return [None] * len(student)
    costs = [[edit_distance(_bare(t), _bare(s)) for s in student] for t in teacher]
    total = [[0.0] * len(student) for _ in teacher]
    came: dict[tuple[int, int], tuple[int, int] | None] = {}
    for i, row in enumerate(costs):
        for j, cost in enumerate(row):
            before = [place for place in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if min(place) >= 0]
            best = min(before, key=lambda place: total[place[0]][place[1]], default=None)
            total[i][j] = cost + (total[best[0]][best[1]] if best else 0)
            came[i, j] = best
    place: tuple[int, int] | None = (len(teacher) - 1, len(student) - 1)
    pairs = []
    while place is not None:
        pairs.append(place)
        place = came[place]
    partners: dict[int, list[int]] = {}
    for i, j in pairs:
        partners.setdefault(j, []).append(i)
    uses = [i for i, _ in pairs]
    found: list[int | None] = []
    for j, text in enumerate(student):
        only = partners[j][0] if len(partners[j]) == 1 else None
        same = only is not None and uses.count(only) == 1 and _spaced(teacher[only]) == _spaced(text)
        found.append(only if same else None)
    return found


def edit_distance(a: str, b: str) -> int:
    """The fewest characters to insert, remove or replace to turn one text into the other (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


def soft_targets(
    top: Sequence[tuple[str, dict[str, float]]],
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    aligner: Literal["offsets", "dtw"] = "offsets",
    known: Callable[[str], int | None] | None = None,
) -> Soft | None:
    """What a student learns at every token of `text`, its end mark last: ids with probabilities that may sum to less.

    top: the teacher's tokens and their likeliest alternatives, as texts with log-probabilities. text: the beginning of
    what they make up. known: the id of a text that is one token of the student's; found by its tokenizer without it.
    None where the teacher's tokens do not make up the text.
    """
    ids, spans = student_tokens(tokenizer, text)
    pieces = [piece for piece, _ in top]
    if not "".join(pieces).startswith(text):
        return None
    if aligner == "dtw":
        partners = by_warping(pieces, [text[start:end] for start, end in spans])
    else:
        partners = by_offsets(spans_of_texts(pieces), spans)
    known = known or (lambda piece: one_token(tokenizer, piece))
    # some tokenizers begin a text with a space that is not there: so do the alternatives of its first token
    led = not text.startswith(" ") and bool(ids) and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(SPACE)
    found: Soft = []
    for place, (own, partner) in enumerate(zip(ids, partners, strict=True)):
        chances: dict[int, float] = {}
        for piece, score in (top[partner][1] if partner is not None else {}).items():
            token = known(f" {piece.lstrip(' ')}" if led and place == 0 else piece)
            if token is not None:
                chances.setdefault(token, exp(score))
        found.append((list(chances), list(chances.values())) if chances else ([own], [1.0]))
    return [*found, ([tokenizer.eos_token_id], [1.0])]


def one_token(tokenizer: PreTrainedTokenizerBase, piece: str) -> int | None:
    """The id of a text that is one token; None for a text of several.

    A vocabulary that is not of bytes is looked up: its tokenizer would put a space before a text that has none.
    """
    missing = (None, tokenizer.unk_token_id)
    if tokenizer.convert_tokens_to_ids(SPACE) not in missing:
        token = tokenizer.convert_tokens_to_ids(piece.replace(" ", SPACE))
        return None if token in missing else token
    ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[0] if len(ids) == 1 else None


def _bare(token: str) -> str:
    return token.strip(SPACES)


def _spaced(token: str) -> str:
    for mark in SPACES:
        token = token.replace(mark, " ")
    return token
