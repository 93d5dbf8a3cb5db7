"""What to use: the methods that nothing beats under the constraints given, and why each of the others lost.

    python -m harness.advise max_weight_gib=4 max_perplexity_increase=3% min_tokens_per_second=20 hardware=h100
    python -m harness.advise results/published/h100 max_perplexity_increase=5%

Everything is read from records of one protocol on one machine. A bound is broken only by a number whose whole interval
lies beyond it, and a row is beaten only by one that is no worse on any count and better beyond the intervals on one
(`harness.frontier`). Sizes within 1 % of each other count as equal; the noise floor of the machine widens intervals
where it was measured, and where it was not, a time without an interval has one of ±5 % (±15 % for seconds of
compressing).
"""

from __future__ import annotations

import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import markup
from harness.columns import batch_of
from harness.command import single_command
from harness.comparison import is_dense
from harness.errors import ConfigError
from harness.frontier import beaten_by, frontier
from harness.noise_floor import NoiseFloors, assumed, read_floors
from harness.options import RESULTS
from harness.records import Better, RunRecord
from harness.rows import describe, in_print_order, machine_in_words, row_labels
from harness.sanity import break_even_tokens
from harness.tables import (
    check_name,
    comparable,
    read_folder,
    terminal_width,
)
from harness.text_table import aligned, wrapped
from harness.wheels import default_cache

WIDEST = 100  # of the output, whatever the terminal allows
GIB = 2**-30
OF_COMPRESSING = ("compress_seconds", "peak_compress_bytes")  # say on what a method read, which is its own affair


@dataclass(frozen=True)
class Number:
    """A value and the ends of its interval, both equal to the value where it is exact."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Criterion:
    """One count on which rows are compared and that may be bounded.

    metric: where it is read; read: its value from the metric's; dense: what the dense model has where nothing is
    recorded, None where it must be measured; percent: shares are written as "3%".
    """

    name: str
    words: str
    metric: str
    better: Better
    head: str
    show: Callable[[float], str]
    read: Callable[[float], float] = float
    dense: float | None = None
    percent: bool = False
    equal: float = 0.0  # half of the relative difference that is none to a user: sizes are exact to the byte

    @property
    def option(self) -> str:
        """How the bound is typed."""
        return f"{'max' if self.better == 'lower' else 'min'}_{self.name}"

    def bound(self, limit: float) -> str:
        """A limit as it was typed."""
        return f"{100 * limit:g} %" if self.percent else f"{limit:g}"

    def of(self, record: RunRecord, on: str | None, floors: NoiseFloors) -> Number | None:
        """The record's number under this protocol or workload (None: any); None where it was not measured."""
        found = record.find(self.metric, on)
        if found is None or found.value is None:
            return None if self.dense is None or not is_dense(record) else Number(self.dense, self.dense, self.dense)
        ends = [self.read(end) for end in (found.interval or (found.value, found.value))]
        value = self.read(found.value)
        floor = floors.relative(record, found.metric, found.on)
        if floor is None:
            floor = 0.0 if found.interval else assumed(found.metric) / 2  # half on each side of a difference
        noise = max(floor, self.equal) * abs(value)
        return Number(value, min(*ends, value - noise), max(*ends, value + noise))

    def workload(self, records: Sequence[RunRecord], batch: int | None) -> str | None:
        """The protocol or workload that rows are compared on: what most of them have, of several the smallest batch's.

        None where any will do: what compressing took. A workload that none has where none has this batch size.
        """
        if self.metric in OF_COMPRESSING:
            return None
        found = Counter(
            m.on for r in records for m in r.measurements if m.metric == self.metric and m.value is not None
        )
        if batch is not None and any(on.startswith("batch ") for on in found):
            found = {on: count for on, count in found.items() if on.startswith(f"batch {batch},")}
        return max(found, key=lambda on: (found[on], -batch_of(on)), default="")


