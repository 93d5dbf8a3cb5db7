"""The sandbox: hostile programs get nothing, first as it stands, then with the outer doors open one by one."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from harness.errors import ConfigError, RunError
from methods.distillation import sandbox
from methods.distillation.sandbox import LAYERS, Outcome, Sandbox, kernel_layers

KERNEL = kernel_layers()
pytestmark = pytest.mark.skipif(not KERNEL, reason="this kernel isolates no process")
BOX = Sandbox(cpu_seconds=1, wall_seconds=8)
OPEN = Sandbox(kernel_required=False)


def execute(program: str, box: Sandbox, layers: tuple[str, ...]) -> Outcome:
    with sandbox.opened(box, layers) as run:
        return run(program)


needs_filter = pytest.mark.skipif("system_calls" not in KERNEL, reason="this kernel filters no system calls")
needs_namespaces = pytest.mark.skipif("namespaces" not in KERNEL, reason="this kernel grants no namespaces")


@pytest.mark.parametrize(
    ("program", "value"),
    [
        ("def solution():\n    eggs = 16 - 3 - 4\n    return eggs * 2", 18),
        ("import math\nanswer = math.ceil(7 / 2)", 4),
        ("from fractions import Fraction\nans = Fraction(1, 4) * 2", 0.5),
        ("total = 0\nfor i in range(4):\n    total += i\nprint(f'{total}')", "6"),
        ("def solution():\n    return 'yes' if 'heads'.upper() == 'HEADS' else 'no'", "yes"),
        ("def solution():\n    return sorted([3, 1], key=lambda x: -x)[0] > 2", True),
        ("def solution():\n    return float('inf')", float("inf")),
    ],
)
def test_honest_programs_return_their_values(program, value):
    outcome = BOX.run(program)
    assert (outcome.kind, outcome.value) == ("value", value), outcome


HOSTILE = {
    "read a file": "answer = open('/etc/passwd').read()",
    "import the system": "import os\nanswer = os.listdir('/')",
    "import from": "from os import listdir\nanswer = str(listdir('/'))",
    "import inside": "def solution():\n    import socket\n    return socket.socket().fileno()",
    "hidden module": "from datetime import sys\nanswer = sys.path[0]",
    "relative import": "from . import math\nanswer = 1",
    "builtins by name": "answer = __builtins__['open']('/etc/passwd').read()",
    "dunder attributes": "answer = ().__class__.__base__.__subclasses__()[0].__name__",
    "frames": "g = (x for x in [1])\nanswer = g.gi_frame.f_back.f_globals['os'].name",
    "format strings": "answer = '{0.__init__.__globals__}'.format(print)",
    "f-strings": "answer = f'{print.__init__.__globals__}'",
    "getattr": "answer = getattr((), '__cl' + 'ass__').__name__",
    "eval": "answer = eval('1+1')",
    "exec": "exec('answer = 1')",
    "classes": "class A(int):\n    pass\nanswer = A(3)",
    "with": "with print as p:\n    pass\nanswer = 1",
    "import by hand": "answer = __import__('os').getcwd()",
    "type": "answer = type(1)('3')",
    "print attributes": "answer = print.lines",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_get_no_value(name):
    outcome = BOX.run(HOSTILE[name])
    assert outcome.kind in ("refused", "error"), outcome
    assert outcome.value is None
    assert outcome.error


@pytest.mark.parametrize(
    ("program", "kinds"),
    [
        ("while True: pass", {"time"}),
        ("answer = 9 ** 9 ** 9 ** 9", {"time", "memory"}),
        ("def f(): return f()\nanswer = f()", {"error"}),
        ("answer = len([0] * 10 ** 9)", {"memory"}),
        ("x = 'a'\nwhile True: x += x", {"memory"}),
        (
            "try:\n    while True: x = [0] * 10 ** 9\nexcept Exception:\n    answer = 'caught'",
            {"value"},
        ),  # it may catch, not have
        ("while True: print('a' * 100)", {"output"}),
        ("answer = 'a' * 10 ** 6", {"output"}),
        ("answer = 10 ** 10000", {"error"}),  # more digits than Python writes
        ("answer = " + "-" * 15_000 + "1", {"syntax"}),  # deeper than the parser goes
        ("answer = " + "1+" * 5_000 + "1", {"syntax", "error", "value"}),
        ("answer = 1 #" + "x" * 50_000, {"refused"}),  # too long to be read
        ("raise BaseException", {"error"}),
        ("\ud800", {"syntax", "killed"}),
    ],
)
def test_limits_end_a_program(program, kinds):
    started = time.monotonic()
    outcome = BOX.run(program)
    assert outcome.kind in kinds, outcome
    assert len(outcome.error) <= 600
    assert time.monotonic() - started < BOX.wall_seconds + 1


def test_the_wall_clock_ends_what_uses_no_cpu():
    """A sleeping program, with only the process boundary left, dies when its time is up."""
    box = Sandbox(cpu_seconds=1, wall_seconds=1.0, kernel_required=False)
    started = time.monotonic()
    outcome = execute("import time\ntime.sleep(60)", box, ())
    assert outcome.kind == "time"
    assert time.monotonic() - started < 5


@needs_filter
@pytest.mark.parametrize(
    "call",
    [
        "libc.open(b'/etc/passwd', 0)",
        "libc.open(b'written', 0o101, 0o600)",
        "libc.socket(2, 1, 0)",
        "libc.socketpair(1, 1, 0, (ctypes.c_int * 2)())",
        "libc.fork()",
        "libc.execve(b'/bin/true', None, None)",
        "libc.kill(1, 0)",
        "libc.chroot(b'.')",
        "libc.ptrace(0, 0, 0, 0)",
        "libc.mkdir(b'made', 0o700)",
        "libc.setsid()",
        "libc.memfd_create(b'x', 0)",
    ],
)
def test_the_kernel_refuses_native_code_too(call):
    """Nothing of Python in the way: a program calls the C library as it likes and is refused by the kernel."""
    program = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nanswer = {call} * 1000 - ctypes.get_errno()"
    outcome = execute(program, BOX, ("limits", "system_calls"))
    assert outcome.value == -1001, outcome  # -1, errno 1: operation not permitted


@needs_namespaces
def test_in_namespaces_alone_there_are_no_files_and_no_network(tmp_path):
    """Without the filter of system calls: an empty root that cannot be left, and no address to reach."""
    secret = tmp_path / "secret"
    secret.write_text("seen")
    program = f"""
