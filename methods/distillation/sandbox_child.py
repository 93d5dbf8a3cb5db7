"""What runs inside the sandbox: a process for each program, which shuts every door behind itself and then runs it.

Started as a script by `methods.distillation.sandbox`, with `-I -S`, an empty environment, in an empty folder; it
imports the standard library only. Reads a request a line from standard input, answers each with a line of JSON. A
program runs in a fork, which has a pipe of its own and none of the other requests. Everything that a program may
import is loaded before the doors are shut.
"""

from __future__ import annotations

import ast
import ctypes
import datetime
import fractions
import json
import math
import os
import platform
import select
import signal
import sys
import time
from types import CodeType, ModuleType
from typing import Any

MODULES = {"math": math, "datetime": datetime, "fractions": fractions}
PUBLIC = {
    "math": {name for name in dir(math) if not name.startswith("_")},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone", "MINYEAR", "MAXYEAR"},
    "fractions": {"Fraction"},
}
VALUES = (
    *(int, float, complex, str, list, dict, set, frozenset, tuple, range, bool),
    *(fractions.Fraction, datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
)
ATTRIBUTES = (
    {name for value in VALUES for name in dir(value) if not name.startswith("_")} | set().union(*PUBLIC.values())
) - {"format", "format_map"}  # "{0.__class__}".format(x) reads attributes that no syntax tree shows
BUILTINS = (
    *("abs", "all", "any", "bool", "chr", "dict", "divmod", "enumerate", "filter", "float", "frozenset", "int"),
    *("isinstance", "iter", "len", "list", "map", "max", "min", "next", "ord", "pow", "range", "repr", "reversed"),
    *("round", "set", "sorted", "str", "sum", "tuple", "zip", "ArithmeticError", "AssertionError", "Exception"),
    *("IndexError", "KeyError", "NameError", "OverflowError", "RecursionError", "StopIteration", "TypeError"),
    *("ValueError", "ZeroDivisionError"),
)
NODES = (
    *(ast.Module, ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.While, ast.If, ast.Break),
    *(ast.Continue, ast.Pass, ast.FunctionDef, ast.Return, ast.Lambda, ast.arguments, ast.arg, ast.Import),
    *(ast.ImportFrom, ast.alias, ast.Try, ast.ExceptHandler, ast.Raise, ast.Assert, ast.Delete, ast.Global),
    *(ast.Nonlocal, ast.BoolOp, ast.NamedExpr, ast.BinOp, ast.UnaryOp, ast.IfExp, ast.Dict, ast.Set, ast.ListComp),
    *(ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension, ast.Yield, ast.Compare, ast.Call, ast.keyword),
    *(ast.FormattedValue, ast.JoinedStr, ast.Constant, ast.Attribute, ast.Subscript, ast.Starred, ast.Name, ast.List),
    *(ast.Tuple, ast.Slice, ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop),
)
# Numbers of the only system calls that a program's arithmetic needs: memory, time, the answer, the end.
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 25, 28, 60, 96, 131, 201, 202, 228, 231, 318)),
    "aarch64": (
        0xC00000B7,
        (57, 62, 63, 64, 80, 93, 94, 98, 113, 132, 134, 135, 139, 169, 214, 215, 216, 222, 226, 233, 278),
    ),
}  # read write close fstat lseek, mmap mprotect munmap brk mremap madvise, rt_sig* sigaltstack futex clocks, exit


class Refused(Exception):
    """The program contains something that is not allowed."""