def _share(value: float) -> str:
    percent = 100 * value
    return f"{percent:.2f} %" if abs(percent) < 10 else f"{percent:.1f} %" if abs(percent) < 100 else f"{percent:.0f} %"


def _plain(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("perplexity_increase", "perplexity above the dense model's", "perplexity_ratio", "lower", "PPL +",
                  _share, lambda ratio: ratio - 1, 0.0, True),
        Criterion("perplexity", "perplexity", "perplexity", "lower", "PPL", _plain),
        Criterion("kl", "KL divergence from dense, nats per token", "kl_divergence", "lower", "KL", _plain, dense=0.0),
        Criterion("top1_agreement", "tokens on which it and dense agree", "top1_agreement", "higher", "top-1", _share,
                  dense=1.0, percent=True),
        Criterion("accuracy", "questions of the first task answered right", "accuracy", "higher", "task", _share,
                  percent=True),
        Criterion("accuracy_loss", "questions lost against dense, as a share of all", "accuracy_difference", "lower",
                  "task loss", _share, lambda difference: -difference, 0.0, True),
        Criterion("weight_gib", "weights in memory, ready to decode, GiB", "loaded_weight_bytes", "lower",
                  "weights GiB", _plain, lambda size: size * GIB, equal=0.005),
        Criterion("disk_gib", "weights on disk, GiB", "stored_bytes", "lower", "disk GiB", _plain,
                  lambda size: size * GIB, equal=0.005),
        Criterion("bits_per_weight", "stored bits per compressed weight, everything counted",
                  "effective_bits_per_weight", "lower", "bits/w", _plain, equal=0.005),
        Criterion("tokens_per_second", "tokens decoded per second", "decode_tokens_per_second", "higher", "tokens/s",
                  _plain),
        Criterion("first_token_ms", "milliseconds to the first token", "time_to_first_token_ms", "lower", "TTFT ms",
                  _plain),
        Criterion("token_ms", "milliseconds per output token", "time_per_output_token_ms", "lower", "TPOT ms", _plain),
        Criterion("compress_seconds", "seconds of compressing", "compress_seconds", "lower", "comp. s", _plain,
                  dense=0.0),
        Criterion("compress_gib", "memory that compressing takes at its peak, GiB", "peak_compress_bytes", "lower",
                  "comp. GiB", _plain, lambda size: size * GIB, 0.0),
    )
}  # fmt: skip
BOUNDS = {criterion.option: criterion for criterion in CRITERIA.values()}
USUAL = ("perplexity_increase", "weight_gib", "tokens_per_second")  # counts besides those that are bounded
OPTIONS = ("paths.results", "model", "hardware", "batch")

HELP = f"""{__doc__}
usage: python -m harness.advise [FOLDER] [BOUND=VALUE ...] [OPTION=VALUE ...]

bounds (shares as 3% or 0.03)
{chr(10).join(f"  {bound.option:<26} {bound.words}" for bound in CRITERIA.values())}

options
  FOLDER or paths.results=DIR   where records/ is read (default: results)
  model=NAME                    records of this model alone
  hardware=WORD                 of this hardware configuration, or a machine with this word in its name
  batch=N                       speed at this batch size (default: the smallest measured)

exit status: 0 something is recommended, or no bound was given; 1 nothing meets the bounds; 2 typed wrong
"""


@dataclass(frozen=True)
class Candidate:
    """One record with its numbers by criterion; lost: why it is out, "" for one that nothing beats."""

    record: RunRecord
    label: str
    numbers: dict[str, Number | None]
    lost: str = ""
    unsure: tuple[str, ...] = ()  # bounds that its interval reaches across


@dataclass(frozen=True)
class Advice:
    """What is said about records that may be compared."""

    title: str
    protocol: str
    counts: tuple[Criterion, ...]
    best: tuple[Candidate, ...]  # not beaten, in print order
    lost: tuple[Candidate, ...]
    recommended: Candidate | None
    reason: str


