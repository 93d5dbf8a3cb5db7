"""What a sweep did: each job leaves its outcome in a file, and the end reads them all.

Files rather than memory, because some launchers run jobs in other processes or on other machines.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from harness import launching, markup, slurm_queue
from harness.environment import process_rank
from harness.errors import ConfigError
from harness.records import from_json, read_record, to_json, write_json_atomically, write_record
from harness.redaction import redact
from harness.run import Outcome, Paths, lost

OUTCOME_FILE = "outcome.json"
STATUSES = {
    "finished": "finished",
    "skipped": "already recorded",
    "untimed": "not timed yet",
    "failed": "failed",
    "refused": "refused",
}
STATUSES |= {launching.LOST: "lost with their worker"}
POLL_SECONDS = 0.5
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
_begun: list[Path] = []  # the folder of the sweep whose jobs other processes have begun and not ended


def remember(outcome: Outcome, folder: Path) -> None:
    """Leave the outcome of one job in its folder."""
    paths = [str(path) for path in (outcome.baseline, outcome.path) if path is not None]
    entry = {"status": outcome.status, "title": outcome.title, "reason": redact(outcome.reason), "records": paths}
    write_json_atomically(entry, folder / OUTCOME_FILE)


def begin(config: dict[str, Any], paths: Paths, title: str, folder: Path) -> None:
    """Mark the folder of a job: as long as no outcome is written over it, a process works on it or was lost."""
    try:
        path, record = lost(config, paths, launching.REASON)
    except (ConfigError, ValueError):  # the run itself says what is wrong
        return
    entry = {"status": launching.LOST, "title": title, "reason": launching.REASON, "records": []}
    entry |= {**launching.mark_of_this_process(), "path": str(path), "record": to_json(record)}
    write_json_atomically(entry, folder / OUTCOME_FILE)


def was_cut_short() -> bool:
    """True when the sweep of this process ended without a summary, because its launcher lost a worker."""
    return bool(_begun)


def close_cut_short() -> int:
    """Wait for the workers that are left, turn those that were lost into failed records, print what there is.

    Returns the exit status.
    """
    entries, elsewhere = _when_all_have_ended(_begun[-1])
    for entry in entries:
        if entry["status"] != launching.LOST:
            continue
        if _worker(entry) in elsewhere:
            entry["reason"] = launching.ELSEWHERE
            continue
        path = Path(entry["path"])
        if not path.exists() or read_record(path).status != "finished":
            write_record(from_json(entry["record"]), path)
        entry["records"] = [str(path)]
    print("\nThe sweep was cut short. Jobs that had not begun are not in this list; the same command runs them.")
    return _close(entries)


def _when_all_have_ended(folder: Path) -> tuple[list[dict[str, Any]], set[tuple]]:
    """What the jobs left once none of them is known to run, and the workers of which nothing is known.

    Jobs that wait in a scheduler's queue may begin meanwhile: they are waited for, too.
    """
    known: dict[tuple, bool | None] = {}
    while True:
        entries = _entries(folder)  # read again after the last has ended: it may have finished
        marks = [entry for entry in entries if entry["status"] == launching.LOST]
        if not any(known.values()) and all(_worker(mark) in known for mark in marks):
            return entries, {worker for worker, at_work in known.items() if at_work is None}
        if any(known.values()):
            time.sleep(POLL_SECONDS)
        known = {_worker(mark): launching.is_at_work(mark) for mark in marks}


def _worker(entry: dict[str, Any]) -> tuple:
    return entry["host"], entry["process"], entry["path"]


def _entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(f"*/{OUTCOME_FILE}"))]


def _close(entries: list[dict[str, Any]]) -> int:
    """Print table and summary of the jobs; the exit status: 1 when a run failed, 2 when every run was refused."""
    if not entries:
        return 0
    paths = [Path(path) for path in dict.fromkeys(path for entry in entries for path in entry["records"])]
    counts = {status: sum(entry["status"] == status for entry in entries) for status in STATUSES}
    print(f"{table_of(paths, short=True).rstrip()}\n\n{summary(entries, paths)}")
    if counts["refused"] == len(entries):
        return 2
    return int(any(counts[status] for status in ("refused", "failed", launching.LOST)))


def table_of(paths: list[Path], short: bool = False) -> str:
    """The table of these records, with an empty line before it; empty without records.

    short: without footnotes and with the most asked-for columns alone.
    """
    from harness.tables import judge_of, short_table, summary_table

    records = {path: read_record(path) for path in paths if path.exists()}
    if not records:
        return ""
    table = short_table if short else summary_table
    return f"\n{table(list(records.values()), judge_of(results_of(paths[0])))}"


def results_of(record: Path) -> Path:
    """The results folder that a record lies in."""
    return record.parents[2]


def summary(entries: list[dict[str, Any]], paths: list[Path]) -> str:
    """What a sweep did, what it did not and why, and where to look next."""
    from harness.options import RESULTS
    from harness.tables import terminal_width
    from harness.text_table import wrapped

    width = min(100, terminal_width())
    counts = {status: sum(entry["status"] == status for entry in entries) for status in STATUSES}
    lines = [
        f"{len(entries)} {'run' if len(entries) == 1 else 'runs'}: "
        + ", ".join(f"{n} {STATUSES[status]}" for status, n in counts.items() if n)
    ]
    for entry in entries:
        if entry["status"] in ("failed", "refused", launching.LOST):
            words = markup.plain(f"{entry['title']}: {entry['status']}: {entry['reason']}")
            lines.append(wrapped(words, width, "    ", "  "))
    skipped = dict.fromkeys(entry["title"] for entry in entries if entry["status"] == "skipped")
    if skipped:
        words = markup.plain(f"not run again (force=true does): {'; '.join(skipped)}")
        lines.append(wrapped(words, width, "    ", "  "))
    if counts["untimed"]:
        lines.append("  the same command without timing=later, one job after the other, times them and writes records")
    if not paths:
        return "\n".join(lines)
    results = results_of(paths[0])
    where = "" if results.resolve() == RESULTS.resolve() else f" paths.results={results}"
    known = [path for path in paths if path.exists()]
    lines += [
        "",
        f"records:      {paths[0].parent}",
        *(f"one row:      python -m harness.show {path.stem.rpartition('-')[2]}{where}" for path in known[-1:]),
        f"footnotes:    python -m harness.tables all{where}",
        f"what to use:  python -m harness.advise max_perplexity_increase=5%{where}",
        f"report:       python -m harness.report{where} (make report) writes {results / 'report.html'}",
    ]
    return "\n".join(lines)


class SweepSummary(Callback):
    """Hydra callback: a sweep's table, what failed and why, and an exit status that tells."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        """Remember a sweep in other processes, in case its launcher loses one and does not come to an end."""
        target = config.hydra.launcher._target_
        if target != BASIC:
            _begun.append(Path(config.hydra.sweep.dir))
        if target.endswith(".SlurmLauncher"):
            slurm_queue.watch_queue_without_accounts()

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        """Print the summary; exit with 1 when a run failed, 2 when every run was refused."""
        _begun.clear()
        if process_rank() > 0:  # trained along: a summary, and a status at which a launcher ends all, are not its own
            return
        status = _close(_entries(Path(config.hydra.sweep.dir)))
        if status:
            sys.exit(status)
