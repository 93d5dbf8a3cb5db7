"""Records go to Weights & Biases, offline unless asked otherwise, or nowhere.

A tracker is a sink: tables and reports are made from records, never from what is logged here. So a tracker never
prompts and never fails a run; whatever goes wrong is one line of warning. What leaves for W&B is the record with its
secrets masked, no command line, no name of the machine.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from harness.records import Measurement, RunRecord, from_json, to_json, write_json_atomically
from harness.redaction import redact
from harness.taxonomy import DENSE, placement, table_of_group

if TYPE_CHECKING:
    import wandb

PROJECT = "llm-inference-harness"  # as in conf/tracker/wandb.yaml
MODES = ("offline", "online", "disabled")
SLACK_SECONDS = 60.0  # beyond its own limits, before W&B's process counts as stuck and is killed
REACH_SECONDS = 5.0  # for one answer of the server before a run is logged offline instead
OUTCOME_SUFFIXES = (".parquet", ".csv", ".json", ".jsonl")  # what the paired tests read; no cached tensors
OUTCOME_BYTES_LIMIT = 50_000_000  # per run
TABLE = "measurements"  # what the table of each run is called in W&B
CURVE_STEP = "curve_step"  # the axis of learning curves: what their own steps are
COMPARED = ("perplexity", "accuracy", "time_per_output_token_ms")  # numbers whose protocol runs are filtered by

_failed_servers: set[str] = set()  # of this process: a sweep waits for a broken server once, not at every run


class Tracker(Protocol):
    """Where a record is shown besides the results folder."""

    def log(self, record: RunRecord, folder: Path) -> str | None:
        """Log one record. Returns where it can be looked at, or None. Never raises for what goes wrong outside.

        folder: the results folder, which `record.samples` is relative to.
        """


@dataclass(frozen=True)
class NoTracker:
    """Logs nothing."""

    group: str | None = None  # taken like every tracker's, and not used

    def log(self, record: RunRecord, folder: Path) -> str | None:
        """Nothing."""
        return None


@dataclass(frozen=True)
class WandbTracker:
    """One W&B run per record, its id the record's, so that a run made again continues its own page.

    mode: "offline" writes files that `make wandb-sync` uploads later; "online" uploads now, where the server answers
        and a key is configured, else falls back to offline. The environment variable WANDB_MODE overrides it.
    group: id of the sweep; runs with the same one stand together.
    init_seconds, finish_seconds: what starting a run and uploading it may take before it is logged offline instead.

    WANDB_RUN_ID, which a sweep agent sets, is obeyed. W&B's caches stay below the results folder, unless
    WANDB_DATA_DIR, WANDB_CACHE_DIR or WANDB_CONFIG_DIR say otherwise.
    """

    project: str
    entity: str | None = None
    mode: Literal["offline", "online", "disabled"] = "offline"
    group: str | None = None
    init_seconds: float = 30.0
    finish_seconds: float = 60.0

    def log(self, record: RunRecord, folder: Path) -> str | None:
        """The run's page when online, its folder when offline, None when disabled or when it went wrong."""
        try:
            with quiet_environment(folder):
                return self._log(from_json(to_json(record)), folder)
        except Exception as error:  # a sink must not fail what it drains, whatever a third party's SDK raises
            _let_go()
            warn(f"{record.id} is not in W&B: {type(error).__name__}: {error}")
            return None

    def _log(self, record: RunRecord, folder: Path) -> str | None:
        mode = _requested_mode(self.mode)
        if mode == "disabled":
            return None
        if mode == "online":
            hindrance = obstacle()
            if not hindrance:
                try:
                    return self._written(record, folder, "online")
                except Exception as error:  # see log
                    _failed_servers.add(_server())
                    _let_go()
                    hindrance = f"W&B did not take it ({type(error).__name__}: {error})"
            warn(f"{record.id} is logged offline, `make wandb-sync` uploads it later: {hindrance}")
        return self._written(record, folder, "offline")

    def _written(self, record: RunRecord, folder: Path, mode: str) -> str:
        with _ended_after(self.init_seconds + self.finish_seconds + SLACK_SECONDS):
            run = self._start(record, folder, mode)
            try:
                _draw(run, record)
                run.log({TABLE: _table(record)})
                run.summary.update(summary(record))
                _attach(run, record, folder)
            finally:
                run.finish(exit_code=0 if record.status == "finished" else 1)
        return run.url if mode == "online" else str(Path(run.dir).parent)

    def _start(self, record: RunRecord, folder: Path, mode: str) -> wandb.Run:
        import wandb

        return wandb.init(
            mode=mode,
            project=self.project,
            entity=self.entity,
            id=os.environ.get("WANDB_RUN_ID") or record.id,
            name=" ".join(filter(None, [str(record.card.get("name")), _bits(record), record.id])),
            group=self.group,
            job_type="baseline" if record.card.get("name") == DENSE.name else "method",
            tags=tags(record),
            config=flat_config(record),
            dir=str(folder / "scratch"),
            resume="allow",
            reinit="create_new",  # whoever uses us may have a run of their own open
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
                host="",
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
                init_timeout=self.init_seconds,
                finish_timeout=self.finish_seconds,
                finish_timeout_raises=True,
            ),
        )


