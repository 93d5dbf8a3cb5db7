"""Right or wrong: how an answer is found in a text, and when two answers are the same.

One rule per kind of answer, used alike for what a teacher writes, for what is kept of it, and for what a student is
scored on. What a rule cannot find counts as wrong; it is never guessed.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import ConfigError

if TYPE_CHECKING:
    from harness.problems import Problem

TOLERANCE = 1e-6  # between numbers that are the same
LARGEST_EXPONENT = 64
LETTERS = "ABCDEFGHIJ"

_ARROW = re.compile(r"-->|####")  # stands once: what a model writes after a first answer is another text
_CONCLUSION = re.compile(r"answer is:?|answer:", re.IGNORECASE)  # the last one concludes
_NUMBER = re.compile(r"(?:(?<![\w).])-)?(?:\d+(?:\.\d+)?|(?<!\d)\.\d+)")
WORDS = re.compile(r"[a-z0-9]+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@dataclass(frozen=True)
class AnswerRule:
    """How answers of one kind are read.

    candidates: every answer of this kind in a text, in order, given the problem's choices.
    same: whether two of them are equal.
    single: one that ends in "A or B" has not decided: it gives no answer.
    likeness: how like a text is to the right one, 0 to 1, where right and wrong is not all there is to say.
    """

    name: str
    candidates: Callable[[str, Sequence[str]], list[str]]
    same: Callable[[str, str], bool] = operator.eq
    likeness: Callable[[str, str], float] | None = None
    single: bool = False

    def extract(self, text: str, choices: Sequence[str] = ()) -> str | None:
        """The answer that a text gives, or None.

        After "-->" or "####", or after the last "answer is": the first candidate. Without any of them: the last one
        (Ho et al. 2023, authors' evaluation).
        """
        conclusion = concluded(text)
        if conclusion is not None:
            sentence = re.split(r"(?<=\.)\s|\n", conclusion.strip(), maxsplit=1)[0]
            if self.single and len(set(self.candidates(sentence, choices))) > 1:
                return None
            return next(iter(self.candidates(conclusion, choices)), None)
        return next(iter(self.candidates(text, choices)[::-1]), None)

    def correct(self, text: str, problem: Problem) -> bool:
        """Whether the text gives the right answer of the problem."""
        found = self.extract(text, problem.choices)
        return found is not None and self.same(found, problem.gold)


def concluded(text: str) -> str | None:
    """What stands after the mark of a conclusion; None where there is none."""
    arrow = _ARROW.search(text)
    if arrow:
        return text[arrow.end() :]
    marks = list(_CONCLUSION.finditer(text))
    return text[marks[-1].end() :] if marks else None


def without_conclusion(text: str) -> str:
    """The reasoning before the mark of a conclusion; the whole text where there is none.

    The sentence that the mark stands in is left out: "... So the answer is 4." ends before "So".
    """
    arrow = _ARROW.search(text)
    marks = [arrow] if arrow else list(_CONCLUSION.finditer(text))
    if not marks:
        return text.strip()
    before = text[: marks[-1].start()]
    if arrow:
        return before.strip()
    return before[: max(before.rfind(". ") + 1, before.rfind("\n") + 1, 0)].strip()


# ---- candidates


def _numbers(text: str, _choices: Sequence[str]) -> list[str]:
    return _NUMBER.findall(_THOUSANDS.sub("", text))


def _letters(text: str, choices: Sequence[str]) -> list[str]:
    """Letters of choices; those in parentheses before bare ones, which may be the article "A"."""
    known = LETTERS[: len(choices)] if choices else LETTERS[:5]
    marked = re.findall(rf"\(([{known}])\)", text)
    return marked or re.findall(rf"(?<![\w'])([{known}])(?![\w'])", text)


def _choices(text: str, choices: Sequence[str]) -> list[str]:
    """Choices where they are named; a first line that is nothing but a choice, its letter aside, is that choice.

    Letters count only in a text that names no choice in words. Without choices, the text itself is the candidate.
    """
    by_words = {plain(choice): choice for choice in choices}
    first = plain(re.sub(r"^\s*\(?[a-jA-J]\)\s*", "", text.strip().split("\n")[0]))
    if not choices:
        return [first] if first else []
    if first in by_words:
        return [by_words[first]]
    words = f" {plain(text)} "
    longest_first = "|".join(re.escape(choice) for choice in sorted(by_words, key=len, reverse=True))
    named = re.findall(rf"(?<= )({longest_first})(?= )", words)
    if named:
        return [by_words[choice] for choice in named]
    lettered = [LETTERS.index(letter.upper()) for letter in re.findall(r"\(([a-jA-J])\)", text)]
    return [choices[place] for place in lettered if place < len(choices)]


def _yes_no(text: str, _choices: Sequence[str]) -> list[str]:
    return [word.lower() for word in re.findall(r"\b(yes|no)\b", text, re.IGNORECASE)]


def _texts(text: str, _choices: Sequence[str]) -> list[str]:
    """What is quoted, else the whole text, without quotes, full stops and spaces."""
    quoted = re.findall(r'"([^"]+)"', text)
    found = [re.sub(r"[\"'.\s]", "", part).lower() for part in quoted or [text]]
    return [part for part in found if part]


def _equations(text: str, _choices: Sequence[str]) -> list[str]:
    """A first line that is arithmetic as a whole; else every piece of the text that is and has an operator."""
    text = _THOUSANDS.sub("", text)
    first = text.strip().split("\n")[0].strip().rstrip(".").strip()
    if evaluate_equation(first) is not None:
        return [first]
    found = [part.strip().rstrip(".").strip() for part in re.findall(r"[\d(][\d\s.+\-*/()]*", text)]
    return [part for part in found if re.search(r"[+\-*/]", part) and evaluate_equation(part) is not None]


# ---- arithmetic in a text

_PLAIN_NUMBER = r"\d+(?:\.\d+)?"
_EQUATION = re.compile(
    rf"({_PLAIN_NUMBER}(?:\s*[-+*/]\s*{_PLAIN_NUMBER})+)(\s*=\s*\$?)({_PLAIN_NUMBER})(?!\s*[-+*/\d])"
)


def recalculated(text: str) -> str:
    """The text with the right side of every "a + b = c" computed, and a corrected number put wherever it is used on.

    From left to right, so that later equations start from corrected numbers. Text whose arithmetic is right stays.
    """
    text, place = _THOUSANDS.sub("", text), 0
    while equation := _EQUATION.search(text, place):
        value = evaluate_equation(equation[1])
        place = equation.end()
        if value is None or abs(value - float(equation[3])) <= TOLERANCE:
            continue
        right = f"{value:.10g}"
        used = re.compile(rf"(?<![\d.]){re.escape(equation[3])}(?![\d]|\.\d)")
        before = text[: equation.start(3)] + right
        text, place = before + used.sub(right, text[equation.end(3) :]), len(before)
    return text


def _whole(text: str, _choices: Sequence[str]) -> list[str]:
    """The text itself."""
    return [text.strip()] if text.strip() else []


# ---- equality


def plain(text: str) -> str:
    """Words in lower case without punctuation around them and without articles in front."""
    words = re.sub(r"[^\w\s'-]", " ", text.lower()).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def _same_number(a: str, b: str) -> bool:
    try:
        return abs(float(a) - float(b)) <= TOLERANCE
    except ValueError:
        return a == b


def _same_value(a: str, b: str) -> bool:
    one, other = evaluate_equation(a), evaluate_equation(b)
    return one is not None and other is not None and abs(one - other) <= TOLERANCE


_OPERATIONS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def evaluate_equation(text: str) -> float | None:
    """The value of an arithmetic expression of numbers, + - * / ** and parentheses; None for anything else.

    Nothing is executed: only these nodes of the syntax tree have a meaning here.
    """

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            return -value(node.operand) if isinstance(node.op, ast.USub) else value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Pow) and abs(right) > LARGEST_EXPONENT:
                raise ValueError("too large an exponent")
            return _OPERATIONS[type(node.op)](left, right)
        raise ValueError("not arithmetic")

    try:
        result = value(ast.parse(text.strip(), mode="eval").body)
        return result if isinstance(result, float) and abs(result) < float("inf") else None
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


# ---- likeness


def words(text: str) -> list[str]:
    """Lower-case words of a text, as ROUGE counts them, without stemming."""
    return WORDS.findall(text.lower())


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of its table at a time as the bits of one integer.

    Hyyrö 2004, "Bit-parallel LCS-length computation revisited": zeros of `row` are steps of the table.
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        met = row & positions.get(word, 0)
        row = ((row + met) | (row - met)) & full
    return len(first) - row.bit_count()


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """F-measure of ROUGE-L of two word lists, between 0 and 1 (Lin 2004); 0 where one is empty."""
    if not first or not second:
        return 0.0
    return 2 * common_subsequence(first, second) / (len(first) + len(second))


def _rouge_l_of_texts(text: str, gold: str) -> float:
    return rouge_l(words(text), words(gold))


RULES = {
    rule.name: rule
    for rule in (
        AnswerRule("number", _numbers, _same_number),
        AnswerRule("letter", _letters, single=True),
        AnswerRule("choice", _choices, lambda a, b: plain(a) == plain(b), single=True),
        AnswerRule("yes_no", _yes_no),
        AnswerRule(
            "text", _texts, lambda a, b: re.sub(r"[\"'.\s]", "", a).lower() == re.sub(r"[\"'.\s]", "", b).lower()
        ),
        AnswerRule("equation", _equations, _same_value),
        AnswerRule("response", _whole, lambda a, b: plain(a) == plain(b), _rouge_l_of_texts),
    )
}


def rule_named(name: str) -> AnswerRule:
    """The rule of this name. Raises ConfigError with the names there are."""
    if name not in RULES:
        raise ConfigError(f"problems.rule={name}: choose one of {', '.join(RULES)}")
    return RULES[name]
