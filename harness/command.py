"""The command that makes one record, from the command of the sweep that made many."""

from __future__ import annotations

import re
import shlex
from functools import lru_cache
from typing import Any

from harness.records import RunRecord

LOCAL = ("paths.", "tracker", "force", "timing", "hydra")  # say where and how, not what


def single_command(record: RunRecord) -> str:
    """`python -m harness ...` for this record alone: of every value that was swept, the one that it has.

    Overrides that only say where results go are left out. A value that cannot be told is taken from the record's own
    card and bits; `python -m harness.verify ID` always runs the very same configuration. An experiment is named where
    it sets more than what is swept.
    """
    swept = dict(_swept(record.command))
    experiment = next(iter(swept.pop("experiment", [])), None)
    sweeps, sets_more = _experiment(experiment) if experiment else ({}, False)
    overrides: dict[str, str] = {}
    for key, values in (sweeps | swept).items():
        chosen = _chosen(record, key.lstrip("+"), values)
        if chosen is not None:
            overrides[key] = chosen
    overrides.pop("method", None)
    named = {"method": _method(record)}
    for key in ("bits", "sparsity"):
        typed = overrides.pop(key, None)
        if record.config.get(key) is not None and _uses(record, key):
            named[key] = typed or f"{record.config[key]}"
    for group in ("model", "hardware"):
        name = (record.config.get(group) or {}).get("name")
        if group not in overrides and name:
            named[group] = str(name)
    first = {"experiment": experiment} if sets_more else {}
    words = [f"{key}={value}" for key, value in {**first, **named, **overrides}.items()]
    return shlex.join(["python", "-m", "harness", *words])


@lru_cache(maxsize=1024)  # the records of a sweep share its command
def _swept(command: str) -> list[tuple[str, list[str]]]:
    """Overrides that say what was run, each with its values."""
    parts = (word.partition("=") for word in shlex.split(command)[3:])
    return [(key, _values(value)) for key, equals, value in parts if equals and not key.startswith(LOCAL)]


@lru_cache
def _experiment(name: str) -> tuple[dict[str, list[str]], bool]:
    """What an experiment sweeps, and whether it sets anything else; one that is not here may."""
    from omegaconf import OmegaConf

    from harness.run import CONF

    file = CONF / "experiment" / f"{name}.yaml"
    if not file.is_file():
        return {}, True
    settings = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    sweeps = settings.pop("hydra", {}).get("sweeper", {}).get("params", {})
    return {key: _values(str(values)) for key, values in sweeps.items()}, bool(settings)


def _method(record: RunRecord) -> str:
    name = str(record.card.get("name", ""))
    return f"[{name.replace('+', ',')}]" if "+" in name else name


def _uses(record: RunRecord, key: str) -> bool:
    """Whether the run depends on this root value: its card names bits, its method has a sparsity."""
    if key == "bits":
        return record.bits is not None
    return f"'{key}': {record.config[key]!r}" in str(record.config.get("method"))


def _values(text: str) -> list[str]:
    """Values of a sweep: split at commas outside brackets and quotes."""
    parts = re.findall(r"(?:[^,\[\](){}'\"]|\[[^\]]*\]|\([^)]*\)|\{[^}]*\}|'[^']*'|\"[^\"]*\")+", text)
    return [part.strip() for part in parts] or [text]


def _chosen(record: RunRecord, key: str, values: list[str]) -> str | None:
    """The value of this key that the record has; None where that cannot be told."""
    if len(values) == 1 and not re.match(r"\w+\(", values[0]):
        return values[0]
    found = _looked_up(record.config, key.partition("@")[2] or key)
    if isinstance(found, dict):
        found = found.get("name")
    return next((value for value in values if found is not None and _same(value, found)), None)


def _looked_up(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _same(text: str, value: Any) -> bool:
    if isinstance(value, bool) or value is None:
        return text.lower() == {None: "null"}.get(value, str(value).lower())
    if isinstance(value, int | float):
        try:
            return float(text) == float(value)
        except ValueError:
            return False
    return text.strip("'\"") == str(value)