def advise(
    records: Sequence[RunRecord], bounds: dict[str, float], batch: int | None = None, floors: NoiseFloors | None = None
) -> Advice:
    """Advice on records of one protocol. bounds: criterion name → its limit."""
    floors = floors or NoiseFloors()
    labels = row_labels(records)
    ordered = in_print_order(records)
    workloads = {name: c.workload(ordered, batch) for name, c in CRITERIA.items()}
    numbers = {r.id: {name: c.of(r, workloads[name], floors) for name, c in CRITERIA.items()} for r in ordered}
    counts = _counts(ordered, numbers, bounds)
    standing, out = [], []
    for record in ordered:
        why = _excluded(record, numbers[record.id], bounds, counts)
        candidate = Candidate(record, labels[record.id], numbers[record.id], why, _unsure(numbers[record.id], bounds))
        (out if why else standing).append(candidate)
    best, beaten = _divided(standing, counts)
    recommended, reason = _recommended(best, bounds, counts)
    return Advice(
        title=" · ".join(filter(None, [records[0].model, describe(records[0]).engine, machine_in_words(records[0])])),
        protocol=_protocol(ordered, batch),
        counts=counts,
        best=tuple(best),
        lost=tuple(sorted([*out, *beaten], key=lambda c: ordered.index(c.record))),
        recommended=recommended,
        reason=reason,
    )


def _counts(
    records: Sequence[RunRecord], numbers: dict[str, dict[str, Number | None]], bounds: dict[str, float]
) -> tuple[Criterion, ...]:
    """What rows are compared on: every bound, and of the usual ones those that all finished rows have."""
    finished = [r for r in records if r.status == "finished"]
    usual = [name for name in USUAL if finished and all(numbers[r.id][name] is not None for r in finished)]
    return tuple(CRITERIA[name] for name in dict.fromkeys([*usual, *bounds]))


def _excluded(
    record: RunRecord, numbers: dict[str, Number | None], bounds: dict[str, float], counts: tuple[Criterion, ...]
) -> str:
    """Why a record cannot be used at all, in words; empty when it can."""
    if record.failure is not None:
        return f"failed in {record.failure.stage}: {markup.plain(record.failure.reason)}"
    if record.status != "finished":
        return "did not finish"
    if describe(record).collapsed:
        return "collapsed: perplexity over 10 × dense"
    broken = []
    for name, limit in bounds.items():
        criterion, number = CRITERIA[name], numbers[name]
        if number is None:
            broken.append(f"{criterion.words} was not measured")
        elif _beyond(criterion, number, limit):
            sign = ">" if criterion.better == "lower" else "<"
            broken.append(f"{_shown(criterion, number, True)} {sign} {criterion.bound(limit)}")
    missing = [c.words for c in counts if c.name not in bounds and numbers[c.name] is None]
    return "; ".join(broken + [f"{words} was not measured" for words in missing])


def _beyond(criterion: Criterion, number: Number, limit: float) -> bool:
    """Whether the whole interval breaks the bound."""
    return number.low > limit if criterion.better == "lower" else number.high < limit


def _unsure(numbers: dict[str, Number | None], bounds: dict[str, float]) -> tuple[str, ...]:
    """Bounds that lie inside the interval."""
    return tuple(
        CRITERIA[name].option
        for name, limit in bounds.items()
        if (number := numbers[name]) is not None and number.low < number.high and number.low <= limit <= number.high
    )


def _divided(standing: list[Candidate], counts: tuple[Criterion, ...]) -> tuple[list[Candidate], list[Candidate]]:
    """Those that nothing beats, and the others with what beats them."""
    if not standing:
        return [], []
    values = [[c.numbers[k.name].value for k in counts] for c in standing]
    ends = [[(c.numbers[k.name].low, c.numbers[k.name].high) for k in counts] for c in standing]
    better = [k.better for k in counts]
    first, winners = frontier(values, better, ends), beaten_by(values, better, ends)
    best, beaten = [], []
    for candidate, stands, winner in zip(standing, first, winners, strict=True):
        if stands:
            best.append(candidate)
        else:
            beaten.append(_replaced(candidate, _how(candidate, standing[winner], counts)))
    return best, beaten


