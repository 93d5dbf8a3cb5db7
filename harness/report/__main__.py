"""Command line of the report; see HELP."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import ConfigError
from harness.options import RESULTS

HELP = """Write one HTML page from the records: plots, tables, failures, provenance. It needs no network and no server.

usage: python -m harness.report [OPTION=VALUE ...]

options
  paths.results=DIR   where records are read, in DIR/records and in records/ of the folders below (default: results);
                      paths.results=results/published for the published ones
  output=FILE         the page (default: DIR/report.html)
  model=NAME[,NAME]   records of these models alone
  hardware=NAME[,…]   records of these hardware configurations alone
"""
OPTIONS = ("paths.results", "output", "model", "hardware")


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; 1 when a record could not be read; 2 for what was typed wrong."""
    if {"--help", "-h"} & set(arguments):
        print(HELP)
        return 0
    try:
        options = parse(arguments)
        results = Path(options.get("paths.results", RESULTS))
        output = Path(options.get("output", results / "report.html"))
        broken = write_report(results, output, options, shlex.join(["python", "-m", "harness.report", *arguments]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {output} ({output.stat().st_size / 1e6:.1f} MB); open it in a browser")
    for reason in broken:
        print(f"not read: {reason}", file=sys.stderr)
    return 1 if broken else 0


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """Options by name. Raises ConfigError for one that is none."""
    from harness.tables import check_name

    options = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is no option; write one of {', '.join(OPTIONS)} as OPTION=VALUE")
        check_name(key.lstrip("+"), OPTIONS, "option")
        options[key.lstrip("+")] = value
    return options


def write_report(results: Path, output: Path, options: dict[str, str], command: str) -> list[str]:
    """Write the page atomically and return why records could not be read.

    Raises ConfigError where there is nothing to read, no record of a model or hardware that was asked for, nothing
    that draws, or no permission to write.
    """
    import gc
    import importlib.util
    from concurrent.futures import ProcessPoolExecutor

    from harness.records import write_bytes_atomically
    from harness.report.data import page_data, read_folders
    from harness.report.page import page, plotting_library
    from harness.tables import chosen

    if importlib.util.find_spec("vl_convert") is None:
        raise ConfigError("the report is drawn by the package vl-convert-python, which is not installed: make setup")
    gc.disable()  # millions of new objects, none of them in a cycle: looking for one would take seconds
    with ProcessPoolExecutor(1) as beside:  # two seconds and 150 MB that the reading need not wait for
        library = beside.submit(plotting_library)
        found = read_folders(results)
        script = library.result()
    kept = set(map(id, chosen([record for records in found.folders.values() for record in records], options)))
    found.folders = {folder: [r for r in records if id(r) in kept] for folder, records in found.folders.items()}
    data, broken = page_data(found, options.get("paths.results", "")), found.broken
    del found  # what follows needs the memory
    try:
        write_bytes_atomically(page(data, command, script), output)
    except OSError as error:  # records of others, for instance
        raise ConfigError(f"output={output}: {error.strerror}; output=FILE writes the page elsewhere") from error
    gc.enable()
    return broken


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
