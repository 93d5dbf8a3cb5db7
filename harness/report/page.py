"""The page: data, script, style and the plotting library in one file that asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness import markup
from harness.records import write_text_atomically
from harness.wheels import default_cache

HERE = Path(__file__).parent
TITLE = "LLM inference optimizations, compared"


def page(data: dict[str, Any], command: str, library: str) -> bytes:
    """The report as HTML in UTF-8. library: script that sets `vegaEmbed`, see `plotting_library`.

    Scripts run only where their digest is the one that the page names, so that nothing in the data can ever be run,
    and nothing may be fetched from anywhere.
    """
    scripts = {"library": library, "charts": _read("charts.js"), "page": _read("page.js")}
    digests = " ".join(f"'sha256-{_digest(text)}'" for text in scripts.values())
    parts = {
        "policy": f"default-src 'none'; script-src {digests} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        "title": markup.html(TITLE),
        "style": _read("page.css"),
        "summary": markup.html(_summary(data)),
        "command": markup.html(command),
        "data": json_for_script(data),
        **scripts,
    }
    pieces = re.split(r"\{\{(\w+)\}\}", _read("page.html"))
    return b"".join((parts[piece] if k % 2 else piece).encode() for k, piece in enumerate(pieces))


def json_for_script(data: Any) -> str:
    """JSON that cannot end the script element it stands in, nor begin a comment in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")  # "<" stands only in strings of JSON


def plotting_library() -> str:
    """Vega and Vega-Lite as one script behind their licences, from the package vl-convert-python.

    Bundling takes two seconds; what it gave is kept in the cache.
    """
    import vl_convert

    kept = default_cache() / "plotting" / f"vl-convert-{vl_convert.__version__}.js"
    try:
        bundle = kept.read_bytes().decode()
    except (OSError, ValueError):
        bundle = vl_convert.javascript_bundle()
        with suppress(OSError):  # the next page waits for it again
            write_text_atomically(bundle, kept)
    script = f"/*\n{_read('licences.txt')}*/\n{bundle}"
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _summary(data: dict[str, Any]) -> str:
    runs = data["runs"]
    days = sorted(run["finished"][:10] for run in runs if run.get("finished"))
    failed = sum("failed" in run for run in runs)
    models = {json.dumps(data["shared"][run["config"]["model"]]) for run in runs if "model" in run["config"]}
    parts = [
        f"{_counted(len(runs), 'run')} of {_counted(len(models), 'model')}",
        f"in {_counted(len(data['comparisons']), 'comparison')}",
        f"{failed} failed" if failed else "",
        (f"measured {days[0]}" + (f" to {days[-1]}" if days[-1] != days[0] else "")) if days else "",
    ]
    return ", ".join(filter(None, parts)) + "."


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
