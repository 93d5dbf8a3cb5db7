from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from tiny_models import context, language_model

from harness.evaluation import run_probes
from harness.records import Measurement


@dataclass
class Counting:
    name: str
    value: float = 1.5
    stage: str = "evaluate"
    ends_stage: bool = False
    fails: bool = False
    log: list = field(default_factory=list)

    compares: ClassVar[bool] = False

    def measure(self, lm, ctx):
        if self.fails:
            raise RuntimeError("killed here")
        self.log.append((self.name, lm.engine._mode))
        yield Measurement(self.name, self.value, "things", "", "lower", (1.0, 2.0))


def test_probes_run_once_in_order_and_a_killed_evaluation_goes_on(tmp_path):
    log = []
    first, last, timed = (
        Counting("first", log=log),
        Counting("last", log=log),
        Counting("timed", stage="time", log=log),
    )
    ending = Counting("ending", ends_stage=True, log=log)
    lm, ctx = language_model(), context(tmp_path)
    last.fails = True
    with pytest.raises(RuntimeError):
        run_probes([ending, first, last, timed], lm, ctx, "evaluate", tmp_path / "kept")
    last.fails = False
    found = run_probes([ending, first, last, timed], lm, ctx, "evaluate", tmp_path / "kept")
    assert log == [("first", "scoring"), ("last", "scoring"), ("ending", "scoring")]
    assert [m.metric for m in found] == ["ending", "first", "last"]
    assert found[1] == Measurement("first", 1.5, "things", "", "lower", (1.0, 2.0))
    run_probes([ending, first, last, timed], lm, ctx, "time", tmp_path / "kept")
    assert log[-1] == ("timed", "decoding")


def test_what_json_cannot_say_becomes_none(tmp_path):
    found = run_probes([Counting("n", float("nan"))], language_model(), context(tmp_path), "evaluate", tmp_path)
    assert found[0].value is None
