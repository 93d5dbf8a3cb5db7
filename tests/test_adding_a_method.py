"""The page on adding a method, followed to the letter in a copy of the project."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.records import read_records
from harness.run import ROOT

PAGE = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
STEP = re.compile(r"\*\*\d\. [^`]*?`((?:methods|conf|tests)/[\w/.]+)`.*?```\w+\n(.*?)```", flags=re.S)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the project with what the page says put where it says."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("harness", "methods", "conf", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    files = dict(STEP.findall(PAGE))
    assert len(files) == 3
    for path, text in files.items():
        assert not (root / path).exists()
        (root / path).write_text(text, encoding="utf-8")
    return root


def commands() -> list[list[str]]:
    (block,) = re.findall(r"```console\n(.*?)```", PAGE, flags=re.S)
    return [shlex.split(line)[1:] for line in block.splitlines()]


def call(arguments: list[str], root: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, *arguments]
    answer = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def test_its_test_and_the_contract_pass(copy):
    (arguments,) = [command for command in commands() if "pytest" in command]
    assert "passed" in call([*arguments, "-p", "no:cacheprovider", "-o", "addopts="], copy)


@pytest.mark.launcher
def test_the_harness_runs_it(copy):
    (arguments,) = [command for command in commands() if "harness" in command]
    assert "Clipped rounding" in call(arguments, copy)
    records = {record.card["name"]: record for _, record in read_records(copy / "results")}
    assert records["clipped_rounding"].status == "finished"
    assert records["dense"].value("perplexity") < records["clipped_rounding"].value("perplexity")
