"""Runs the snippet in a child that is already locked down.

It does what Python does with a script, in a process that was not started for it. Nothing here is trusted by anyone: the
snippet shares the process and may rewrite all of it.
"""

from __future__ import annotations
import __future__

import ast
import atexit
import contextlib
import ctypes
import gc
import json
import linecache
import os
import random
import resource
import signal
import sys
import threading
import types
from typing import Any

from .messages import REPORT_BYTES

FILE_NAME = "main.py"
"""Name of the snippet in tracebacks."""

BALLAST_BYTES = 4 << 20
"""A few of the allocator's arenas."""

_FUTURE_FLAGS = 0
for _name in __future__.all_feature_names:
    _FUTURE_FLAGS |= getattr(__future__, _name).compiler_flag


def prepare() -> types.ModuleType:
    """Set up what ``python main.py`` would find; part of no one's waiting time. Returns its main module, empty."""
    module = types.ModuleType("__main__")
    module.__file__ = f"/tmp/{FILE_NAME}"  # noqa: S108  the private tmpfs of this run
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    sys.argv = [FILE_NAME]
    sys.path.insert(0, "/tmp")  # noqa: S108  where a script's own folder stands
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return module


def run(module: types.ModuleType, source: bytes, *, echo: bool, seed: int | None, report: int) -> int:
    """Run a snippet as ``python main.py`` would and return its exit code.

    Args:
        module: what :func:`prepare` returned.
        source: UTF-8 text of the snippet, as received.
        echo: whether the value of a last expression is shown as the interactive interpreter does.
        seed: seed of the random generators; None takes one from the operating system.
        report: address of the shared page for the uncaught exception.
    """
    reseed(seed, source)
    gc.enable()
    # Freed when something goes wrong: even building a traceback needs memory, and a MemoryError may have left none.
    # ``bytes`` comes zeroed from the kernel, untouched and so never resident; a bytearray would write to every page.
    ballast = bytes(BALLAST_BYTES)
    exit_code = 0
    try:
        for code in _compile(source, echo):
            exec(code, module.__dict__)  # noqa: S102  what this service is for
    except BaseException as error:
        del ballast
        exit_code = _uncaught(error, report)
    return _finish(module, exit_code)


def reseed(seed: int | None, source: bytes = b"") -> None:
    """Seed every generator that a fork shares with its siblings: ``random``, numpy's global one and sympy's.

    A seeded run that mentions numpy loads it first, so that a seed means the same whether or not numpy was preloaded.
    """
    random.seed(seed)
    if seed is not None and b"numpy" in source:
        with contextlib.suppress(ImportError):
            import numpy  # noqa: F401
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed(int.from_bytes(os.urandom(4), "little") if seed is None else seed)
    if (sympy_random := sys.modules.get("sympy.core.random")) is not None:
        sympy_random.seed(seed)


def _compile(source: bytes, echo: bool) -> list[types.CodeType]:
    """The snippet as code objects.

    With echo, a last expression becomes one of its own, compiled in interactive mode, at its own lines.
    """
    text = source.decode("utf-8")
    linecache.cache[FILE_NAME] = (len(text), None, text.splitlines(keepends=True), FILE_NAME)
    if not echo:
        return [compile(text, FILE_NAME, "exec", dont_inherit=True)]
    tree = ast.parse(text, FILE_NAME)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    code = compile(tree, FILE_NAME, "exec", dont_inherit=True)
    if last is None:
        return [code]
    shown = compile(
        ast.Interactive([last]), FILE_NAME, "single", flags=code.co_flags & _FUTURE_FLAGS, dont_inherit=True
    )
    return [code, shown]


def _uncaught(error: BaseException, report: int) -> int:
    """Print an uncaught exception as Python does, leave it on the report page, and return the exit code."""
    if isinstance(error, MemoryError):
        # The soft limit is what the snippet ran into; the reserve above it is for printing why.
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    if isinstance(error, SystemExit):
        exit_code = _system_exit_code(error)
        if exit_code:
            write_report(report, {"type": "SystemExit", "message": _text(error.code), "line": _line(error)})
        return exit_code
    write_report(
        report,
        {
            "type": type(error).__name__,
            "message": _text(error),
            "line": _line(error),
            "memory": isinstance(error, MemoryError),
        },
    )
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__") == __name__:
        traceback = traceback.tb_next  # frames of this file are not the snippet's
    error.__traceback__ = traceback
    with contextlib.suppress(BaseException):
        sys.excepthook(type(error), error, traceback)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _system_exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    with contextlib.suppress(BaseException):
        print(error.code, file=sys.stderr)
    return 1


def _text(value: object) -> str:
    """``str(value)``, bounded, whatever a hostile ``__str__`` does."""
    try:
        return str(value)[:300]
    except BaseException:
        return "<unprintable>"


def _line(error: BaseException) -> int | None:
    """Line of the snippet that raised: the innermost frame in it, or where it does not parse."""
    if isinstance(error, SyntaxError) and error.filename == FILE_NAME:
        return error.lineno
    line = None
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == FILE_NAME:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def _finish(module: types.ModuleType, exit_code: int) -> int:
    """Do what the interpreter does at its end: threads, atexit functions, finalizers of the globals, flush."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for name in [n for n in module.__dict__ if n != "__builtins__"]:
            module.__dict__[name] = None
        gc.collect()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        return exit_code or 120
    return exit_code


def write_report(report: int, content: dict[str, Any]) -> None:
    """Leave a JSON object, ended by a zero byte, on the shared page."""
    with contextlib.suppress(BaseException):
        # 300 characters of at most six bytes each (JSON's \\u escapes): type and message together stay below the page.
        content = {key: value[:300] if isinstance(value, str) else value for key, value in content.items()}
        data = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")[: REPORT_BYTES - 1] + b"\0"
        ctypes.memmove(report, data, len(data))
