"""Forward passes that wait for each other: each in a thread of its own, of which only one runs at a time."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.overrides
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from intrafusion.brief import show_briefly

_LOOK_UP = 0.2  # seconds after which a thread that waits is interrupted also where no signal wakes it

Meet = Callable[[Any, list[Any]], Sequence[Any]]
"""`meet(key, brought)`: all passes stand at this key with what they brought; an answer for each."""


class Turn:
    """What a pass is given to wait with, alone or among others."""

    def __init__(self, meet: Meet) -> None:
        self.meet = meet

    def wait(self, key: Hashable, brought: Any) -> Any:
        """Stand here until all passes do; what `meet` answers this one, or None where they part ways."""
        return self.meet(key, [brought])[0]

    def check(self) -> None:
        """Called now and then, so that a pass that is to end does so before it stands again."""


def run_in_lockstep(
    passes: Sequence[Callable[[Turn], None]],
    meet: Meet,
    order: Sequence[Hashable] = (),
    *,
    around: Callable[[int], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    parted: Callable[[Any], None] = lambda key: None,
) -> None:
    """Run functions that wait for each other where they call `wait` of the turn that they are given.

    A single one runs without a thread. Of several that stand at different keys, those at the key that comes first in
    `order` go on with None, until all stand at one again. After an error in one of them, or an interrupt, all are ended
    before it is raised.

    Args:
        around: makes a context in which the pass of that number runs to where it stands next.
        parted: told of keys at which not all stand.
    """
    if len(passes) == 1:
        passes[0](Turn(meet))
        return
    settings = _Settings.of_this_thread()
    running = [_Pass(function, settings) for function in passes]
    try:
        _lead(running, meet, {key: rank for rank, key in enumerate(order)}, around, parted)
    finally:
        for one in running:
            one.end()
        for one in running:
            one.join()


def _lead(
    running: Sequence[_Pass],
    meet: Meet,
    ranks: dict[Hashable, int],
    around: Callable[[int], contextlib.AbstractContextManager[object]],
    parted: Callable[[Any], None],
) -> None:
    answers = dict[int, Any].fromkeys(range(len(running)))
    while answers:
        for index, answer in answers.items():
            with around(index):
                running[index].go_on(answer)
        standing = {index: one.key for index, one in enumerate(running) if not one.ended}
        keys = set(standing.values())
        if len(keys) == 1 and len(standing) == len(running):
            answers = dict(enumerate(meet(keys.pop(), [one.take_brought() for one in running])))
        elif standing:
            first = min(keys, key=lambda key: ranks.get(key, len(ranks)))
            parted(first)
            answers = {index: None for index, key in standing.items() if key == first}
        else:
            answers = {}


class _Ended(BaseException):
    """Raised in a pass that is to end; no error, so that no forward takes it for one of its own."""


class _Pass(Turn):
    """One of the functions, in a thread that runs only while the one that leads waits for it."""

    def __init__(self, function: Callable[[Turn], None], settings: _Settings) -> None:
        self.function, self.settings = function, settings
        self.turn, self.stands = threading.Semaphore(0), threading.Semaphore(0)
        self.key: Hashable = None
        self.brought: Any = None
        self.answer: Any = None
        self.error: BaseException | None = None
        self.ended = self.ending = False
        run = contextvars.copy_context().run
        self.thread = threading.Thread(target=run, args=(self._run,), name="intrafusion batch", daemon=True)

    def go_on(self, answer: Any) -> None:
        """Until it stands again, or has ended."""
        self.answer = answer
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.turn.release()
        while not self.stands.acquire(timeout=_LOOK_UP):
            pass
        if self.error is not None:
            raise self.error

    def take_brought(self) -> Any:
        brought, self.brought = self.brought, None
        return brought

    def end(self) -> None:
        self.ending = True
        self.turn.release()

    def join(self) -> None:
        if self.thread.ident is not None:
            self.thread.join()

    def wait(self, key: Hashable, brought: Any) -> Any:
        self.check()
        self.key, self.brought = key, brought
        self.stands.release()
        self.turn.acquire()
        self.check()
        answer, self.answer = self.answer, None
        return answer

    def check(self) -> None:
        if self.ending:
            raise _Ended

    def _run(self) -> None:
        try:
            with self.settings.taken_over():
                self.function(self)
        except _Ended:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.ended = True
            self.stands.release()


# ---- what PyTorch keeps for each thread -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Settings:
    """Modes, precision, gradients and streams as they are in one thread; a new thread starts without."""

    grad: bool
    inference: bool
    autocast: Mapping[str, tuple[bool, torch.dtype]]
    autocast_cache: bool
    function_modes: Sequence[Any]
    dispatch_modes: Sequence[Any]
    stream: torch.Stream | None

    __repr__ = show_briefly

    @classmethod
    def of_this_thread(cls) -> _Settings:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        devices = ["cpu", *([] if accelerator is None else [accelerator.type])]
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices},
            torch.is_autocast_cache_enabled(),
            list(_get_current_function_mode_stack()),
            list(_get_current_dispatch_mode_stack()),
            None if accelerator is None else torch.accelerator.current_stream(),
        )

    @contextlib.contextmanager
    def taken_over(self) -> Iterator[None]:
        """For the rest of a thread: only modes are taken away again."""
        if self.stream is not None:
            torch.accelerator.set_stream(self.stream)  # and its device
        for device, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad), self._modes():
            yield

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        """Pushed as they are: to enter one a second time may do more."""
        with contextlib.ExitStack() as stack:
            for mode in self.function_modes:
                torch.overrides._push_mode(mode)
                stack.callback(torch.overrides._pop_mode)
            for mode in self.dispatch_modes:
                _python_dispatch._push_mode(mode)
                stack.callback(_python_dispatch._pop_mode)
            yield
