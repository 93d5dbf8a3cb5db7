"""Whether two records of one protocol differ, or whether a test cannot tell their difference from nothing.

Both were asked the same, so tests are paired wherever the outcomes of single tokens and questions were kept:
moving-block bootstrap of token losses, McNemar's exact test of questions. Where only records are left, the paired
differences from the dense model that they hold are compared, and where there are none, their intervals; both find less.
Whatever the noise floor of the machine covers is no difference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import log, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from harness import statistics
from harness.environment import FOREIGN
from harness.noise_floor import NoiseFloors, assumed
from harness.records import Measurement, RunRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOKEN_OUTCOMES = {"perplexity": "loss", "bits_per_byte": "loss", "kl_divergence": "kl", "top1_agreement": "top1_agrees"}
RATIOS = ("perplexity", "word_perplexity", "stream_perplexity_ratio")  # compared by their logarithm
TO_DENSE = {
    "perplexity": ("perplexity_ratio", 1.0),
    "word_perplexity": ("word_perplexity_ratio", 1.0),
    "accuracy": ("accuracy_difference", 0.0),
}
BEYOND_DOUBT = 1e-6  # p-values below it need no sharper test
SEED = 0  # of the bootstrap: the same records give the same marks


@dataclass
class Kept:
    """Outcomes of single tokens and questions below a results folder, read when first asked for; None: no folder."""

    results: Path | None = None
    _read: dict[tuple, object] = field(default_factory=dict, repr=False)

    @cached_property
    def there(self) -> bool:
        """Whether any outcome may have been kept."""
        return self.results is not None and (self.results / "samples").is_dir()

    def tokens(self, record: RunRecord, measurement: Measurement) -> tuple[NDArray, int] | None:
        """Outcome of each scored token in reading order, and tokens per window."""
        column = TOKEN_OUTCOMES.get(measurement.metric)
        parts = measurement.on.split(", ")
        if column is None or len(parts) < 2:
            return None
        table = self._table(record, f"perplexity-{parts[-2]}.parquet", ("window", column))
        if table is None:
            return None
        import numpy as np

        windows, values = table
        return values, round(len(values) / len(np.unique(windows)))

    def answers(self, record: RunRecord, on: str) -> dict[int, bool] | None:
        """Question → whether it was answered right, under this very protocol: examples, template, filter."""
        folder = self._folder(record)
        for file in sorted(folder.glob("tasks-*.parquet")) if folder else []:
            table = self._table(record, file.name, ("on", "metric", "doc_id", "correct"))
            if table is not None:
                chosen = (table[0] == on) & (table[1] == "accuracy")
                if chosen.any():
                    return dict(zip(table[2][chosen].tolist(), table[3][chosen].astype(bool).tolist(), strict=True))
        return None

    def _folder(self, record: RunRecord) -> Path | None:
        return self.results / record.samples if self.results is not None and record.samples else None

    def _table(self, record: RunRecord, name: str, columns: tuple[str, ...]) -> list[NDArray] | None:
        key = (record.id, name, columns)
        if key not in self._read:
            self._read[key] = self._columns(record, name, columns)
        return self._read[key]

    def _columns(self, record: RunRecord, name: str, columns: tuple[str, ...]) -> list[NDArray] | None:
        folder = self._folder(record)
        if folder is None or not (folder / name).is_file():
            return None
        from pyarrow import ArrowException, parquet

        try:
            table = parquet.read_table(folder / name)
        except (ArrowException, OSError):
            return None  # torn by a killed run: the record's own numbers remain
        if not set(columns) <= set(table.column_names):
            return None
        return [table[column].to_numpy() for column in columns]


Arm = tuple[RunRecord, Measurement]


@dataclass
class Judge:
    """Decides which of many rows differ. Tests of one call err in 5 of 100 calls together (Holm's correction)."""

    kept: Kept = field(default_factory=Kept)
    floors: NoiseFloors = field(default_factory=NoiseFloors)
    tests: set[str] = field(default_factory=set)  # what decided, in words
    _differences: dict[tuple, tuple] = field(default_factory=dict, init=False, repr=False, compare=False)

    def same_as_dense(self, rows: Sequence[Arm], dense: Arm | None) -> set[str]:
        """Ids of the records that no test tells from the dense run."""
        found = {record.id: self._against_dense((record, m), dense) for record, m in rows}
        return self._not_told_apart(found)

    def ties(self, rows: Sequence[Arm], best: Arm) -> set[str]:
        """Ids of the records that no test tells from the best one, which is among them."""
        metric = best[1].metric
        if not (self.floors.floors or self.kept.there or metric in TO_DENSE or best[1].interval or assumed(metric)):
            return {best[0].id}  # nothing to test it with, which most columns have not
        found = {record.id: self.p_value((record, m), best) for record, m in rows if record is not best[0]}
        return {best[0].id} | self._not_told_apart(found)

    def p_value(self, one: Arm, other: Arm) -> float | None:
        """Two-sided p-value that two arms are equally good; 1.0 below the noise floor; None where no test is possible.

        A time without an interval is taken to repeat as `harness.verify` has it; any other number without an interval
        or kept outcomes is exact.
        """
        if self._below_the_floor(one, other):
            return 1.0
        found, test = self._from_differences_to_dense(one, other), "paired differences from dense"
        if found is None:
            found, test = _from_intervals(one[1], other[1]), self._intervals(one)
        if found is None or found > BEYOND_DOUBT:  # these two find less: outcomes need not be read where they do
            paired = _from_outcomes(one, other, self.kept)
            found, test = (found, test) if paired is None else (paired, "paired on kept tokens and questions")
        if found is not None:
            self.tests.add(test)
        return found

    def _intervals(self, arm: Arm) -> str:
        """What intervals tell: of a time that of one run, which says nothing of how far two runs lie apart."""
        record, m = arm
        alone = assumed(m.metric) and self.floors.relative(record, m.metric, m.on) is None
        return "intervals of one run each (no noise floor of this machine)" if alone else "intervals"

    def _against_dense(self, row: Arm, dense: Arm | None) -> float | None:
        if dense is not None and (row[1].metric not in TO_DENSE or self._below_the_floor(row, dense)):
            return self.p_value(row, dense)
        if row[1].metric not in TO_DENSE:
            return None
        found = self._from_differences_to_dense(row, None)  # made from the outcomes when they were fresh
        if found is not None:
            self.tests.add("paired differences from dense")
        return found

    def _from_differences_to_dense(self, one: Arm, other: Arm | None) -> float | None:
        """From what each record says about its own paired difference from dense; the dense run's (None) is nothing."""
        metric, on = one[1].metric, one[1].on
        if metric not in TO_DENSE:
            return None
        first, second = (None if arm is None or is_dense(arm[0]) else arm[0] for arm in (one, other))
        difference = variance = 0.0
        for record, sign in ((first, 1), (second, -1)):
            if record is None:
                continue
            key = id(record), metric, on
            if key not in self._differences:  # holds the record too, and so what its id stands for
                self._differences[key] = (record, _difference_to_dense(record, metric, on))
            compared = self._differences[key][1]
            if compared is None:
                return None
            if (first is None or second is None) and (exact := _mcnemar_of(compared.note)) is not None:
                return exact
            difference += sign * compared.difference
            variance += compared.variance
        return _p_of_difference(difference, variance, on)

    def _below_the_floor(self, one: Arm, other: Arm) -> bool:
        (record, ours), (_, theirs) = one, other
        floor, test = self.floors.relative(record, ours.metric, ours.on), "the machine's noise floor"
        if floor is None and (ours.interval is None or theirs.interval is None):
            floor = assumed(ours.metric)
            of = "seconds to compress" if ours.metric == "compress_seconds" else "one timing"
            test = f"{100 * floor:.0f} % of {of}"
            load = _foreign_load(max(ours, theirs, key=lambda m: m.value)) if ours.metric == "compress_seconds" else 0
            if load:  # the longer one may have taken 1 + load times as long as it would alone
                floor, test = 1 - (1 - floor) / (1 + load), f"{test} (more beside other processes)"
        if not floor or abs(ours.value - theirs.value) > floor * max(abs(ours.value), abs(theirs.value)):
            return False
        self.tests.add(test)
        return True

    @staticmethod
    def _not_told_apart(found: dict[str, float | None]) -> set[str]:
        tested = {id: p for id, p in found.items() if p is not None}
        adjusted = statistics.holm(list(tested.values()))
        return {id for id, p in zip(tested, adjusted, strict=True) if p >= statistics.LEVEL}


def _foreign_load(measurement: Measurement) -> float:
    """How many times the cores of a run others used meanwhile, as its note says; 0 where it says nothing."""
    found = re.search(FOREIGN, measurement.note)
    return int(found[1]) / 100 if found else 0.0


def _from_outcomes(one: Arm, other: Arm, kept: Kept) -> float | None:
    (first, ours), (second, theirs) = one, other
    if not kept.there or ours.on != theirs.on:
        return None
    if ours.metric == "accuracy":
        right, others = kept.answers(first, ours.on), kept.answers(second, ours.on)
        if right is None or others is None or right.keys() != others.keys():
            return None
        gained = sum(right[question] and not others[question] for question in right)
        lost = sum(others[question] and not right[question] for question in right)
        return statistics.mcnemar(gained, lost)
    import numpy as np

    tokens, other_tokens = kept.tokens(first, ours), kept.tokens(second, ours)
    if tokens is None or other_tokens is None or len(tokens[0]) != len(other_tokens[0]):
        return None
    return statistics.paired_p_value(tokens[0], other_tokens[0], tokens[1], np.random.default_rng(SEED))


class _Difference(NamedTuple):
    """Of a record from dense, as it was found on the same tokens or questions. note: of the measurement."""

    difference: float
    variance: float
    note: str


def _difference_to_dense(record: RunRecord, metric: str, on: str) -> _Difference | None:
    name, nothing = TO_DENSE[metric]
    compared = record.find(name, on)
    if compared is None or compared.value is None or compared.interval is None:
        return None
    low, high = (_scaled(end, metric) for end in compared.interval)
    difference = _scaled(compared.value, metric) - _scaled(nothing, metric)
    return _Difference(difference, ((high - low) / (2 * statistics.Z_95)) ** 2, compared.note)


def is_dense(record: RunRecord) -> bool:
    """Whether this is the uncompressed reference."""
    return record.card.get("name") == "dense"


def _mcnemar_of(note: str) -> float | None:
    """The exact test against dense, from the questions gained and lost in the note of a paired difference."""
    found = re.search(r"(\d+) gained, (\d+) lost", note)
    return statistics.mcnemar(int(found[1]), int(found[2])) if found else None


def _from_intervals(ours: Measurement, theirs: Measurement) -> float | None:
    if ours.interval is None or theirs.interval is None:
        return None
    spans = [_scaled(m.interval[1], m.metric) - _scaled(m.interval[0], m.metric) for m in (ours, theirs)]
    variance = sum((span / (2 * statistics.Z_95)) ** 2 for span in spans)
    return _p_of_difference(_scaled(ours.value, ours.metric) - _scaled(theirs.value, ours.metric), variance, ours.on)


def _scaled(value: float, metric: str) -> float:
    return log(value) if metric in RATIOS else value


def _p_of_difference(difference: float, variance: float, on: str) -> float:
    """Of a difference whose variance was read off intervals, as if half of one were 1.96 standard deviations.

    Of windows it is Student's quantile, as in `statistics.paired_p_value`.
    """
    if variance <= 0:
        return float(difference == 0)
    found = re.search(r", (\d+) windows$", on)
    if found is None:
        return statistics.two_sided(difference / sqrt(variance))
    freedom = max(2, int(found[1])) - 1
    deviations = statistics.student_quantile(freedom) / statistics.Z_95
    return statistics.student_two_sided(difference / sqrt(variance) * deviations, freedom)
