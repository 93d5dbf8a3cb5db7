"""Programs as reasoning steps: reading, comparing and corrupting them, and searching for one line by line.

PaD (Zhu et al. 2024, https://arxiv.org/abs/2305.13888). Nothing here runs a program: `methods.distillation.sandbox`
does. Only programs that a sandbox has parsed before are parsed here again.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

FENCE = re.compile(r"```(?:python)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>]*)>>")
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
CORRUPTIONS = ("line", "name", "operator", "indentation")


def read_program(text: str) -> str:
    """The program in what a model wrote: inside the first fence of a code block if there is one, without blank ends."""
    fenced = FENCE.search(text)
    body = fenced.group(1) if fenced else text
    return "\n".join(line.rstrip() for line in body.strip("\n").splitlines())


def same_number(found: object, gold: object) -> bool:
    """Whether two answers are one: |a - b| ≤ 10⁻³ · max(1, |b|) as numbers, else the same text but for its case."""
    try:
        first, second = (float(str(value).replace(",", "")) for value in (found, gold))
    except ValueError:
        return str(found).strip().lower() == str(gold).strip().lower()
    return abs(first - second) <= 1e-3 * max(1.0, abs(second))


def normalised(program: str) -> str:
    """A program without comments, docstrings and layout: equal texts are the same program. Raises SyntaxError."""
    tree = ast.parse(program)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [line for line in body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
            node.body = kept or [ast.Pass()]
    return ast.unparse(ast.fix_missing_locations(tree))


def annotated_program(solution: str) -> str | None:
    """The program that the calculator annotations <<a*b=c>> of a worked solution spell, a line each; None without any.

    A number that an earlier annotation gave is written as that step's name, so that the program reasons as the text.
    """
    names: dict[float, str] = {}
    lines = []
    for index, (expression, result) in enumerate(ANNOTATION.findall(solution), start=1):
        expression = expression.replace(",", "").replace("$", "").strip()
        body = re.sub(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", lambda m: names.get(float(m.group()), m.group()), expression)
        body = re.sub(r"(?<![\w.)])0+(?=\d)", "", body)  # 05 is no number of Python's
        body = body.replace("%", "/100")
        lines.append(f"    step_{index} = {body}")
        try:
            names[float(result.replace(",", ""))] = f"step_{index}"
        except ValueError:
            continue  # "3/4" is a result, too; later steps write it out themselves
    if not lines:
        return None
    return "\n".join(["def solution():", *lines, f"    return step_{len(lines)}"])


def corrupted(program: str, generator: torch.Generator) -> Iterator[tuple[str, str]]:
    """The program with one mistake (Section 3.2): (kind, source) of each kind that applies, in random order.

    "line" leaves out a line; "name" misspells a name where it is read; "operator" swaps + with - or * with /;
    "indentation" moves a line. Whether the result is wrong is for a sandbox to say.
    """
    lines = program.splitlines()
    for index in torch.randperm(len(CORRUPTIONS), generator=generator).tolist():
        kind = CORRUPTIONS[index]
        if kind in ("line", "indentation"):
            if len(lines) < 2:
                continue
            at = 1 + _draw(len(lines) - 1, generator)  # the first line opens the function
            changed = [*lines[:at], *([] if kind == "line" else [f"   {lines[at]}"]), *lines[at + 1 :]]
            yield kind, "\n".join(changed)
        else:
            places = list(_places(program, kind))
            if places:
                start, end, text = places[_draw(len(places), generator)]
                yield kind, program[:start] + text + program[end:]


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def _places(program: str, kind: str) -> Iterator[tuple[int, int, str]]:
    """Where a mistake can be made: first and last character, and the text that takes their place."""
    starts = [0]
    for line in program.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def offset(line: int, column: int) -> int:
        return len(program.encode()[: starts[line - 1] + column].decode())

    for node in ast.walk(ast.parse(program)):
        if kind == "name" and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield (offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset), f"{node.id}_")
        if kind == "operator" and isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            start = offset(node.left.end_lineno, node.left.end_col_offset)
            end = offset(node.right.lineno, node.right.col_offset)
            between = program[start:end]
            signs = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
            sign = signs[type(node.op)]
            if between.count(sign) == 1:
                yield start, end, between.replace(sign, signs[OPERATORS[type(node.op)]])


@dataclass(frozen=True)
class Step:
    """A line that a model proposes. score: mean log-probability per token, in nats. last: the program ends with it."""

    line: str
    score: float
    last: bool = False


def search_lines(
    propose: Callable[[Sequence[Sequence[str]]], Sequence[Sequence[Step]]],
    verify: Callable[[Sequence[Sequence[str]]], Sequence[float]],
    beams: int,
    weight: float,
    most_lines: int,
) -> list[str]:
    """The best program by beam search over lines (Section 3.3).

    propose: of each beginning (lines), the lines that may follow. verify: a score of each beginning. A beginning's
    total is the sum over its lines of log-probability + weight · verification; `beams` of them go on, complete ones
    are kept beside them, the best is returned (of those that did not end within `most_lines`, if none did).
    """
    live: list[tuple[float, list[str]]] = [(0.0, [])]
    ended: list[tuple[float, list[str]]] = []
    for _ in range(most_lines):
        proposed = propose([lines for _, lines in live])
        grown = [
            (total + step.score, [*lines, step.line], step.last)
            for (total, lines), steps in zip(live, proposed, strict=True)
            for step in steps
        ]
        if not grown:
            break
        verified = verify([lines for _, lines, _ in grown]) if weight else [0.0] * len(grown)
        scored = [
            (total + weight * score, lines, last) for (total, lines, last), score in zip(grown, verified, strict=True)
        ]
        scored.sort(key=lambda one: -one[0])
        best = scored[:beams]
        ended += [(total, lines) for total, lines, last in best if last]
        live = [(total, lines) for total, lines, last in best if not last]
        if not live:
            break
    return max(ended or live, key=lambda one: one[0])[1]
