"""The wheel holds all that a checkout holds, and works from any folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness.run import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SHIPPED = ("harness", "methods", "conf")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the sources and installed into a folder of its own. No network."""
    if find_spec("setuptools") is None:
        pytest.skip("setuptools, which builds the wheel, is not installed")
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for name in SHIPPED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--no-compile", "--target", str(target), str(wheel)], check=True)
    return target


def test_the_wheel_has_every_file(installed):
    for name in SHIPPED:
        there = installed / "harness" / "conf" if name == "conf" else installed / name
        files = {path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*") if path.is_file()}
        missing = {path for path in files if "__pycache__" not in path.parts and not (there / path).is_file()}
        assert not missing, f"add the package or the suffix to [tool.setuptools] in pyproject.toml: {missing}"


def test_an_installed_harness_works_from_any_folder(installed, tmp_path):
    settings = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(installed)}, "text": True, "check": True}
    module = [sys.executable, "-m", "harness", "--help"]
    assert "gptq" in subprocess.run(module, stdout=subprocess.PIPE, **settings).stdout
    script = [sys.executable, installed / "bin" / "harness", "method=gptq", "bits=3", "--cfg", "job"]
    composed = subprocess.run(script, stdout=subprocess.PIPE, **settings).stdout
    assert "methods.quantization.gptq" in composed
    assert re.search(r"results: results$", composed, flags=re.M)  # relative: below the folder of the caller


def test_commands_read_the_results_of_the_folder_they_are_called_in(tmp_path, monkeypatch):
    from harness.options import results_folder

    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    assert results_folder({}) == tmp_path / "results"


def test_every_extra_is_resolved_by_make_resolve():
    answer = subprocess.run(["make", "-n", "resolve"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"[{extra}]" in answer.stdout for extra in PROJECT["optional-dependencies"])