def check(tree: ast.AST) -> None:
    """Raise Refused for the first construct outside the allowed language."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if not isinstance(node, NODES):
            raise Refused(f"line {line}: {type(node).__name__} is not allowed")
        if isinstance(node, ast.Attribute) and node.attr not in ATTRIBUTES:
            raise Refused(f"line {line}: the attribute {node.attr} is not allowed")
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name not in MODULES:
                    raise Refused(f"line {line}: the module {alias.name} is not allowed")
        if isinstance(node, ast.ImportFrom):
            public = PUBLIC.get(node.module or "", set()) if not node.level else set()
            for alias in node.names:
                if alias.name not in public:
                    raise Refused(f"line {line}: {node.module}.{alias.name} is not allowed")
        names = (
            [node.id] if isinstance(node, ast.Name)
            else [node.name] if isinstance(node, (ast.FunctionDef, ast.ExceptHandler)) and node.name
            else [node.arg] if isinstance(node, (ast.arg, ast.keyword)) and node.arg
            else [alias.asname or alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom))
            else node.names if isinstance(node, (ast.Global, ast.Nonlocal))
            else []
        )  # fmt: skip
        for name in names:
            if name.startswith("__"):
                raise Refused(f"line {line}: the name {name} is not allowed")


def run(code: CodeType, builtins: dict[str, Any]) -> Any:
    """What `solution()` returns, else what the name `answer` or `ans` holds, else the last line that was printed."""
    scope: dict[str, Any] = {"__builtins__": builtins, "__name__": "program"}
    exec(code, scope)  # this is the program; the doors are shut
    if callable(scope.get("solution")):
        return scope["solution"]()
    for name in ("answer", "ans"):
        if name in scope:
            return scope[name]
    return builtins["print"].lines[-1] if builtins["print"].lines else None


class Print:
    """`print` that keeps a bounded number of characters and reaches no file."""

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.lines: list[str] = []

    def __call__(self, *values: Any, sep: str = " ", end: str = "\n", **_: Any) -> None:
        """Keep a line. Raises OverflowError when the program prints too much."""
        text = (sep or "").join(map(str, values))
        self.left -= len(text) + 1
        if self.left < 0:
            raise OverflowError("too much output")
        self.lines.append(text)


def import_allowed(name: str, scope: Any = None, local: Any = None, wanted: Any = (), level: int = 0) -> ModuleType:
    """`__import__` of the modules that were loaded before."""
    if level or name not in MODULES:
        raise ImportError(f"the module {name} is not allowed")
    return MODULES[name]


def limit_resources(limits: dict[str, int]) -> None:
    """CPU seconds, bytes of address space, no file bytes, no processes, no core."""
    import resource

    wanted = {
        "RLIMIT_CPU": limits["cpu_seconds"],
        "RLIMIT_AS": limits["memory_bytes"],
        "RLIMIT_DATA": limits["memory_bytes"],
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NPROC": 0,
        "RLIMIT_NOFILE": 3,
        "RLIMIT_CORE": 0,
    }
    for name, value in wanted.items():
        if hasattr(resource, name):
            hard = resource.getrlimit(getattr(resource, name))[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            try:
                resource.setrlimit(getattr(resource, name), (value, value))
            except (ValueError, OSError):
                if name in ("RLIMIT_CPU", "RLIMIT_FSIZE"):
                    raise  # macOS refuses limits of memory only


def leave_namespaces(libc: Any) -> bool:
    """Into namespaces without network, neighbours or files, rid of every privilege. False where it is not allowed."""
    user, mounts, network, names, messages = 0x10000000, 0x00020000, 0x40000000, 0x04000000, 0x08000000
    if not hasattr(libc, "unshare") or libc.unshare(user | mounts | network | names | messages) != 0:
        return False
    if libc.chroot(b".") != 0 or libc.chdir(b"/") != 0:
        return False

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    nothing = (ctypes.c_uint32 * 6)()
    return libc.capset(ctypes.byref(Header(0x20080522, 0)), nothing) == 0


def filter_system_calls(libc: Any) -> bool:
    """Every system call but those of `SYSTEM_CALLS` fails with EPERM from now on. False where there is no filter."""
    if platform.machine() not in SYSTEM_CALLS or sys.platform != "linux":
        return False
    architecture, allowed = SYSTEM_CALLS[platform.machine()]
    load, equal, give = 0x20, 0x15, 0x06  # BPF: load a word, jump if equal, return
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | 1, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(equal, len(allowed) - index, 0, number) for index, number in enumerate(allowed)]
    program += [(give, 0, 0, refuse), (give, 0, 0, allow)]

    class Instruction(ctypes.Structure):
        _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction)))

    instructions = (Instruction * len(program))(*(Instruction(*one) for one in program))
    no_new_privileges, set_filter, filter_mode = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) != 0:
        return False
    return libc.prctl(set_filter, filter_mode, ctypes.byref(Filter(len(program), instructions)), 0, 0) == 0


def deny_events(event: str, _arguments: Any) -> None:
    """An audit hook: nothing that Python reports (files, sockets, processes, frames, imports) may happen any more."""
    if event != "exec":  # the program itself; `exec` is no builtin of it
        raise PermissionError(f"{event} is not allowed")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Check and run the program of a request; every failure of the program is an answer, too."""
    layers = request["layers"]
    try:
        tree = ast.parse(request["source"])
        if "language" in layers:
            check(tree)
        code = compile(tree, "program", "exec")
    except Refused as error:
        return {"kind": "refused", "error": str(error)}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"kind": "syntax", "error": f"{type(error).__name__}: {error}"}
    builtins = vars(sys.modules["builtins"]).copy()
    if "language" in layers:
        builtins = {name: builtins[name] for name in BUILTINS} | {"__import__": import_allowed}
    builtins["print"] = Print(request["output_bytes"])
    if "audit" in layers:
        sys.addaudithook(deny_events)
    try:
        value = run(code, builtins)
        if value is None:
            return {"kind": "nothing", "error": "the program returns nothing"}
        if isinstance(value, fractions.Fraction):
            value = float(value)
        if not isinstance(value, (bool, int, float, str)):
            return {
                "kind": "error",
                "error": f"TypeError: the result is a {type(value).__name__}, not a number or text",
            }
        if isinstance(value, str) and len(value) > request["output_bytes"]:
            return {"kind": "output", "error": "the result is too long"}
        # text of a number, so that infinities survive JSON; a class of the program's own cannot be among these
        return {
            "kind": "value",
            "type": type(value).__name__,
            "value": value if isinstance(value, str) else repr(value),
        }
    except MemoryError:
        return {"kind": "memory", "error": "MemoryError"}
    except OverflowError as error:
        return {"kind": "output" if "output" in str(error) else "error", "error": f"OverflowError: {error}"}
    except BaseException as error:  # a program may raise whatever it likes, SystemExit included
        return {"kind": "error", "error": f"{type(error).__name__}: {error}"}