def _replaced(candidate: Candidate, lost: str) -> Candidate:
    return Candidate(candidate.record, candidate.label, candidate.numbers, lost, candidate.unsure)


def _how(loser: Candidate, winner: Candidate, counts: tuple[Criterion, ...]) -> str:
    """On what the winner is better beyond the intervals."""
    parts = []
    for k in counts:
        a, b = winner.numbers[k.name], loser.numbers[k.name]
        if a.high < b.low if k.better == "lower" else a.low > b.high:
            parts.append(f"{_shown(k, b, True)} against {_shown(k, a)}")
    rest = ", no worse otherwise" if len(parts) < len(counts) else ""
    return f"beaten by {_called(winner)}: {', '.join(parts)}{rest}"


def _recommended(
    best: list[Candidate], bounds: dict[str, float], counts: tuple[Criterion, ...]
) -> tuple[Candidate | None, str]:
    """The one to use, and the rule that chose it."""
    if not bounds or not best:
        return None, ""

    def meets(candidate: Candidate) -> bool:
        return all(
            candidate.numbers[name].value <= limit
            if CRITERIA[name].better == "lower"
            else candidate.numbers[name].value >= limit
            for name, limit in bounds.items()
        )

    sure = [c for c in best if not c.unsure and meets(c)]
    left = sure or [c for c in best if meets(c)] or best
    # quality, the bounded before the usual, then speed, then the rest
    order = sorted(counts, key=lambda c: (c.metric not in QUALITY, c.name not in SPEED, c.name not in bounds))
    said = []
    for criterion in order:
        top = min(left, key=lambda c: _cost(criterion, c.numbers[criterion.name].value))
        tied = [c for c in left if _overlap(c.numbers[criterion.name], top.numbers[criterion.name])]
        if len(tied) < len(left):
            said.append(criterion.words)
        left = tied
    dense = next((c for c in left if is_dense(c.record)), None)
    chosen = dense or min(left, key=lambda c: _cost(order[0], c.numbers[order[0].name].value))
    reason = f"best by {', then '.join(said)}" if said else f"no worse by {order[0].words} than any other"
    if len(left) > 1:
        which = "the one that need not be made" if dense else "the first"
        reason += f"; {which} of {len(left)} that the intervals do not tell apart"
    if not sure:
        reason += "; no row is sure to meet every bound: intervals reach across one"
    return chosen, reason


SPEED = ("tokens_per_second", "token_ms", "first_token_ms")
QUALITY = ("perplexity_ratio", "perplexity", "kl_divergence", "top1_agreement", "accuracy", "accuracy_difference")


def _cost(criterion: Criterion, value: float) -> float:
    return value if criterion.better == "lower" else -value


def _overlap(one: Number, other: Number) -> bool:
    return one.low <= other.high and other.low <= one.high


def _shown(criterion: Criterion, number: Number, named: bool = False) -> str:
    """ "perplexity +3.1 % [2.8–3.4]": the value with its interval, where it has one that is more than rounding."""
    value = criterion.show(number.value)
    if number.high - number.low > 2.1 * criterion.equal * abs(number.value):
        low, high = (criterion.show(end).removesuffix(" %") for end in (number.low, number.high))
        value += f" [{low} to {high}]"
    if not named:
        return value
    return f"{criterion.head}{'' if criterion.head.endswith('+') else ' '}{value}"


def _called(candidate: Candidate) -> str:
    words = describe(candidate.record)
    sparsity = f" at {words.sparsity}" if words.sparsity else ""
    return f"{markup.plain(candidate.label)}{' ' + words.bits if words.bits else ''}{sparsity}"


