"""What the small commands take besides the names of things: KEY=VALUE, checked against the keys they know."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.errors import ConfigError

RESULTS = Path("results")  # of the folder that a command is called in, as paths.results in conf/config.yaml
YES, NO = ("true", "yes", "1"), ("false", "no", "0")


def parsed(arguments: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Options by key. Raises ConfigError for a key that is not known, and for an argument that is no option."""
    options = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.lstrip("+")
        if not equals:
            raise ConfigError(f"{argument!r} is no option; write KEY=VALUE with a key of {', '.join(known)}")
        if key not in known:
            near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"option {key!r} is not one of {', '.join(known)}.{hint}")
        options[key] = value
    return options


def switched_on(options: dict[str, str], key: str, default: bool = False) -> bool:
    """The option as true or false. Raises ConfigError for another word."""
    word = options.get(key, YES[0] if default else NO[0]).lower()
    if word not in YES + NO:
        raise ConfigError(f"{key}={word}: choose true or false")
    return word in YES


def print_or_write(page: Callable[[], str], usage: str) -> None:
    """A command that makes one page: printed, or written to the file that is named; anything else gets the usage."""
    from harness.records import write_text_atomically

    arguments = sys.argv[1:]
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(usage.strip())
    elif arguments:
        write_text_atomically(page(), Path(arguments[0]))
    else:
        print(page(), end="")


def results_folder(options: dict[str, str]) -> Path:
    """`paths.results`, absolute. Raises ConfigError where there is no such folder."""
    folder = Path(options.get("paths.results", RESULTS)).absolute()
    if not folder.is_dir():
        raise ConfigError(f"paths.results={folder}: there is no such folder; run `python -m harness` first")
    return folder
