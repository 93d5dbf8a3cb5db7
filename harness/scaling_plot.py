"""Quality against total model bits, one line for each data type and block size: python -m harness.scaling_plot

The question of k-bit inference scaling laws (Dettmers and Zettlemoyer 2022): with a budget of bits, which width, which
data type, which model? It draws what `experiment=bits_scaling` leaves, from the records alone.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import ConfigError
from harness.records import Measurement, RunRecord, read_record, write_bytes_atomically
from harness.rows import hardware_name, machine_in_words
from harness.taxonomy import SYSTEMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAMILY = "quantization/data_types"
BLOCKS = ", blocks of "  # between a data type and its block size: one colour for each type, one style for each size
STYLES = ("-", "--", ":", "-.")
METRICS = {"perplexity": "perplexity", "kl_divergence": "KL divergence from dense, nats per token"}
HELP = """Draw quality against total model bits from the records of experiment=bits_scaling.

usage: python -m harness.scaling_plot [OPTION=VALUE ...]

options
  paths.results=DIR   where records/ is read and plots/ is written (default: results)
  metric=NAME         perplexity (default) or kl_divergence
"""


@dataclass(frozen=True)
class Point:
    """One run. bits: of the whole model as stored; interval: of the metric; record: its id."""

    model: str
    line: str  # data type and block size
    width: float
    bits: float
    value: float
    interval: tuple[float, float] | None
    record: str = ""


def points_of(
    records: Sequence[RunRecord], metric: str, on: str | None = None
) -> tuple[list[Point], list[Point], str, list[str]]:
    """Points of the data types, points of dense models, the protocol they share, and the protocols left out.

    Only one protocol on one machine is drawn, `on` or the one that most runs have: numbers of two do not compare.
    """
    wanted = [r for r in records if r.status == "finished" and (_is_type(r) or r.card.get("name") == "dense")]
    found = [(r, m) for r in wanted if (m := r.find(metric, on)) is not None and m.value is not None]
    if metric != "perplexity":
        found = [(r, m) for r, m in found if r.card.get("name") != "dense"]
    common = Counter((m.on, _machine(r)) for r, m in found if _is_type(r))
    if not common:
        raise ConfigError(
            f"no finished run of a data type has {metric}; run: python -m harness experiment=bits_scaling"
        )
    (protocol, machine), *others = [setting for setting, _ in common.most_common()]
    drawn = [(r, m) for r, m in found if (m.on, _machine(r)) == (protocol, machine)]
    types = [_point(r, m) for r, m in drawn if _is_type(r)]
    dense = [_point(r, m) for r, m in drawn if not _is_type(r)]
    left_out = [on if where == machine else f"{on} ({where})" for on, where in others]
    return types, dense, protocol, left_out


def draw(types: Sequence[Point], dense: Sequence[Point], metric: str, protocol: str) -> Figure:
    """The figure: total bits on a logarithmic axis, a line for each model, data type and block size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    models = sorted({point.model for point in types})
    kinds, sizes = ({of(point.line): None for point in sorted(types, key=lambda p: p.line)} for of in (_kind, _blocks))
    colour = {kind: f"C{index % 10}" for index, kind in enumerate(kinds)}
    style = {size: STYLES[index % len(STYLES)] for index, size in enumerate(sorted(sizes, key=lambda b: (len(b), b)))}
    for model in models:
        for line in sorted({p.line for p in types if p.model == model}):
            own = sorted((p for p in types if p.model == model and p.line == line), key=lambda p: p.bits)
            label = line if len(models) == 1 else f"{line}, {model}"
            look = {"color": colour[_kind(line)], "linestyle": style[_blocks(line)], "marker": "o", "markersize": 3}
            drawn = axes.plot([p.bits for p in own], [p.value for p in own], label=label, **look)
            for point in own:
                if point.interval is not None:
                    axes.vlines(point.bits, *point.interval, color=drawn[0].get_color(), alpha=0.25)
                place = {"xytext": (2, 2), "textcoords": "offset points"}
                axes.annotate(f"{point.width:g}", (point.bits, point.value), fontsize=6, **place)
    for point in dense:
        axes.plot(point.bits, point.value, marker="*", color="black", linestyle="", label=f"dense, {point.model}")
    axes.set_xscale("log")
    if max(p.value for p in types) > 4 * min(p.value for p in types):
        axes.set_yscale("log")
    axes.set_xlabel("bits of the stored model (numbers beside points: bits of a weight)")
    axes.set_ylabel(METRICS[metric])
    axes.set_title(f"{METRICS[metric]} against model size\n{protocol}", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, loc="upper right", handlelength=3.5)
    return figure


def _kind(line: str) -> str:
    return line.partition(BLOCKS)[0]


def _blocks(line: str) -> str:
    return line.partition(BLOCKS)[2]


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; 2 for what was typed wrong or where there is nothing to draw."""
    if {"--help", "-h"} & set(arguments):
        print(HELP)
        return 0
    try:
        options = _parse(arguments)
        results = Path(options.get("paths.results", "results"))
        metric = options.get("metric", "perplexity")
        records = [read_record(path) for path in sorted((results / "records").glob("*/*.json"))]
        types, dense, protocol, others = points_of(records, metric)
        figure = draw(types, dense, metric, protocol)
        for suffix in ("png", "svg"):
            file = results / "plots" / f"bits_scaling_{metric}.{suffix}"
            write_bytes_atomically(_rendered(figure, suffix), file)
            print(f"written: {file}")
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"drawn: {len(types)} runs, {protocol}")
    for on in others:
        print(f"left out, another protocol or machine: {on}", file=sys.stderr)
    return 0


def _rendered(figure: Figure, suffix: str) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    figure.savefig(buffer, format=suffix, dpi=150)
    return buffer.getvalue()


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    options = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in ("paths.results", "metric"):
            raise ConfigError(f"option {argument!r} is not one of paths.results=DIR, metric=NAME")
        options[key] = value
    if options.get("metric", "perplexity") not in METRICS:
        raise ConfigError(f"metric={options['metric']}: choose one of {', '.join(METRICS)}")
    return options


def _machine(record: RunRecord) -> str:
    return f"{hardware_name(record)}, {machine_in_words(record)}"


def _is_type(record: RunRecord) -> bool:
    return record.card.get("taxonomy") == FAMILY


def _point(record: RunRecord, measurement: Measurement) -> Point:
    name = str(record.card.get("name"))
    title = SYSTEMS[name].title if name in SYSTEMS else str(record.card.get("title", name))
    size = ((record.config.get("method") or {}).get("grid") or {}).get("group_size")
    stored = record.value("stored_bytes")
    if stored is None:
        raise ConfigError(f"record {record.id} has no stored_bytes; its evaluation must have the footprint probe")
    line = title if size is None else f"{title}{BLOCKS}{size}"
    bits = record.bits or 16
    return Point(record.model, line, bits, 8 * stored, measurement.value, measurement.interval, record.id)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
