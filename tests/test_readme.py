"""The README tells the truth: its commands exist and compose, its tree is the tree."""

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
MAIN = [line for line in COMMANDS if line.startswith("python -m harness ") and "--help" not in line]


def test_there_are_commands_to_check():
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert len(MAIN) >= 3


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make_targets_exist(line):
    answer = subprocess.run(
        ["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("line", MAIN)
def test_commands_compose(line, trained_folder, tmp_path):
    arguments = [part.replace("DIR", str(trained_folder)) for part in shlex.split(line)[3:] if part != "-m"]
    swept = [re.sub(r",(?![^\[]*\]).*", "", part) for part in arguments]  # the first of each axis, stacks whole
    resolve = [] if "[" in line else ["--resolve"]  # the references of a stack's steps are to their own methods
    command = [sys.executable, "-m", "harness", *swept, f"paths.results={tmp_path}", "--cfg", "job", *resolve]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "_target_" in answer.stdout


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
