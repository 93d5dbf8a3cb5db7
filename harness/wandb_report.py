"""A W&B report and workspaces that mirror the tables, made as code from the records.

    python -m harness.wandb_report                       one report, and one saved view for each table
    python -m harness.wandb_report spec=FILE             their specification as JSON; no server is asked
    python -m harness.wandb_report project=P entity=E    of another project

Blocks are those of the tables: rows that may be compared. Each has its table in words from the records, and panels
over the W&B runs with the same model, machine and protocol, a set of runs for each group of the survey's. Panels are
live: a run that is logged later and fits appears in them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import tracking
from harness.errors import ConfigError
from harness.options import parsed, results_folder
from harness.records import RunRecord, read_records, write_json_atomically
from harness.taxonomy import DENSE, TABLES, Group, Table, placement
from harness.tracking import CURVE_STEP, TABLE, flat_config, flat_name, metric_name

if TYPE_CHECKING:
    from wandb_workspaces.expr import FilterExpr
    from wandb_workspaces.reports.v2 import Runset
    from wandb_workspaces.reports.v2.interface import Panel

TITLE = "LLM inference optimizations"
SAME = ("model", "hardware", "machine", "engine", "perplexity_on", "accuracy_on")  # in all runs of one block
PLAIN = re.compile(r"[^'\"\\<>=\s]+(?: [^'\"\\<>=\s]+)*")  # a value that is safe inside an expression
COLUMNS = (
    "config:method.value",
    "config:bits.value",
    "summary:perplexity",
    "summary:perplexity_ratio",
    "summary:effective_bits_per_weight",
    "summary:time_per_output_token_ms",
)
LEGEND = "${config:title} ${config:bits}"
WIDTH, HEIGHT = 12, 8  # of a panel; W&B's grid is 24 wide
MOST_CURVES = 6  # panels of learning curves in one block
HELP = f"""Make a W&B report and workspaces from the records, mirroring tables I to IV.

usage: python -m harness.wandb_report [OPTION=VALUE ...]

options
  paths.results=DIR   where records/ is read (default: results)
  project=NAME        where the runs are (default: {tracking.PROJECT})
  entity=NAME         the user or team (default: that of the key)
  title=TEXT          of the report (default: {TITLE})
  model=NAME[,NAME]   records of these models alone
  spec=FILE           write the specification as JSON instead; no server is asked and no key is needed

