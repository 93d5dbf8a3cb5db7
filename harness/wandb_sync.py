"""Upload runs that were logged offline, and refuse those that would arrive incomplete.

    python -m harness.wandb_sync                     everything below results/ that is not uploaded yet
    python -m harness.wandb_sync check=true          only say what is there and what is missing
    python -m harness.wandb_sync from=records        log every record anew, when the offline runs are gone

`wandb sync` uploads a run whose tables' staged bytes are gone (a cleaned folder, another machine) without a word,
calls it synced, and the table never appears. So each run's log is read first, by the SDK's own reader, and every file
that it names must be there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from harness import tracking
from harness.errors import ConfigError
from harness.options import parsed, results_folder, switched_on
from harness.records import read_records
from harness.redaction import redact

HELP = """Upload W&B runs that were logged offline; refuse those whose files are missing, and name the files.

usage: python -m harness.wandb_sync [OPTION=VALUE ...]

options
  paths.results=DIR   where scratch/wandb/ is (default: results)
  project=NAME        the project to upload to (default: the one each run was logged for)
  entity=NAME         the user or team (default: that of the key)
  check=true          only say what would be uploaded and what is missing
  from=records        log every record anew, online, instead of uploading what was logged offline
"""
OPTIONS = ("paths.results", "project", "entity", "check", "from")
READ_SECONDS, SYNC_SECONDS = 60, 600  # for one run
READERS = 2  # runs read at a time


@dataclass(frozen=True)
class OfflineRun:
    """One folder that the SDK left.

    id: of the run; log: its `.wandb` file; missing: files that the log names and that are not there.
    unreadable: why the log cannot be read, or nothing.
    """

    id: str
    log: Path
    missing: tuple[Path, ...] = ()
    unreadable: str = ""

    @property
    def folder(self) -> Path:
        return self.log.parent


def waiting(results: Path) -> list[Path]:
    """Logs of offline runs that are not uploaded, the newest of each run: a run made again replaces its older self."""
    logs = sorted((results / "scratch" / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda log: log.parent.name)
    newest = {log.stem: log for log in logs}
    return [log for log in newest.values() if not log.with_name(f"{log.name}.synced").exists()]


def examined(log: Path) -> OfflineRun:
    """The run with whatever is missing of it."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log.parent)]
    name = log.stem.removeprefix("run-")
    try:
        read = subprocess.run(command, capture_output=True, text=True, timeout=READ_SECONDS, check=True).stdout
        entries = [json.loads(line) for line in read.splitlines() if line.startswith("{")]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return OfflineRun(name, log, unreadable=f"{type(error).__name__}: {error}")
    if not entries:
        return OfflineRun(name, log, unreadable="nothing in it")
    return OfflineRun(name, log, tuple(file for file in named_files(entries, log.parent) if not file.is_file()))


def named_files(entries: Sequence[dict], folder: Path) -> list[Path]:
    """Every file that a run's log says belongs to it: staged bytes of tables and artifacts, and saved files.

    entries: the log as the SDK's reader prints it; folder: of the run, which saved files are below.
    """
    files: dict[Path, None] = {}
    for entry in entries:
        for content in ((entry.get("artifact") or {}).get("manifest") or {}).get("contents", []):
            if content.get("local_path"):
                files[Path(content["local_path"])] = None
        for saved in (entry.get("files") or {}).get("files", []):
            files[folder / "files" / saved["path"]] = None
    return list(files)


def upload(run: OfflineRun, project: str | None, entity: str | None) -> str:
    """Upload one run with `wandb sync`. Returns why it did not work, or nothing."""
    command = [sys.executable, "-m", "wandb", "sync", "--yes"]
    command += ["--project", project] if project else []
    command += ["--entity", entity] if entity else []
    try:
        done = subprocess.run(
            [*command, str(run.folder)], capture_output=True, text=True, timeout=SYNC_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"no end after {SYNC_SECONDS} s"
    if done.returncode or not run.log.with_name(f"{run.log.name}.synced").exists():
        said = " ".join((done.stdout + done.stderr).split())
        return redact(said[-400:]) or f"exit status {done.returncode}"
    return ""


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; 1 when a run was refused or failed; 2 when nothing can be uploaded or for what was typed wrong."""
    if {"--help", "-h"} & set(arguments):
        print(HELP)
        return 0
    try:
        options = parsed(arguments, OPTIONS)
        results = results_folder(options)
        if options.get("from", "runs") not in ("runs", "records"):
            raise ConfigError(f"from={options['from']}: choose runs or records")
        checking = switched_on(options, "check")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tracking.quiet_environment(results):
        hindrance = "" if checking else tracking.obstacle()
        if hindrance:
            print(f"error: {hindrance}; nothing was uploaded", file=sys.stderr)
            return 2
        if options.get("from") == "records":
            return _from_records(results, options)
        return _from_runs(results, options, checking)


def _from_runs(results: Path, options: dict[str, str], checking: bool) -> int:
    logs = waiting(results)
    if not logs:
        print(f"nothing to upload below {results / 'scratch' / 'wandb'}")
        return 0
    with ThreadPoolExecutor(READERS) as readers:
        runs = list(readers.map(examined, logs))
    whole = [run for run in runs if not run.missing and not run.unreadable]
    wrong = len(runs) - len(whole)
    for run in runs:
        if run.unreadable:
            print(f"refused: {run.id}: {run.log} cannot be read: {run.unreadable}", file=sys.stderr)
        elif run.missing:
            print(f"refused: {run.id} would arrive incomplete; missing:", file=sys.stderr)
            print("\n".join(f"  {file}" for file in run.missing), file=sys.stderr)
    if checking:
        print("\n".join(f"complete: {run.id} {run.folder}" for run in whole))
        print(f"{len(whole)} to upload, {wrong} refused")
    else:
        failures = 0
        for run in whole:
            problem = upload(run, options.get("project"), options.get("entity"))
            failures += bool(problem)
            print(f"failed: {run.id}: {problem}" if problem else f"uploaded: {run.id}", flush=True)
        print(f"{len(whole) - failures} uploaded, {wrong} refused, {failures} failed")
        wrong += failures
    if len(runs) > len(whole):
        print("put the files back where they were, or log the records anew: from=records", file=sys.stderr)
    return 1 if wrong else 0


def _from_records(results: Path, options: dict[str, str]) -> int:
    project = options.get("project", tracking.PROJECT)
    tracker = tracking.WandbTracker(project, options.get("entity"), mode="online", group="from records")
    places = [tracker.log(record, results) for _, record in read_records(results)]
    online = [place for place in places if place and place.startswith("http")]
    print("\n".join(online))
    print(f"{len(online)} of {len(places)} records are in W&B")
    return 0 if len(online) == len(places) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
