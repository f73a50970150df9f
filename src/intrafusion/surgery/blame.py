"""Where in the user's code a network failed, and the numbers that are written there."""

from __future__ import annotations

import ast
import contextlib
import dis
import linecache
import textwrap
from collections.abc import Container, Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import CodeType, TracebackType

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from intrafusion.network.apart import only_here

_LONGEST = 10  # lines of an assignment
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def explain_crash(error: Exception, sizes: Container[int]) -> str:
    """An error in words: what, in which line, and whether a number in the code there is one of these old sizes."""
    cause = error.__cause__
    text = " ".join((f"{type(cause).__name__}: {cause}" if cause else str(error)).split())[:200]
    step = next((s for s in list_steps(error) if is_of_user(s.tb_frame.f_code)), None)
    if step is None:
        return text
    code, at = step.tb_frame.f_code, step.tb_lasti
    place = name_place(code, at, step.tb_lineno)
    written = [str(n) for n in find_literals(code, at) if n in sizes]
    if not written:
        return f"{text}; at {place}"
    numbers = f"{', '.join(written)} {'is' if len(written) == 1 else 'are'} written"
    return f"{text}; at {place}, where {numbers} in the code: take it from a shape, or from an attribute of the module"


def is_of_user(code: CodeType) -> bool:
    """Whether code is neither PyTorch's nor ours."""
    return not code.co_filename.startswith(_NOT_THE_USERS)


def name_place(code: CodeType, at: int, line: int = 0) -> str:
    """File and line of an instruction.

    Args:
        line: where the code does not say.
    """
    return f"{Path(code.co_filename).name}:{_find_span(code, at)[0] or line}"


def list_steps(error: BaseException) -> list[TracebackType]:
    """Where an error came through, the innermost first; of the error that caused it, where it names one."""
    while error.__cause__ is not None:
        error = error.__cause__
    steps, step = [], error.__traceback__
    while step is not None:
        steps.append(step)
        step = step.tb_next
    return steps[::-1]


@contextlib.contextmanager
def counted_calls() -> Iterator[list[str]]:
    """A list that fills with the class of each module that is called: how far a loop came, which no line says."""
    called: list[str] = []
    hook = register_module_forward_pre_hook(only_here(lambda module, _: called.append(type(module).__name__)))
    try:
        yield called
    finally:
        hook.remove()


def find_lines(step: TracebackType) -> tuple[int, int]:
    """First and last line of the expression that failed."""
    first, last, _, _ = _find_span(step.tb_frame.f_code, step.tb_lasti)
    return first or step.tb_lineno, last or first or step.tb_lineno


def _find_span(code: CodeType, at: int) -> tuple[int | None, int | None, int | None, int | None]:
    """First and last line, and first and last column."""
    return next(islice(code.co_positions(), at // 2, None), (None, None, None, None))


def find_literals(code: CodeType, at: int, *, given: bool = False) -> list[int]:
    """Whole numbers in the source of the expression that an instruction is of; none where there is no source.

    Args:
        given: only those in the arguments of a call, not in what it is called on.
    """
    first, last, start, end = _find_span(code, at)
    if first is None or last is None or start is None or end is None:
        return []
    if dis.opname[code.co_code[at]] == "UNPACK_SEQUENCE":  # of which only the targets are: what is unpacked is behind
        return _find_unpacked(code, first, start)
    lines = [linecache.getline(code.co_filename, n).encode() for n in range(first, last + 1)]
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][start:]
    try:
        tree = ast.parse(textwrap.dedent(b"\n".join(lines).decode()), mode="eval")
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    roots = [*tree.body.args, *tree.body.keywords] if given and isinstance(tree.body, ast.Call) else [tree]
    return _list_whole(roots)


def _find_unpacked(code: CodeType, line: int, start: int) -> list[int]:
    """Whole numbers in an assignment that begins here, on as many lines as it takes."""
    text = linecache.getline(code.co_filename, line).encode()[start:].decode(errors="ignore")
    for more in range(line + 1, line + _LONGEST):
        with contextlib.suppress(SyntaxError, ValueError):
            return _list_whole(ast.parse(text).body[:1])
        text += linecache.getline(code.co_filename, more)
    return []


def _list_whole(roots: Iterable[ast.AST]) -> list[int]:
    found = [node.value for root in roots for node in ast.walk(root) if isinstance(node, ast.Constant)]
    return list(dict.fromkeys(n for n in found if type(n) is int))
