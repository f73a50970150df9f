"""Passes that wait for each other: one runs at a time, all end together, and each thread is set up as the first."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from intrafusion.restore.lockstep import Turn, run_in_lockstep


def none_left() -> bool:
    return not any(thread.name == "intrafusion batch" for thread in threading.enumerate())


def walk(*keys: str, log: list[Any] | None = None, name: str = "") -> Callable[[Turn], None]:
    """A pass that stands at each of these keys with its name, and logs what it is answered."""

    def run(turn: Turn) -> None:
        for key in keys:
            answer = turn.wait(key, name)
            if log is not None:
                log.append((name, key, answer))

    return run


def test_all_stand_at_a_key_before_any_goes_on() -> None:
    log: list[Any] = []

    def meet(key: str, brought: Sequence[str]) -> list[str]:
        log.append((key, list(brought)))
        return [f"{key}{name}" for name in brought]

    run_in_lockstep([walk("x", "y", log=log, name=name) for name in "abc"], meet)
    assert log == [
        *(("x", ["a", "b", "c"]), ("a", "x", "xa"), ("b", "x", "xb"), ("c", "x", "xc")),
        *(("y", ["a", "b", "c"]), ("a", "y", "ya"), ("b", "y", "yb"), ("c", "y", "yc")),
    ]
    assert none_left()


def test_one_alone_runs_without_a_thread() -> None:
    seen = []
    run_in_lockstep(
        [lambda turn: seen.append((threading.current_thread(), turn.wait("x", 2)))], lambda k, b: [b[0] * 3]
    )
    assert seen == [(threading.main_thread(), 6)]


def test_each_stretch_runs_in_its_context() -> None:
    log: list[Any] = []

    @contextlib.contextmanager
    def around(index: int) -> Iterator[None]:
        log.append(f"+{index}")
        yield
        log.append(f"-{index}")

    run_in_lockstep([walk("x"), walk("x")], lambda key, brought: brought, around=around)
    assert log == ["+0", "-0", "+1", "-1"] * 2


def test_those_behind_go_on_unanswered_where_passes_part_ways() -> None:
    log: list[Any] = []
    parted: list[str] = []
    passes = [walk(*keys, log=log, name=keys) for keys in ("xyz", "xz", "yxz", "zw")]
    run_in_lockstep(passes, lambda key, brought: [key] * len(brought), "xyzw", parted=parted.append)
    assert {(key, answer) for _, key, answer in log} == {("x", None), ("y", None), ("z", "z"), ("w", None)}
    assert set(parted) == {"x", "y", "w"}


@pytest.mark.parametrize("where", ["pass", "meeting"])
def test_an_error_ends_all_and_is_the_one_raised(where: str) -> None:
    ended: list[int] = []

    def run(index: int, turn: Turn) -> None:
        try:
            turn.wait("x", index)
            if index == 1 and where == "pass":
                raise ValueError("of the second")
            turn.wait("y", index)
        finally:
            ended.append(index)

    def meet(key: str, brought: list[int]) -> list[int]:
        if where == "meeting":
            raise ValueError("of the second")
        return brought

    with pytest.raises(ValueError, match="of the second"):
        run_in_lockstep([lambda turn, i=i: run(i, turn) for i in range(4)], meet)
    assert sorted(ended) == [0, 1, 2, 3]
    assert none_left()


def test_an_interrupt_ends_a_pass_in_the_middle_of_its_work() -> None:
    leads = ctypes.c_ulong(threading.get_ident())  # which need not be the main thread, where tests run side by side

    def run(turn: Turn) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(leads, ctypes.py_object(KeyboardInterrupt))
        while True:
            turn.check()
            time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        run_in_lockstep([run, walk("x")], lambda key, brought: brought)
    assert none_left()


class Counting(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


VARIABLE: contextvars.ContextVar[int] = contextvars.ContextVar("VARIABLE", default=0)


def test_threads_take_over_what_is_set_for_a_thread() -> None:
    found: list[Any] = []

    def run(turn: Turn) -> None:
        x = torch.ones(2, 2) @ torch.ones(2, 2)
        found.append((torch.is_grad_enabled(), x.dtype, VARIABLE.get(), torch.is_inference_mode_enabled()))
        found.append(torch.empty(1).device.type)
        turn.wait("x", None)

    VARIABLE.set(7)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), Counting() as mode:
        run_in_lockstep([run, run], lambda key, brought: brought)
    with torch.inference_mode(), torch.device("meta"):
        run_in_lockstep([run, run], lambda key, brought: brought)
    assert found[:4] == [(False, torch.bfloat16, 7, False), "cpu"] * 2
    assert found[4:] == [(False, torch.float32, 7, True), "meta"] * 2
    assert mode.seen >= 6
    assert torch.empty(1).device.type == "cpu"
