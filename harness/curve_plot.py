"""Learning curves of records as one small SVG each, for pages without scripts: a line for each run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness import markup
from harness.records import RunRecord

WIDTH, HEIGHT, MARGIN = 640, 240, 44
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")
MOST_LINES = 3 * len(COLOURS)  # in three kinds of dashes: more cannot be told apart
LEAST_POINTS = 3  # fewer are notes of a method, no curve
Line = tuple[str, Sequence[Sequence[float]]]


def learning_curves(records: Sequence[RunRecord], title_of: Callable[[RunRecord], str]) -> list[str]:
    """A figure for every curve that some record has, by name, each with a line for every record that has it."""
    found: dict[str, list[RunRecord]] = {}
    for record in records:
        for name, points in record.curves.items():
            if len(points) >= LEAST_POINTS:
                found.setdefault(name, []).append(record)
    figures = []
    for name, runs in found.items():
        lines = [(title_of(record), record.curves[name]) for record in runs[:MOST_LINES]]
        figures.append(figure(name, lines, f", the first {MOST_LINES} of {len(runs)} runs" * (len(runs) > MOST_LINES)))
    return figures


def figure(title: str, lines: Sequence[Line], remark: str = "") -> str:
    """An HTML figure: lines of [[step, value], ...] in one frame, their names below it; the remark ends its title."""
    points = [(step, value) for _, line in lines for step, value in line]
    steps, values = ([point[axis] for point in points] for axis in (0, 1))
    across = _scale(min(steps), max(steps), MARGIN, WIDTH - 8)
    down = _scale(min(values), max(values), HEIGHT - 24, 12)
    drawn, names = [], []
    for index, (name, line) in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{across(step):.1f},{down(value):.1f}" for step, value in line)
        dash = f' stroke-dasharray="{2 + index // len(COLOURS) * 3} 2"' if index >= len(COLOURS) else ""
        drawn.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}>'
            f"<title>{markup.html(name)}</title></polyline>"
        )
        first, last = line[0][1], line[-1][1]
        names.append(f'<li><b style="color:{colour}">—</b> {markup.html(name)}: {first:.4g} → {last:.4g}</li>')
    marks = [
        f'<text x="{MARGIN - 6}" y="{down(value) + 4:.0f}" text-anchor="end">{value:.3g}</text>'
        for value in (min(values), max(values))
    ] + [
        f'<text x="{across(step):.0f}" y="{HEIGHT - 6}" text-anchor="{side}">{step:g}</text>'
        for step, side in ((min(steps), "start"), (max(steps), "end"))
    ]
    return (
        f"<figure><figcaption>{markup.html(title)} by step{remark}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{markup.html(title)} by step, {len(lines)} runs" font-size="12" fill="currentColor">'
        f'<rect x="{MARGIN}" y="12" width="{WIDTH - 8 - MARGIN}" height="{HEIGHT - 36}" fill="none" '
        f'stroke="currentColor" opacity="0.3"/>{"".join(marks)}{"".join(drawn)}</svg>'
        f"<ul>{''.join(names)}</ul></figure>"
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Linear, low -> start and high -> end."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)