Made again, the same report and views are replaced. Runs must be in W&B: tracker.mode=online, or make wandb-sync.
"""
OPTIONS = ("paths.results", "project", "entity", "title", "model", "spec")
INSTALL = 'reports need wandb-workspaces: pip install "llm-inference-harness[wandb]" (in a checkout: -e ".[wandb]")'


@dataclass(frozen=True)
class Shown:
    """One block of a table: records that may be compared, dense first where there is one."""

    table: Table
    records: tuple[RunRecord, ...]

    def has(self, metric: str) -> bool:
        """Whether any of the records has a number of this metric."""
        return any(record.value(metric) is not None for record in self.records)

    def key(self, metric: str) -> str:
        """The summary key of a metric: that of its protocol, or the plain one where rows differ in what it is on."""
        first = [found for record in self.records if (found := record.find(metric)) is not None]
        names = {metric_name(measurement) for measurement in first}
        return names.pop() if len(names) == 1 else flat_name(metric)


def blocks_shown(records: Iterable[RunRecord]) -> list[Shown]:
    """Blocks of every table that has any, in print order."""
    from harness import tables

    shown = []
    records = list(records)
    for table in TABLES:
        rows = [r for r in records if _name(r) == DENSE.name or _group(r) in table.groups]
        for block in tables.comparable(rows):
            if any(_name(record) != DENSE.name for record in block):
                shown.append(Shown(table, tuple(block)))
    return shown


def _name(record: RunRecord) -> str:
    return str(record.card.get("name", ""))


def _group(record: RunRecord) -> Group | None:
    return placement(_name(record), str(record.card.get("taxonomy", "")))


def same(shown: Shown) -> list[FilterExpr]:
    """Conditions that the runs of a block meet: what its records have in common, or else that they are these.

    The library writes conditions as an expression and reads it again without escaping, so that a value with a quote
    or a comparison in it would become another condition. Such a block is held by the ids of its records.
    """
    from wandb_workspaces.expr import Config

    configs = [flat_config(record) for record in shown.records]
    found = {key: {config[key] for config in configs if config.get(key) is not None} for key in SAME}
    common = {key: values.pop() for key, values in found.items() if len(values) == 1}
    if all(PLAIN.fullmatch(str(value)) for value in common.values()):
        return [Config(key) == value for key, value in common.items()]
    return [Config("record").isin(sorted(record.id for record in shown.records))]


def runsets(shown: Shown, where: dict[str, str]) -> list[Runset]:
    """A set of runs for each of the survey's groups in the block, filtered by taxonomy, and one for dense.

    where: entity and project of the runs; empty for those of the report, which asks no server.
    """
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.expr import And, Config

    sets = []
    if any(_name(record) == DENSE.name for record in shown.records):
        sets.append(("Dense", [Config("method") == DENSE.name]))
    for group in shown.table.groups:
        if any(_group(record) == group for record in shown.records):
            family, _, category = group.key.partition("/")
            sets.append((group.title, [Config("family") == family, Config("category") == category]))
    order = wr.OrderBy(wr.SummaryMetric(quality(shown) or "status"), ascending=True)
    return [
        wr.Runset(**where, name=name, filters=And(*chosen, *same(shown)), order=[order], pinned_columns=list(COLUMNS))
        for name, chosen in sets
    ]


def quality(shown: Shown) -> str | None:
    """The number that says what was lost: against dense where there is one, else as measured."""
    candidates = ("perplexity_ratio", "stream_perplexity_ratio", "perplexity", "accuracy")
    return next((metric for metric in candidates if shown.has(metric)), None)


def panels(shown: Shown) -> list[Panel]:
    """Bars of quality and latency, quality against size, latency and memory, learning curves: those with numbers."""
    import wandb_workspaces.reports.v2 as wr

    loss = quality(shown)
    made: list[Panel] = []

    def bars(metric: str, title: str) -> None:
        if shown.has(metric):
            made.append(
                wr.BarPlot(
                    title=title,
                    metrics=[wr.SummaryMetric(shown.key(metric))],
                    legend_template=LEGEND,
                    max_bars_to_show=100,
                )
            )

    def against(metric: str, title: str) -> None:
        """Quality against a cost; the running minimum is the front of those that nothing beats in both."""
        if loss and shown.has(metric):
            better_low = loss != "accuracy"
            made.append(
                wr.ScatterPlot(
                    title=title,
                    x=wr.SummaryMetric(shown.key(metric)),
                    y=wr.SummaryMetric(shown.key(loss)),
                    z=wr.Config("bits"),
                    log_y=better_low,
                    running_ymin=better_low,
                    running_ymax=not better_low,
                    legend_template=LEGEND,
                )
            )

    words = {"perplexity_ratio": "perplexity, times dense", "stream_perplexity_ratio": "perplexity of a long stream"}
    lost = words.get(loss or "", loss)
    if loss:
        bars(loss, f"{lost}, by method and bits")
    against("effective_bits_per_weight", f"{lost}, against effective bits per weight")
    bars("time_per_output_token_ms", "time per output token (ms), by method and bits")
    against("time_per_output_token_ms", f"{lost}, against time per output token (ms)")
    against("stored_bytes", f"{lost}, against bytes stored")
    if loss != "accuracy":
        bars("accuracy", "accuracy, by method and bits")
    bars("compress_seconds", "seconds to compress, by method and bits")
    for pattern, title in curves(shown):
        made.append(wr.LinePlot(title=title, x=wr.Metric(CURVE_STEP), metric_regex=pattern, legend_template=LEGEND))
    for place, panel in enumerate(made):
        panel.layout = wr.Layout(x=WIDTH * (place % 2), y=HEIGHT * (place // 2), w=WIDTH, h=HEIGHT)
    return made


def curves(shown: Shown) -> list[tuple[str, str]]:
    """Learning curves as (regular expression of names in W&B, title); those that differ in a number share a panel."""
    found: dict[str, str] = {}
    for record in shown.records:
        for name, points in record.curves.items():
            if len(points) > 1:
                pattern = re.sub(r"\d+", "[0-9]+", flat_name(name))
                found.setdefault(f"^{pattern}$", re.sub(r"\d+", "…", name))
    whole_models_first = sorted(found.items(), key=lambda entry: ("…" in entry[1], "loss" not in entry[1], entry[1]))
    return whole_models_first[:MOST_CURVES]


def report(shown: Sequence[Shown], entity: str, project: str, title: str, online: bool) -> Any:
    """The report: for each table its blocks in words and in panels, then what failed.

    online: whether runs name their project, which W&B must then know.
    """
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.expr import And, Metric

    from harness import tables
    from harness.table_formats import to_markdown

    where = {"entity": entity, "project": project} if online else {}
    blocks: list[Any] = [
        wr.P("Made from the records by python -m harness.wandb_report. Numbers in one block compare; blocks do not."),
        wr.TableOfContents(),
    ]
    previous = None
    for block in shown:
        if block.table is not previous:
            blocks.append(wr.H1(f"Table {block.table.number}: {block.table.title}"))
            previous = block.table
        (written,) = tables.blocks_of(block.table, block.records)
        blocks += [
            wr.MarkdownBlock(to_markdown("", [written])),
            wr.PanelGrid(runsets=runsets(block, where), panels=panels(block)),
        ]
    failed = wr.Runset(**where, name="failed", filters=And(Metric("State") == "failed"))
    failed.pinned_columns = ["config:method.value", "config:bits.value", "summary:failure_reason"]
    blocks += [wr.H1("Every number"), wr.PanelGrid(runsets=[wr.Runset(**where)], panels=[_all_numbers()])]
    blocks += [wr.H1("What failed"), wr.PanelGrid(runsets=[failed])]
    number = sum(len(block.records) for block in shown)
    return wr.Report(
        entity=entity,
        project=project,
        title=title[:128],
        description=f"{number} rows of {len(shown)} blocks, in the order of the survey's tables",
        width="fluid",
        blocks=blocks,
    )


def _all_numbers() -> Panel:
    import wandb_workspaces.reports.v2 as wr

    return wr.WeavePanelSummaryTable(table_name=TABLE, layout=wr.Layout(x=0, y=0, w=2 * WIDTH, h=2 * HEIGHT))


def workspaces(shown: Sequence[Shown], entity: str, project: str) -> Iterator[Any]:
    """A saved view for each table: the runs of its largest block, with the panels of the report in sections."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.expr import And, Config, Or

    for table in dict.fromkeys(block.table for block in shown):
        block = max((b for b in shown if b.table is table), key=lambda b: len(b.records))
        of_table = Or(Config("table") == table.name, Config("method") == DENSE.name)
        chosen = And(of_table, *same(block))
        drawn = panels(block)
        curved = [panel for panel in drawn if isinstance(panel, wr.LinePlot)]
        sections = [
            ws.Section(name="Quality, size and speed", panels=[p for p in drawn if p not in curved], is_open=True),
            *([ws.Section(name="Learning curves", panels=curved, is_open=True)] if curved else []),
            ws.Section(name="Every number", panels=[_all_numbers()]),
        ]
        yield ws.Workspace(
            entity=entity,
            project=project,
            name=f"Table {table.number}: {table.title}",
            sections=sections,
            runset_settings=ws.RunsetSettings(
                filters=chosen, groupby=[ws.Config("category")], pinned_columns=list(COLUMNS)
            ),
        )


