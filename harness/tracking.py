"""Records go to Weights & Biases, offline unless asked otherwise, or nowhere.

A tracker is a sink: tables and reports are made from records, never from what is logged here. So a tracker never
prompts and never fails a run; whatever goes wrong is one line of warning.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from harness.records import Measurement, RunRecord, to_json, write_json_atomically

if TYPE_CHECKING:
    import wandb

MODES = ("offline", "online", "disabled")
REACH_SECONDS = 5.0  # for one answer of the server before a run is logged offline instead
OUTCOME_SUFFIXES = (".parquet", ".csv", ".json", ".jsonl")  # what the paired tests read; no cached tensors
OUTCOME_BYTES_LIMIT = 50_000_000  # per run


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

    mode: "offline" writes files that `wandb sync` uploads later; "online" uploads now, where the server answers and
        a key is configured, else falls back to offline. The environment variable WANDB_MODE overrides it.
    group: id of the sweep; runs with the same one stand together.

    WANDB_RUN_ID, which a sweep agent sets, is obeyed. W&B's caches stay below the results folder, unless
    WANDB_DATA_DIR, WANDB_CACHE_DIR or WANDB_CONFIG_DIR say otherwise.
    """

    project: str
    entity: str | None = None
    mode: Literal["offline", "online", "disabled"] = "offline"
    group: str | None = None

    def log(self, record: RunRecord, folder: Path) -> str | None:
        """The run's page when online, its folder when offline, None when disabled or when it went wrong."""
        try:
            with _quiet_environment(folder / "scratch" / "wandb"):
                return self._log(record, folder)
        except Exception as error:  # a sink must not fail what it drains, whatever a third party's SDK raises
            _warn(f"{record.id} is not in W&B: {type(error).__name__}: {error}")
            return None

    def _log(self, record: RunRecord, folder: Path) -> str | None:
        mode = _requested_mode(self.mode)
        if mode == "disabled":
            return None
        if mode == "online":
            obstacle = _obstacle()
            if obstacle:
                _warn(f"{obstacle}; {record.id} is logged offline, upload it later with `wandb sync`")
                mode = "offline"
        run = self._start(record, folder, mode)
        try:
            _draw(run, record)
            run.summary.update(summary(record))
            _attach(run, record, folder)
        finally:
            run.finish(exit_code=0 if record.status == "finished" else 1)
        return run.url if mode == "online" else str(Path(run.dir).parent)

    def _start(self, record: RunRecord, folder: Path, mode: str) -> wandb.Run:
        import wandb

        settings = {
            "project": self.project,
            "entity": self.entity,
            "id": os.environ.get("WANDB_RUN_ID") or record.id,
            "name": f"{record.card.get('name')} {_bits(record)} {record.id}".replace("  ", " "),
            "group": self.group,
            "job_type": "run",
            "tags": tags(record),
            "config": flat_config(record),
            "dir": str(folder / "scratch"),
            "resume": "allow",
            "reinit": "create_new",  # whoever uses us may have a run of their own open
            "settings": wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
                x_save_requirements=False,
                init_timeout=30,
                finish_timeout=60,
            ),
        }
        if mode == "online":
            try:
                return wandb.init(mode="online", **settings)
            except wandb.errors.Error as error:
                _warn(f"W&B did not take {record.id} ({error}); it is logged offline, upload it with `wandb sync`")
        return wandb.init(mode="offline", **settings)


def flat_config(record: RunRecord) -> dict[str, Any]:
    """The configuration as scalars under names without dots, which W&B can filter and group by."""
    family, _, category = str(record.card.get("taxonomy", "")).partition("/")
    headline = {
        "method": record.card.get("name"),
        "title": record.card.get("title"),
        "family": family,
        "category": category,
        "bits": record.bits,
        "activation_bits": record.card.get("activation_bits"),
        "model": record.model,
        "hardware": (record.config.get("hardware") or {}).get("name"),
        "record": record.id,
        "commit": (record.environment.get("source") or {}).get("commit"),
    }
    sections = ("method", "model", "hardware", "corpus", "calibration", "evaluation", "seed")
    details = {section: record.config[section] for section in sections if section in record.config}
    return dict(_leaves(details)) | headline


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}_{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield _flat_name(name), ", ".join(map(str, value))
    else:
        yield _flat_name(name), value


def summary(record: RunRecord) -> dict[str, Any]:
    """Every number under a flat name made of its metric and `on`, with the ends of its interval, and how it ended."""
    numbers: dict[str, Any] = {"status": record.status}
    if record.failure:
        numbers |= {"failed_stage": record.failure.stage, "failure_reason": record.failure.reason}
    for measurement in record.measurements:
        name = metric_name(measurement)
        if measurement.value is not None:
            numbers[name] = measurement.value
        if measurement.interval is not None:
            numbers[f"{name}_low"], numbers[f"{name}_high"] = measurement.interval
    return numbers


def metric_name(measurement: Measurement) -> str:
    """Letters, digits and underscores: "perplexity_wikipedia_sample_evaluation_gptq_512_16_windows"."""
    return _flat_name(f"{measurement.metric} {measurement.on}")


def _flat_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def tags(record: RunRecord) -> list[str]:
    """Method, bits, family and status; W&B takes tags of up to 64 characters."""
    family = str(record.card.get("taxonomy", "")).partition("/")[0]
    words = [str(record.card.get("name", "")), _bits(record), family, record.status]
    return [word[:64] for word in dict.fromkeys(words) if word]


def _bits(record: RunRecord) -> str:
    return "" if record.bits is None else f"{record.bits:g}bit"


def _draw(run: wandb.Run, record: RunRecord) -> None:
    """Learning curves as line charts: each over a step of its own."""
    for name, points in record.curves.items():
        key = _flat_name(name)
        run.define_metric(f"{key}_step", hidden=True)
        run.define_metric(key, step_metric=f"{key}_step")
        for step, value in points:
            run.log({key: value, f"{key}_step": step})


def _attach(run: wandb.Run, record: RunRecord, folder: Path) -> None:
    """Put the record and the outcomes behind its paired tests into the run's own folder.

    An artifact would be staged outside of it, and `wandb sync` of a run whose staged bytes are gone reports success
    without them; files in the run's folder travel with it.
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
        _warn(f"outcomes of {record.id} stay in {source}: {size / 1e6:.0f} MB, more than the {limit:.0f} that W&B gets")
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
        _warn(f"W&B mode {asked!r} is not one of {', '.join(MODES)}; offline is taken")
        return "offline"
    return known


def _obstacle() -> str:
    """Why nothing can be uploaded now, or nothing. Found out before the SDK would wait or prompt."""
    import urllib.error
    import urllib.request

    import wandb

    if not wandb.login(prompt=False, verify=False):
        return "W&B has no key (set WANDB_API_KEY, or run `wandb login`)"
    server = wandb.setup().settings.base_url
    try:
        urllib.request.urlopen(server, timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return ""  # it answered
    except (OSError, ValueError) as error:
        return f"W&B at {server} does not answer ({error})"
    return ""


@contextmanager
def _quiet_environment(folder: Path) -> Iterator[None]:
    """W&B's caches below `folder` and no output, for as long as it is used; what the user has set stays."""
    wanted = {
        "WANDB_DATA_DIR": str(folder / "data"),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_CONFIG_DIR": str(folder / "config"),
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _warn(message: str) -> None:
    line = re.sub(r"\s+", " ", message)
    print(f"warning: {line}", file=sys.stderr, flush=True)