import errno, posix, _socket
seen = []
for path in ({str(secret)!r}, '/etc/passwd', '/proc/self/environ', '/usr/bin/env', '../../../etc/passwd'):
    try:
        posix.open(path, 0)
        seen.append(path)
    except OSError:
        pass
try:
    posix.chroot('/')
    seen.append('chroot')
except OSError:
    pass
try:
    _socket.socket(2, 1).connect(('127.0.0.1', 9))
    seen.append('network')
except OSError as error:
    seen.append(errno.errorcode[error.errno])
answer = ' '.join(seen) + ' ' + ' '.join(posix.listdir('/'))
"""
    outcome = execute(program.replace("import errno, posix, _socket", PRELOADED), BOX, ("namespaces",))
    assert outcome.value in ("ENETUNREACH ", "EMFILE ", "EPERM "), outcome


# modules of the interpreter itself, so that no file is needed; errno and posix are built in, _socket may not be
PRELOADED = """
import errno, posix
try:
    import _socket
except ImportError:
    class _socket:
        def socket(family, kind):
            raise OSError(errno.ENETUNREACH, 'no module')
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of processes are Linux's")
def test_nothing_stays_behind(tmp_path):
    """A program that forks with nothing but the process boundary around it: its whole session is dead afterwards."""
    box = Sandbox(wall_seconds=3, kernel_required=False)
    marker = tmp_path / "pid"
    program = f"""
import posix, time
if posix.fork() == 0:
    open({str(marker)!r}, 'w').write(str(posix.getpid()))
    time.sleep(600)
while True:
    try:
        answer = int(open({str(marker)!r}).read())
        break
    except (OSError, ValueError):
        time.sleep(0.01)
"""
    outcome = execute(program, box, ())
    child = int(marker.read_text())
    assert outcome.kind in ("value", "time")
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet waited for does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_flood_of_output_is_cut():
    """Bytes written past every guard are read up to a bound, then the process is killed."""
    box = Sandbox(cpu_seconds=5, wall_seconds=8, kernel_required=False)
    started = time.monotonic()
    outcome = execute("import posix\nwhile True: posix.write(1, b'x' * 65536)", box, ())
    assert outcome.kind in ("killed", "time")
    assert outcome.value is None
    assert time.monotonic() - started < 8


def test_an_answer_cannot_be_forged_by_a_second_line():
    """What a program writes around the sandbox's own line makes both worthless."""
    box = Sandbox(kernel_required=False)
    line = '{"kind": "value", "type": "int", "value": "42", "shut": []}'
    outcome = execute(f"import posix\nposix.write(1, b'{line}' + bytes([10]))\nanswer = 1", box, ())
    assert outcome.kind == "killed"
    assert outcome.value is None


def test_the_environment_is_empty():
    os.environ["SECRET_FOR_THE_TEST"] = "seen"
    try:
        outcome = execute("import posix\nanswer = str(dict(posix.environ))", Sandbox(kernel_required=False), ())
    finally:
        del os.environ["SECRET_FOR_THE_TEST"]
    assert "SECRET" not in outcome.value
    assert "PATH" not in outcome.value


@pytest.mark.parametrize(
    "program",
    ["open('/etc/passwd')", "import socket", "import posix\nposix.fork()", "import sys\nsys._getframe()"],
)
def test_the_interpreter_alone_refuses_as_well(program):
    outcome = execute(program, Sandbox(kernel_required=False), ("audit",))
    assert outcome.kind == "error"
    assert "PermissionError" in outcome.error


def test_programs_are_not_run_without_a_kernel_that_isolates():
    with pytest.raises(RunError, match="kernel_required"):
        execute("answer = 1", BOX, tuple(set(LAYERS) - {"namespaces", "system_calls"}))


def test_outcomes_come_in_the_order_of_the_programs():
    outcomes = list(BOX.run_all(f"answer = {i}" for i in range(6)))
    assert [outcome.value for outcome in outcomes] == list(range(6))


@pytest.mark.parametrize("field", ["cpu_seconds", "wall_seconds", "memory_bytes", "output_bytes", "source_bytes"])
def test_limits_have_bounds(field):
    with pytest.raises(ConfigError, match=field):
        Sandbox(**{field: 0})


def test_the_temporary_folder_is_gone(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    BOX.run("answer = 1")
    assert list(tmp_path.iterdir()) == []