def specification(shown: Sequence[Shown], project: str, title: str, entity: str = "") -> dict[str, Any]:
    """What `publish` would send, as plain JSON values. Asks no server.

    The library has no public way to this; its own conversion is used here and in no other place.
    """
    made = report(shown, entity or "entity", project, title, online=False)._to_model()
    views = [view._to_model() for view in workspaces(shown, entity or "entity", project)]
    dumped = [json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)) for model in (made, *views)]
    return {
        "report": {"title": made.display_name, "spec": dumped[0]},
        "workspaces": [{"name": view.display_name, "spec": spec} for view, spec in zip(views, dumped[1:], strict=True)],
    }


def publish(shown: Sequence[Shown], entity: str, project: str, title: str, known: dict[str, str]) -> dict[str, str]:
    """Save the report and the views in W&B and return where each is, by title.

    known: where they were saved before; what is still there is replaced.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    made = report(shown, entity, project, title, online=True)
    before = _before(wr.Report, known.get(made.title))
    if before is not None:
        made.id = before.id
    places = {made.title: made.save().url}
    for view in workspaces(shown, entity, project):
        before = _before(ws.Workspace, known.get(view.name))
        if before is not None:
            view._internal_name, view._internal_id = before._internal_name, before._internal_id
        places[view.name] = view.save().url
    return places


def _before(kind: Any, url: str | None) -> Any:
    """What was saved at the address, or None when it is not there any more."""
    if url is None:
        return None
    try:
        return kind.from_url(url)
    except Exception as error:  # deleted, or of another version: the library has no error of its own for either
        print(f"not replaced, made anew: {url} ({type(error).__name__})", file=sys.stderr)
        return None


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; 1 when W&B did not take it; 2 when nothing can be made or for what was typed wrong."""
    if {"--help", "-h"} & set(arguments):
        print(HELP)
        return 0
    try:
        options = parsed(arguments, OPTIONS)
        results = results_folder(options)
        shown = blocks_shown(_records(results, options.get("model", "")))
        _check_library()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    project, title = options.get("project", tracking.PROJECT), options.get("title", TITLE)
    if "spec" in options:
        place = Path(options["spec"])
        write_json_atomically(specification(shown, project, title, options.get("entity", "")), place)
        print(f"written: {place}")
        return 0
    return _online(shown, results, options.get("entity"), project, title)


