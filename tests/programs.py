"""Runs Python programs as `python` does, each in a process of its own, without the seconds that importing torch takes.

The processes are forked from one that has imported the library and nothing of pytest or of a test.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
import tempfile
import types
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from subprocess import CompletedProcess

import pytest

SOURCES = Path(__file__).parents[1] / "src"
IMPORTED = ["intrafusion.cli.main", "intrafusion.pipeline", "intrafusion.frontiers", "safetensors.torch", "ot"]


def run(
    arguments: Sequence[str],
    folder: Path | None = None,
    *,
    out: str | Path | None = None,
    err: str | Path | None = None,
    **environment: str,
) -> CompletedProcess[str]:
    """What a program prints, and how it ends.

    Args:
        arguments: what stands behind `python`: a script, `-m` and a module, or `-c` and code; `-W` is always.
        out, err: files or devices that standard output and standard error go to; what goes to a device is not returned.
    """
    with tempfile.TemporaryDirectory() as place:
        files = Path(out or Path(place, "out")), Path(err or Path(place, "err"))
        own = {**os.environ, **environment}
        process = _context().Process(target=_be_program, args=(list(arguments), folder or Path.cwd(), own, files))
        process.start()
        process.join()
        told = [file.read_text() if file.is_file() else "" for file in files]
    assert process.exitcode is not None
    return CompletedProcess(["python", *arguments], process.exitcode, *told)


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SOURCES))
        multiprocessing.forkserver.ensure_running()
    return context


def _be_program(arguments: list[str], folder: Path, environment: Mapping[str, str], files: tuple[Path, Path]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tests = str(Path(__file__).parent)
    sys.path[:] = [path for path in sys.path if path not in ("", tests)]
    warnings.simplefilter("always")
    _run_as_python(arguments)


def _run_as_python(arguments: list[str]) -> None:
    flag = arguments[0]
    sys.argv = arguments[flag in ("-c", "-m") :]
    sys.path.insert(0, os.getcwd() if flag in ("-c", "-m") else str(Path(flag).resolve().parent))
    if flag == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif flag == "-c":
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(sys.argv[0], vars(sys.modules["__main__"]))
    else:
        runpy.run_path(flag, run_name="__main__")