def _protocol(records: Sequence[RunRecord], batch: int | None) -> str:
    """What the numbers are measured on."""
    workloads = [CRITERIA[name].workload(records, batch) for name in ("perplexity", "accuracy", "tokens_per_second")]
    return "; ".join(markup.plain(on) for on in workloads if on)


# ---------------------------------------------------------------------------------------------- practical questions


def practical(records: Sequence[RunRecord], batch: int | None = None) -> list[list[str]]:
    """One line a method: calibration, training, seconds of compressing, tokens until they are paid back, kernel."""
    dense = next((r for r in records if is_dense(r)), None)
    lines = [["method", "calibration", "training", "compressing", "paid back after", "kernel of decoding"]]
    by_title: dict[str, list[RunRecord]] = {}
    for record in in_print_order(records):
        if record.status == "finished" and not is_dense(record):
            by_title.setdefault(describe(record).title, []).append(record)
    for title, own in by_title.items():
        seconds = [v for r in own if (v := r.value("compress_seconds")) is not None]
        lines.append(
            [
                markup.plain(title),
                _calibration(own),
                _range([_training(r) for r in own], _thousands) or "no",
                _durations(seconds),
                _paid_back(own, dense, batch),
                " / ".join(dict.fromkeys(filter(None, map(_kernel, own)))),
            ]
        )
    return lines


def _calibration(records: Sequence[RunRecord]) -> str:
    needs = records[0].card.get("calibrates", True)
    if needs == "text":
        return "trains on it"
    tokens = [int(r.cost.get("calibration_tokens") or 0) for r in records]
    return _range(tokens, _thousands) if needs is True and any(tokens) else "no"


def _training(record: RunRecord) -> int:
    return int(record.cost.get("training_tokens") or 0)


def _kernel(record: RunRecord) -> str:
    """What multiplies when decoding: the first words of the note of a speed, or of the weights loaded for it."""
    timed = record.find("time_per_output_token_ms") or record.find("decode_tokens_per_second")
    if timed is not None and timed.note:
        return markup.plain(timed.note.partition("; ")[0].partition(", ")[0])
    loaded = record.find("loaded_weight_bytes")
    return "" if loaded is None else markup.plain(loaded.note.partition("; ")[2].partition(", ")[0])


def _paid_back(records: Sequence[RunRecord], dense: RunRecord | None, batch: int | None) -> str:
    """Tokens until the seconds of compressing are saved again, over the rows of one method."""
    token = CRITERIA["token_ms"]
    on = token.workload([*records, *([] if dense is None else [dense])], batch)
    reference = None if dense is None else dense.find(token.metric, on)
    found, never, timed = [], 0, 0
    for record in records:
        own = record.find(token.metric, on)
        seconds = record.value("compress_seconds")
        if own is None or reference is None or seconds is None:
            continue
        timed += 1
        tokens = break_even_tokens(seconds, own, reference)
        never += tokens is None
        found += [] if tokens is None else [tokens]
    if not timed:
        return "not timed"
    words = [f"{_range(found, _thousands)} tokens"] if found else []
    return ", ".join([*words, *(["never" if never == timed else f"never ({never} of {timed})"] if never else [])])


def _range(values: Sequence[float], show: Callable[[float], str]) -> str:
    known = sorted(value for value in values if value)
    if not known:
        return ""
    low, high = show(known[0]), show(known[-1])
    return low if low == high else f"{low}–{high}"


def _thousands(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.2g} s"


def _durations(seconds: Sequence[float]) -> str:
    """ "14–33 s": the unit once where both ends have the same."""
    low, dash, high = _range(seconds, _duration).partition("–")
    same = dash and low.rpartition(" ")[2] == high.rpartition(" ")[2]
    return f"{low.rpartition(' ')[0]}–{high}" if same else low + dash + high


# ------------------------------------------------------------------------------------------------------ in a terminal


