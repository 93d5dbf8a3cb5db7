"""Programs of other projects that live in a Python of their own, because their pins clash with ours."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from harness.errors import ConfigError

PROBE = "import importlib.util as u, sys; s = u.find_spec(sys.argv[1]); sys.exit(s is None or s.origin is None)"
VERSIONS = """\
import json, sys
from importlib import metadata
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
PROBE_SECONDS = 30
OUTSIDERS = ("PYTHONPATH", "PYTHONHOME")  # ours; they would leak our packages into the other environment


def require(interpreter: str | None, key: str, title: str, module: str, install: str) -> None:
    """Raise ConfigError unless `interpreter` (None: this one) exists and finds `module`. Imports nothing of it.

    key: the configuration value that names the interpreter; install: the arguments of `pip install`.
    """
    if interpreter is None:
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:  # a mere folder of that name is not the library
            raise ConfigError(
                f"{title} is not installed here; its pins clash with ours: python -m venv PEER && "
                f"PEER/bin/pip install {install}, then {key}=PEER/bin/python"
            )
        return
    try:
        probe = subprocess.run(
            [executable(interpreter), "-c", PROBE, module],
            env=environment(interpreter),
            capture_output=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or f"no answer in {PROBE_SECONDS} s"
        raise ConfigError(
            f"{key}={interpreter} is not a Python that can be run ({reason}); name PEER/bin/python of "
            f"an environment with {title}, by its full path"
        ) from error
    if probe.returncode:
        raise ConfigError(f"{key}={interpreter} does not find {module}: {interpreter} -m pip install {install}")


def versions(interpreter: str | None, packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those packages that `interpreter` (None: this one) has. Raises ConfigError when it cannot be run."""
    try:
        answer = subprocess.run(
            [executable(interpreter), "-c", VERSIONS, *packages],
            env=environment(interpreter),
            capture_output=True,
            timeout=PROBE_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{executable(interpreter)} does not say its packages' versions: {error}") from error
    return json.loads(answer.stdout)


def executable(interpreter: str | None) -> str:
    """What to run: a path is the user's, from where this process was started; links are kept, they make a venv."""
    if interpreter is None:
        return sys.executable
    return str(Path(interpreter).expanduser().absolute()) if os.sep in interpreter else interpreter


def environment(interpreter: str | None) -> dict[str, str]:
    """Variables of the other process: no network, no bars, and nothing of ours on its path."""
    import torch

    kept = {key: value for key, value in os.environ.items() if interpreter is None or key not in OUTSIDERS}
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    return kept | threads | quiet
