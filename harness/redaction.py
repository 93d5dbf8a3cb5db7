"""Keys and tokens kept out of whatever is written, printed or sent: records, logs, trackers.

A secret is the value of an environment variable whose name says so (`HF_TOKEN`, `WANDB_API_KEY`), what stands in a
field that is made for one, or text with the shape of a well-known key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "[secret]"
SHORTEST = 8  # characters; a server of one's own is often given the key "none" or "EMPTY"
_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
_FIELD = re.compile(r"(?:^|_)(?:api_key|access_token|auth_token|password|secret)$", re.IGNORECASE)
_SHAPE = re.compile(
    r"\b(?:hf_|sk-|gh[opsu]_|github_pat_|wandb_v\d_)[A-Za-z0-9_-]{16,}"  # of hubs and endpoints
    r"|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"  # user and password of an address
    r"|(?<=Bearer )[A-Za-z0-9._~+/=-]{8,}"
)


def secrets(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Values of the variables whose names end like a secret's, the longest first: one may contain another."""
    found = {value for name, value in environment.items() if _VARIABLE.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def redact(text: str, hidden: list[str] | None = None) -> str:
    """The text with every secret masked. hidden: values to mask; those of the environment by default."""
    for value in secrets() if hidden is None else hidden:
        text = text.replace(value, MASK)
    return _SHAPE.sub(MASK, text)


def redacted(value: Any, hidden: list[str] | None = None) -> Any:
    """JSON values with every secret masked: in texts, and whole texts in fields that are made for one."""
    hidden = secrets() if hidden is None else hidden
    if isinstance(value, dict):
        return {
            key: MASK if isinstance(item, str) and item and _FIELD.search(str(key)) else redacted(item, hidden)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(item, hidden) for item in value]
    return redact(value, hidden) if isinstance(value, str) else value