def report(advice: Advice, bounds: dict[str, float], width: int = WIDEST) -> str:
    """The advice as text of at most `width` columns."""
    parts = [wrapped(markup.plain(advice.title), width), wrapped(advice.protocol, width)]
    if advice.recommended is not None:
        parts.append(f"\nRecommended: {_called(advice.recommended)}")
        parts.append(wrapped(f"{advice.reason}.", width, "  "))
        if is_dense(advice.recommended.record):
            parts.append("  The model as it is meets the bounds: compressing buys nothing that was asked for.")
        parts.append(f"  {markup.plain(single_command(advice.recommended.record))}")
        if advice.recommended.record.card.get("runtime"):
            elsewhere = f"other runtimes: {markup.plain(str(advice.recommended.record.card['runtime']))}"
            parts.append(wrapped(elsewhere, width, "  "))
    elif bounds:
        parts.append("\nNothing meets the bounds.")
    if advice.best:
        parts.append(f"\nNot beaten ({len(advice.best)})")
        heads = ["", "method", "bits", "sparsity", *(c.head for c in advice.counts)]
        rows = [
            [
                "→" if candidate is advice.recommended else "",
                markup.plain(candidate.label),
                (words := describe(candidate.record)).bits,
                words.sparsity,
                *(
                    _shown(c, candidate.numbers[c.name]) + (" ?" if c.option in candidate.unsure else "")
                    for c in advice.counts
                ),
            ]
            for candidate in advice.best
        ]
        parts.append(_without_empty([heads, *rows], right=range(2, 4 + len(advice.counts))))
        if any(candidate.unsure for candidate in advice.best):
            parts.append("?: the interval reaches across the bound")
    if advice.lost:
        parts.append(f"\nLost ({len(advice.lost)})")
        names = [markup.plain(_called(candidate)) for candidate in advice.lost]
        column = min(max(map(len, names)), 34) + 4
        parts += [
            wrapped(candidate.lost, width, " " * column, f"  {name:<{column - 2}}")
            for name, candidate in zip(names, advice.lost, strict=True)
        ]
    return "\n".join(parts)


def _without_empty(rows: list[list[str]], right: Sequence[int]) -> str:
    """Aligned rows without columns that hold nothing but their head."""
    kept = [k for k in range(len(rows[0])) if any(row[k] for row in rows[1:])]
    return aligned([[row[k] for k in kept] for row in rows], right=[n for n, k in enumerate(kept) if k in right])


def questions(records: Sequence[RunRecord], batch: int | None, width: int = WIDEST) -> str:
    """The practical questions as text."""
    lines = practical(records, batch)
    if len(lines) == 1:
        return ""
    before = sum(max(len(row[k]) for row in lines) + 2 for k in range(5))
    rows = []
    for row in lines:
        first, *rest = textwrap.wrap(row[5], max(12, width - before), break_on_hyphens=False) or [""]
        rows += [[*row[:5], first], *([""] * 5 + [more] for more in rest)]
    words = (
        "What each method needs: calibration text and training in tokens (k = 1000), time for compressing, and which "
        "kernel multiplies. Paid back: generated tokens, one sequence at a time, after which faster decoding has made "
        "up for the time of compressing; never: no faster than dense beyond the intervals."
    )
    return f"{wrapped(words, width)}\n\n{aligned(rows)}"


