"""Two processes do what one does, errors included. Each test is a process of its own: threads forbid a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir() or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)


def run(script: str, *arguments: object) -> str:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=60,
    ).stdout  # fmt: skip


JOBS = """
import os, signal, threading, time
from functools import partial
from harness.two_processes import helps, shared_out

first = os.getpid()

def job(k, what=None):
    time.sleep(0.02)  # so that neither process can do them all before the other has started
    if what is not None:
        what()
    return [k, os.getpid()]

def only_in_the_second(act):
    if os.getpid() != first:
        act()

def fail():
    raise ValueError("of a job")

def done(count, what=None):
    found = shared_out([partial(job, k, what) for k in range(count)])
    assert [k for k, _ in found] == list(range(count))
    return {process for _, process in found}

assert helps()
assert len(done(40)) == 2
assert len(done(1)) == 1
fork, os.fork = os.fork, lambda: os.read(-1, 1)
assert done(4) == {first}, "no more processes"
os.fork = fork
assert shared_out([partial(int, k) for k in range(1000)]) == list(range(1000)), "more jobs than claims"
assert done(12, partial(only_in_the_second, fail)) == {first}
assert done(12, partial(only_in_the_second, lambda: os.kill(os.getpid(), signal.SIGKILL))) == {first}
try:
    done(12, fail)
except ValueError as error:
    print(error)
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("none left")
wait = threading.Event()
threading.Thread(target=wait.wait).start()
assert not helps(), "a thread"
assert done(4) == {first}
wait.set()
"""

TABLES = """
import os, sys
from dataclasses import replace
from pathlib import Path
from fake_records import failed, sweep, write_all
from harness import record_index, tables, two_processes

record_index.FEWEST = record_index.PART = tables.MANY = 1
results = Path(sys.argv[1])
runs = [replace(r, layer_errors={"0.q": 0.125}, layer_output_errors={"0.q": 0.3}) for r in sweep()[1:]]
write_all([sweep()[0], *runs, failed(replace(runs[0], id="f")), *(replace(r, model="other") for r in sweep())], results)
(results / "records" / "model" / "broken.json").write_text("[]")
written = []
for cores in (os.sched_getaffinity(0), {min(os.sched_getaffinity(0))}):
    os.environ["XDG_CACHE_HOME"] = str(results / f"cache-{len(cores)}")
    os.sched_setaffinity(0, cores)
    assert two_processes.helps() == (len(cores) > 1)
    for _ in range(2):  # from the files, from the index
        assert tables.main(["all", f"paths.results={results}"]) == 1
        files = sorted((results / "tables").iterdir())
        written.append([file.read_bytes() for file in files] + [record_index.read_all(results)])
assert len(files) == 16 and all(found == written[0] for found in written)
"""


def test_jobs_are_done_once_and_errors_and_killed_processes_lose_nothing():
    assert run(JOBS) == "of a job\nnone left\n"


def test_tables_and_the_index_are_the_same_from_two_processes_as_from_one(tmp_path):
    printed = run(TABLES, tmp_path / "results")
    assert printed.count("Table I: ") == 4
