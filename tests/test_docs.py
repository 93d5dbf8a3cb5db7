"""The documentation tells the truth: its commands compose, its messages exist, made pages are up to date."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from harness import launching, sizing, survey_index
from harness.cli import composed, sweepable
from harness.run import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "results" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# what stands for something of the reader's, and commands that go on in prose
PLACEHOLDERS = {
    "DIR": "/somewhere",
    "FILE": "/somewhere/file",
    "METHOD": "method=gptq",
    "…": "",
    "NAME": "name",
    "$HOME": "/root",
}


def commands(page) -> list[str]:
    """Runs and sweeps that a page shows, in blocks and in lines."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"(?:-m harness|^harness)( [^`\n]*)", text, flags=re.M)  # python, accelerate launch, torchrun
    return [command.partition("  #")[0].partition(" #")[0].strip() for command in found]


EXAMPLE = "method=clipped_rounding"  # of the page on adding a method, whose test adds it first
ALL = sorted({command for page in PAGES for command in commands(page) if "=" in command and EXAMPLE not in command})
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def test_commands_are_found():
    assert len(ALL) > 25
    assert any("hardware.sharded=true" in command for command in ALL)
    assert any("hydra/launcher=slurm" in command for command in ALL)


@pytest.mark.parametrize("command", ALL)
def test_every_run_and_sweep_of_the_documentation_composes(command):
    arguments = shlex.split(command)
    for place, meant in PLACEHOLDERS.items():
        arguments = [argument.replace(place, meant) for argument in arguments]
    arguments = [argument for argument in arguments if argument]
    assert launching.missing(arguments) == "" or "hydra/launcher" in command
    overrides = [
        re.sub(r",(?![^\[]*\]).*", "", argument)  # the first of each axis, stacks whole
        for argument in sweepable(arguments)
        if "=" in argument and not argument.startswith("hydra")  # launchers: tests/harness/test_launching.py
    ]
    config, *_ = composed(overrides)
    assert "_target_" in config["method"]


def test_entry_points_targets_extras_and_files_of_the_documentation_exist():
    for module in set(re.findall(r"-m (harness\.\w+)", TEXT)):
        source = ROOT / (module.replace(".", "/") + ".py")
        source = source if source.exists() else source.with_suffix("") / "__main__.py"
        assert 'if __name__ == "__main__":' in source.read_text(encoding="utf-8"), module
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z][\w-]+)", TEXT, flags=re.M))
    assert len(named) > 8
    assert named <= targets | {f"table-{number}" for number in range(1, 5)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {extra for found in re.findall(r"(?:\.|harness)\[([\w,]+)\]\"", TEXT) for extra in found.split(",")}
    assert extras
    assert extras <= project["optional-dependencies"].keys()
    files = set(re.findall(r"(?:tests|docs|conf|harness|methods)/[\w/.-]+\.(?:py|md|yaml)\b", TEXT))
    made = {"conf/method/clipped_rounding.yaml", "methods/quantization/clipped_rounding.py"}
    made |= {"tests/methods/test_clipped_rounding.py"}
    assert not [file for file in files - made if not (ROOT / file).exists()]


@pytest.mark.launcher
def test_the_example_of_a_script_runs(tmp_path):
    text = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (tmp_path / "example.py").write_text(script.replace("(3, 4)", "(4,)"), encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    bits, perplexity, stored = answer.stdout.splitlines()[-1].split()
    assert bits == "4"
    assert float(perplexity) > 1
    assert 4 < float(stored) < 5
    assert list((tmp_path / "results" / "records").rglob("rtn-*.json"))


def test_the_package_itself_imports_nothing():
    code = "import sys, harness; print(len([name for name in sys.modules if name.startswith(('hydra', 'torch'))]))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "0"


@pytest.mark.parametrize(
    ("page", "maker"), [("survey-index", survey_index.page), ("sizing", sizing.page)], ids=["survey-index", "sizing"]
)
def test_made_pages_are_what_would_be_made_now(page, maker):
    kept = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert kept == maker(), f"python -m harness.{page.replace('-', '_')} docs/{page}.md"


def test_every_dependency_says_what_it_is_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    always, _, extras = text.partition("## Extras")
    rows = [line for line in extras.splitlines() if line.startswith("| `")]

    def name(requirement: str) -> str:
        return re.match(r"[\w.-]+", requirement)[0]

    explained = set(re.findall(r"^\| `([\w-]+)`", always, flags=re.M))
    assert not {name(needed) for needed in project["dependencies"]} - explained
    named = {}
    for row in rows:
        extra, packages = row.split("|")[1:3]
        named.setdefault(extra.strip(" `"), set()).update(re.findall(r"`([\w-]+)`", packages))
    for extra, needs in project["optional-dependencies"].items():
        assert not {name(needed) for needed in needs} - named.get(extra, set()), extra


def test_messages_of_the_page_on_troubles_are_those_of_the_code():
    code = "\n".join(
        node.value
        for folder in ("harness", "methods")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [
        cell for row in re.findall(r"^\| (`.*?) \|", text, flags=re.M) for cell in re.findall(r"`([^`]+)`", row)
    ]
    assert len(messages) > 25
    for message in messages:
        for piece in re.split(r"method |option |'?NAME'?|…|\?", message):
            assert piece.strip(" .'") in code, message