def parse(arguments: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Bounds by criterion, and options. Raises ConfigError for what is neither, naming what there is."""
    bounds, options = {}, {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.lstrip("+")
        if not equals:
            if "paths.results" in options:
                raise ConfigError(f"{argument!r}: a folder is already named; write BOUND=VALUE or OPTION=VALUE")
            options["paths.results"] = argument
        elif key in OPTIONS:
            options[key] = value
        else:
            check_name(key, [*BOUNDS, *OPTIONS], "constraint")
            bounds[BOUNDS[key].name] = _limit(BOUNDS[key], value)
    if not options.get("batch", "1").isdecimal():
        raise ConfigError(f"batch={options['batch']}: must be a whole number")
    return bounds, options


def _limit(criterion: Criterion, text: str) -> float:
    try:
        limit = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ConfigError(f"{criterion.option}={text}: must be a number" + (", like 3%" * criterion.percent)) from None
    if text.endswith("%") and not criterion.percent:
        raise ConfigError(f"{criterion.option}={text}: is no share; write a number without %")
    if criterion.percent and not text.endswith("%") and abs(limit) > 1:
        raise ConfigError(f"{criterion.option}={text}: write {text}% or {limit / 100:g}")
    return limit


def _on_hardware(records: list[RunRecord], word: str | None) -> list[RunRecord]:
    if word is None:
        return records
    found = [r for r in records if word.lower() in f"{describe(r).hardware} {machine_in_words(r)}".lower()]
    if not found:
        known = sorted({f"{describe(r).hardware} ({machine_in_words(r)})" for r in records})
        raise ConfigError(f"hardware={word}: no record; there is {'; '.join(known) or 'none at all'}")
    return found


def _of_model(records: list[RunRecord], name: str | None) -> list[RunRecord]:
    if name is not None:
        check_name(name, sorted({r.model for r in records}), "model")
    return [r for r in records if name is None or r.model == name]


def main(arguments: Sequence[str]) -> int:
    """See the help for the exit status."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(HELP)
        return 0 if arguments else 2
    width = min(WIDEST, terminal_width())
    try:
        bounds, options = parse(arguments)
        results = Path(options.get("paths.results", RESULTS))
        batch = int(options["batch"]) if "batch" in options else None
        records, broken = read_folder(results)
        records = _of_model(_on_hardware(records, options.get("hardware")), options.get("model"))
        floors = read_floors(default_cache(), results)
        blocks = [b for b in comparable(records) if any(not is_dense(r) for r in b)]
        usable, left_out = _usable(blocks, bounds, batch, floors)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(records)} records in {results}")
    asked = [f"{CRITERIA[name].option} {CRITERIA[name].bound(limit)}" for name, limit in bounds.items()]
    print(f"bounds: {', '.join(asked) or 'none, so nothing is recommended; --help lists them'}")
    nothing = bool(bounds)
    for block in usable:
        advice = advise(block, bounds, batch, floors)
        nothing = nothing and advice.recommended is None
        print(f"\n{'-' * width}\n{report(advice, bounds, width)}")
        if answers := questions(block, batch, width):
            print(f"\n{answers}")
    for line in left_out:
        print(wrapped(line, width, "  ", "\n"))
    for reason in broken:
        print(f"not read: {reason}", file=sys.stderr)
    return 1 if nothing else 0


def _usable(
    blocks: list[list[RunRecord]], bounds: dict[str, float], batch: int | None, floors: NoiseFloors
) -> tuple[list[list[RunRecord]], list[str]]:
    """Blocks in which some row has every bounded number, largest first; and what the others lack.

    Raises ConfigError where there is none.
    """
    usable, left_out = [], []
    for block in sorted(blocks, key=len, reverse=True):
        lacking = [
            CRITERIA[name].words
            for name in bounds
            if all(
                CRITERIA[name].of(r, CRITERIA[name].workload(block, batch), floors) is None
                for r in block
                if not is_dense(r)
            )
        ]
        if lacking:
            title = f"{block[0].model}, {machine_in_words(block[0])}, {_protocol(block, batch)}"
            left_out.append(f"left out, {len(block)} records ({title}): {', '.join(lacking)} was not measured there")
        else:
            usable.append(block)
    if not usable:
        raise ConfigError("; ".join(left_out) or "there are no records of compressed models; run `python -m harness`")
    return usable, left_out


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends quietly; of a process that is ours alone
    sys.exit(main(sys.argv[1:]))
