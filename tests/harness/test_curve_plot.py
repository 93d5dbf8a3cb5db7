"""Curves in a page: where a point lies, what is drawn at all, and that names cannot break out of their place."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from harness.curve_plot import HEIGHT, MARGIN, WIDTH, figure, learning_curves
from tests.harness.fake_records import record as fake_record


def points(html: str) -> list[list[float]]:
    found = re.search(r'points="([^"]*)"', html)[1]
    return [[float(number) for number in pair.split(",")] for pair in found.split()]


def test_a_straight_line_is_drawn_straight_from_corner_to_corner():
    drawn = points(figure("loss", [("run", [[0, 3.0], [5, 2.0], [10, 1.0]])]))
    assert drawn[0] == [MARGIN, 12]
    assert drawn[2] == [WIDTH - 8, HEIGHT - 24]
    assert drawn[1] == [pytest.approx((a + b) / 2, abs=0.1) for a, b in zip(drawn[0], drawn[2], strict=True)]


def test_a_constant_curve_is_drawn_too():
    assert len(points(figure("loss", [("run", [[1, 2.0], [2, 2.0], [3, 2.0]])]))) == 3


def test_every_curve_has_a_figure_and_every_record_its_line():
    curve = [[0, 3.0], [1, 2.0], [2, 1.5]]
    records = [
        replace(fake_record("gptq"), curves={"validation loss": curve, "blocks left": [[0, 15]]}),
        replace(fake_record("awq"), curves={"validation loss": curve, "training loss": curve}),
        fake_record("rtn"),
    ]
    figures = learning_curves(records, lambda record: record.card["name"])
    assert len(figures) == 2
    assert "validation loss" in figures[0]
    assert figures[0].count("<polyline") == 2
    assert figures[1].count("<polyline") == 1
    assert learning_curves(records[2:], str) == []


def test_names_are_text():
    html = figure("a<b", [("<script>alert(1)</script>", [[0, 1.0], [1, 2.0], [2, 3.0]])])
    assert "<script" not in html
    assert "a&lt;b" in html


def test_more_lines_than_can_be_told_apart_are_counted_and_not_drawn():
    curve = [[0, 3.0], [1, 2.0], [2, 1.5]]
    records = [replace(fake_record("gptq"), id=str(k), curves={"loss": curve}) for k in range(40)]
    (drawn,) = learning_curves(records, lambda record: record.id)
    assert drawn.count("<polyline") == 24
    assert "the first 24 of 40 runs" in drawn
