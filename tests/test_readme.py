"""The README tells the truth: its commands exist, its tree is the tree. tests/test_docs.py composes its runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from harness.run import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
    if line.strip()
]


def test_there_are_commands_to_check():
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make_targets_exist(line):
    answer = subprocess.run(
        ["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("module", re.findall(r"python -m (harness\.\w+)", README))
def test_other_entry_points_answer(module):
    answer = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout


def test_the_tree_has_a_line_for_every_source_file():
    listed = re.findall(r"([\w./-]+\.py)\b", README)
    files = {path.name for folder in ("harness", "methods") for path in (ROOT / folder).rglob("*.py")}
    missing = files - {path.rpartition("/")[2] for path in listed} - {"__init__.py"}
    assert not missing