def flat_config(record: RunRecord) -> dict[str, Any]:
    """The configuration as scalars under names without dots, which W&B can filter and group by.

    `table`, `family` and `category` are the survey's; `perplexity_on` and its like are the protocols of the numbers
    that `summary` has under their plain names: runs compare where these are equal.
    """
    group = placement(str(record.card.get("name")), str(record.card.get("taxonomy", "")))
    family, _, category = (group.key if group else str(record.card.get("taxonomy", ""))).partition("/")
    first = {m.metric: m.on for m in reversed(record.measurements)}
    headline = {
        "method": record.card.get("name"),
        "title": record.card.get("title"),
        "table": table_of_group(group).name if group else None,
        "family": family,
        "category": category,
        "bits": record.bits,
        "activation_bits": record.card.get("activation_bits"),
        "key_value_bits": record.card.get("key_value_bits"),
        "model": record.model,
        "hardware": (record.config.get("hardware") or {}).get("name"),
        "machine": machine_in_words(record),
        "engine": (record.config.get("engine") or {}).get("name", "transformers"),
        "record": record.id,
        "commit": (record.environment.get("source") or {}).get("commit"),
        **{f"{metric}_on": first[metric] for metric in COMPARED if metric in first},
    }
    details = {section: values for section, values in record.config.items() if section not in ("card", "tracker")}
    return dict(_leaves(details)) | headline