def _records(results: Path, models: str) -> list[RunRecord]:
    try:
        records = [record for _, record in read_records(results)]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    wanted = [name for name in models.split(",") if name]
    records = [record for record in records if not wanted or record.model in wanted]
    if not records:
        raise ConfigError(f"no record{f' of {models}' if models else ''} below {results / 'records'}")
    return records


def _check_library() -> None:
    from importlib.util import find_spec

    if find_spec("wandb_workspaces") is None:
        raise ConfigError(INSTALL)


def _online(shown: Sequence[Shown], results: Path, entity: str | None, project: str, title: str) -> int:
    with tracking.quiet_environment(results):
        hindrance = tracking.obstacle()
        if hindrance:
            print(f"error: {hindrance}; nothing was made. spec=FILE writes what it would be", file=sys.stderr)
            return 2
        import wandb

        try:
            entity = entity or wandb.Api().default_entity
            kept = results / "scratch" / "wandb" / "reports.json"
            known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
            here = f"{wandb.setup().settings.base_url}/{entity}/{project}"
            places = publish(shown, entity, project, title, known.get(here, {}))
            write_json_atomically({**known, here: {**known.get(here, {}), **places}}, kept)
        except Exception as error:  # whatever the SDK raises for a server that breaks
            tracking.warn(f"W&B did not take it: {type(error).__name__}: {error}")
            return 1
    print("\n".join(f"{name}: {place}" for name, place in places.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
