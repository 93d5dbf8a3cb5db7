"""Instructions that a teacher makes up from others: prompts, parsing, and what keeps a pool of them diverse.

Shared by Lion (one new instruction per seed, hard or easy) and LaMini-LM (twenty at a time from three examples). An
instruction is a `Problem`: its question is what is asked, its context the input it comes with, its gold a response.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# The wrapper that Alpaca, Lion and LaMini-LM's decoders are trained and asked with (LaMini-LM, model card, "Use").
WRAPPER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WRAPPER_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
LIST_MARK = re.compile(r"^\s*(?:\(?\d{1,3}\s*[.):]|[-*•])\s*")
WORDS = re.compile(r"[a-z0-9]+")


def wrapped(instruction: str, context: str = "") -> str:
    """An instruction as a student is asked, in training and in evaluation alike."""
    if context:
        return WRAPPER_WITH_INPUT.format(instruction=instruction, input=context)
    return WRAPPER.format(instruction=instruction)


def parse_list(text: str, most: int, truncated: bool = False) -> list[str]:
    """The instructions of a list that a teacher wrote: at most `most`, marks and empty lines removed, each one once.

    "1." "1)" "(1)" "1:" "-" and "*" are marks. Where any line has a mark, lines without one go on with the item before
    (and are a preface before the first); where none has, each line is an item. truncated: the text was cut at its
    length, so its last item may not be whole and is left out.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    marked = any(LIST_MARK.match(line) for line in lines)
    items: list[str] = []
    for line in lines:
        if not marked or LIST_MARK.match(line):
            items.append(LIST_MARK.sub("", line).strip())
        elif items:
            items[-1] += f" {line.strip()}"
    if truncated:
        items = items[:-1]
    return list(dict.fromkeys(filter(None, items)))[:most]


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


class Pool:
    """Instructions accepted so far, and whether another one is new enough to join them."""

    def __init__(self, instructions: Iterable[str] = (), most_alike: float = 0.7) -> None:
        self.most_alike = most_alike
        self._words: list[list[str]] = []
        self._seen: set[str] = set()
        for instruction in instructions:
            self.add(instruction)

    def __len__(self) -> int:
        return len(self._words)

    def add(self, instruction: str) -> None:
        """Let an instruction in without asking."""
        self._words.append(words(instruction))
        self._seen.add(instruction.strip())

    def alike(self, instruction: str) -> float:
        """The greatest ROUGE-L with any instruction of the pool."""
        found = words(instruction)
        most = 0.0
        for other in self._words:
            # 2 min / (n + m) bounds the measure: most pairs differ too much in length to matter
            if found and other and 2 * min(len(found), len(other)) > most * (len(found) + len(other)):
                most = max(most, rouge_l(found, other))
        return most

    def admit(self, instruction: str) -> bool:
        """Let an instruction in if it is no copy and unlike all others; whether it was."""
        if instruction.strip() in self._seen or self.alike(instruction) > self.most_alike:
            return False
        self.add(instruction)
        return True