def machine_in_words(record: RunRecord) -> str | None:
    """What the machine computes with: its first GPU, or else its processor."""
    machine = record.environment.get("machine") or {}
    return next(iter([*machine.get("gpus", []), machine.get("processor")]), None) if isinstance(machine, dict) else None


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}_{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield flat_name(name), ", ".join(map(str, value))
    else:
        yield flat_name(name), value


def summary(record: RunRecord) -> dict[str, Any]:
    """Every number under a flat name made of its metric and `on`, with the ends of its interval, and how it ended.

    The first number of each metric, which tables show where they show one, has the metric's name as well.
    """
    numbers: dict[str, Any] = {"status": record.status}
    if record.failure:
        numbers |= {"failed_stage": record.failure.stage, "failure_reason": record.failure.reason}
    for measurement in record.measurements:
        for name in dict.fromkeys((flat_name(measurement.metric), metric_name(measurement))):
            if name in numbers or measurement.value is None:
                continue
            numbers[name] = measurement.value
            if measurement.interval is not None:
                numbers[f"{name}_low"], numbers[f"{name}_high"] = measurement.interval
    return numbers


def metric_name(measurement: Measurement) -> str:
    """Letters, digits and underscores: "perplexity_wikipedia_sample_evaluation_gptq_512_16_windows"."""
    return flat_name(f"{measurement.metric} {measurement.on}")


def flat_name(text: str) -> str:
    """Small letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def tags(record: RunRecord) -> list[str]:
    """Method, bits, family, category and status; W&B takes tags of up to 64 characters."""
    config = flat_config(record)
    words = [str(config["method"] or ""), _bits(record), config["family"], config["category"], record.status]
    return [word[:64] for word in dict.fromkeys(words) if word]


def _bits(record: RunRecord) -> str:
    return "" if record.bits is None else f"{record.bits:g}bit"


def _table(record: RunRecord) -> wandb.Table:
    """Every measurement as a row."""
    import wandb

    columns = ["metric", "value", "low", "high", "unit", "on", "better", "note"]
    rows = [
        [m.metric, m.value, *(m.interval or (None, None)), m.unit, m.on, m.better, m.note] for m in record.measurements
    ]
    return wandb.Table(columns=columns, data=rows)


def _draw(run: wandb.Run, record: RunRecord) -> None:
    """Learning curves as line charts, all over one axis, so that those of all blocks fit into one chart."""
    for name, points in record.curves.items():
        key = flat_name(name)
        run.define_metric(key, step_metric=CURVE_STEP)
        for step, value in points:
            run.log({key: value, CURVE_STEP: step})


def _attach(run: wandb.Run, record: RunRecord, folder: Path) -> None:
    """Put the record and the outcomes behind its paired tests into the run's own folder.

    An artifact is staged outside of it, as W&B's tables are, and `wandb sync` of a run whose staged bytes are gone
    reports success without them (harness.wandb_sync refuses); files in the run's folder travel with it.
    """
    place = Path(run.dir)
    write_json_atomically(to_json(record), place / "record.json")
    run.save(str(place / "record.json"), base_path=str(place), policy="end")
    source = folder / record.samples if record.samples else None
    if source is None or not source.is_dir():
        return
    files = sorted(p for p in source.rglob("*") if p.is_file() and p.suffix in OUTCOME_SUFFIXES)
    size = sum(file.stat().st_size for file in files)
    if size > OUTCOME_BYTES_LIMIT:
        limit = OUTCOME_BYTES_LIMIT / 1e6
        warn(f"outcomes of {record.id} stay in {source}: {size / 1e6:.0f} MB, more than the {limit:.0f} that W&B gets")
        return
    for file in files:
        copy = place / "samples" / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        run.save(str(copy), base_path=str(place), policy="end")


def _requested_mode(mode: str) -> str:
    asked = os.environ.get("WANDB_MODE") or mode
    known = {"dryrun": "offline", "run": "online"}.get(asked, asked)
    if known not in MODES:
        warn(f"W&B mode {asked!r} is not one of {', '.join(MODES)}; offline is taken")
        return "offline"
    return known


def obstacle() -> str:
    """Why nothing can be uploaded now, or nothing. Found out before the SDK would wait or prompt."""
    import urllib.error
    import urllib.request

    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']} forbids it"
    if not wandb.login(prompt=False, verify=False):
        return "W&B has no key (set WANDB_API_KEY, or run `wandb login`)"
    server = _server()
    if server in _failed_servers:
        return f"W&B at {server} failed before"
    try:
        urllib.request.urlopen(server, timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return ""  # it answered
    except (OSError, ValueError) as error:
        return f"W&B at {server} does not answer ({error})"
    return ""


def _server() -> str:
    import wandb

    return wandb.setup().settings.base_url


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Kill the SDK's own process when this takes longer: a call that waits for it, for ever, then raises."""
    timer = threading.Timer(seconds, _kill_service)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _kill_service() -> None:
    import psutil

    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
            if child.name().startswith("wandb-core"):
                child.kill()


def _let_go() -> None:
    """End the SDK's own process, which may be dead or stuck: the next run starts another."""
    import wandb

    try:
        wandb.teardown()
    except (
        Exception,
        SystemExit,
    ) as error:  # what is dead cannot be told to end; the SDK may even exit with its status
        warn(f"W&B's process is gone ({type(error).__name__}: {error})")


@contextmanager
def quiet_environment(results: Path) -> Iterator[None]:
    """W&B's caches below the results folder and no output, while it is used; what the user has set stays."""
    folder = results / "scratch" / "wandb"
    wanted = {
        "WANDB_DATA_DIR": str(folder / "data"),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_CONFIG_DIR": str(folder / "config"),
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",  # without it the SDK also sends how it fares, and waits for that at the end
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def warn(message: str) -> None:
    """One line, its secrets masked, on standard error."""
    line = redact(re.sub(r"\s+", " ", message))
    print(f"warning: {line}", file=sys.stderr, flush=True)