def shut_and_answer(request: dict[str, Any]) -> None:
    """In the fork: shut the doors, run the program, write the answer to standard output, end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if "limits" in request["layers"]:
        limit_resources(request["limits"])
    shut = []
    if "system_calls" in request["layers"] and filter_system_calls(libc):
        shut.append("system_calls")
    elif "namespaces" in request["layers"] and leave_namespaces(libc):
        shut.append("namespaces")  # only then: the kernel takes up to seconds to clear namespaces away
    if not shut and request["kernel_required"]:
        found = {"kind": "unprotected", "error": "the kernel offers neither namespaces nor a filter of system calls"}
    else:
        found = answer(request)
    if "error" in found:
        found["error"] = found["error"][:500]
    os.write(1, json.dumps(found | {"shut": shut}).encode() + b"\n")


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Run one program in a fork: its exit status (null: the clock ran out), and what it wrote, up to a bound."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)  # the requests of others are not its own
            os.dup2(writing, 1)
            os.closerange(3, max(nothing, reading, writing) + 1)
            shut_and_answer(request)
        finally:
            os._exit(0)  # no handlers of the program's run at exit
    os.close(writing)
    deadline, text, timed_out = time.monotonic() + request["wall_seconds"], b"", False
    while len(text) <= request["most_bytes"]:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            timed_out = True
            break
        piece = os.read(reading, 65536)
        if not piece:
            break
        text += piece
    os.kill(process, signal.SIGKILL)  # it is not waited for yet, so this is no one else's number
    _, status = os.waitpid(process, 0)
    os.close(reading)
    code = None if timed_out else os.waitstatus_to_exitcode(status)
    if len(text) > request["most_bytes"]:
        code, text = 1, b""
    return {"status": code, "text": text.decode("utf-8", "replace")}


def main() -> None:
    """Answer requests until there are no more."""
    for line in sys.stdin.buffer:
        sys.stdout.write(json.dumps(serve(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
