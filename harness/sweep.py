"""What a sweep did: each job leaves its outcome in a file, and the end reads them all.

Files rather than memory, because some launchers run jobs in other processes or on other machines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from harness.records import read_record, write_json_atomically
from harness.redaction import redact
from harness.run import Outcome

OUTCOME_FILE = "outcome.json"
STATUSES = {"finished": "finished", "skipped": "already recorded", "failed": "failed", "refused": "refused"}


def remember(outcome: Outcome, folder: Path) -> None:
    """Leave the outcome of one job in its folder."""
    paths = [str(path) for path in (outcome.baseline, outcome.path) if path is not None]
    entry = {"status": outcome.status, "title": outcome.title, "reason": redact(outcome.reason), "records": paths}
    write_json_atomically(entry, folder / OUTCOME_FILE)


def table_of(paths: list[Path]) -> str:
    """The table of these records, with an empty line before it; empty without records."""
    from harness.tables import summary_table

    records = {path: read_record(path) for path in paths if path.exists()}
    return f"\n{summary_table(list(records.values()))}" if records else ""


class SweepSummary(Callback):
    """Hydra callback: a sweep's table, what failed and why, and an exit status that tells."""

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        """Print the summary; exit with 1 when a run failed, 2 when every run was refused."""
        folder = Path(config.hydra.sweep.dir)
        entries = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(f"*/{OUTCOME_FILE}"))]
        if not entries:
            return
        paths = [Path(path) for path in dict.fromkeys(path for entry in entries for path in entry["records"])]
        counts = {status: sum(entry["status"] == status for entry in entries) for status in STATUSES}
        print(table_of(paths))
        print(f"\n{len(entries)} runs: " + ", ".join(f"{n} {STATUSES[status]}" for status, n in counts.items() if n))
        for entry in entries:
            if entry["status"] in ("failed", "refused"):
                print(f"  {entry['title']}: {entry['status']}: {entry['reason']}")
        if paths:
            print(f"records: {paths[0].parent}")
        if counts["refused"] == len(entries):
            sys.exit(2)
        if counts["refused"] or counts["failed"]:
            sys.exit(1)
