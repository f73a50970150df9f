"""How long a forward pass takes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from intrafusion.arguments import Count, Natural, checked
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.outputs import read_iterators
from intrafusion.network.state import preserve_state


@checked
def latency_ms(model: nn.Module, example_inputs: ExampleInputs, *, repeats: Count = 15, warmup: Natural = 3) -> float:
    """Median wall-clock milliseconds of one forward call on these inputs, in evaluation mode without gradients."""
    return latencies_ms([model], example_inputs, repeats=repeats, warmup=warmup)[0]


@checked
def latencies_ms(
    models: Sequence[nn.Module], example_inputs: ExampleInputs, *, repeats: Count = 15, warmup: Natural = 3
) -> list[float]:
    """`latency_ms` of several networks that take turns, so that a machine that slows down does for all of them."""
    taken = time_turns(models, example_inputs, repeats=repeats, warmup=warmup)
    return [statistics.median(times) for times in taken]


def time_turns(
    models: Sequence[nn.Module],
    example_inputs: ExampleInputs,
    *,
    repeats: int,
    warmup: int,
    seconds: float = float("inf"),
) -> list[list[float]]:
    """Milliseconds of forward calls of several networks that take turns, as many of each.

    Args:
        seconds: no turn begins after so many, but for the first that is timed.
    Raises:
        ModelError: one of the networks does not run on these inputs.
    """
    inputs = Inputs.of(example_inputs)
    cuda = any(p.is_cuda for model in models for p in model.parameters())
    taken: list[list[float]] = [[] for _ in models]
    end = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(preserve_state(model))
            inputs.call(model)  # refused in words if it does not run
        for index in range(warmup + repeats):
            over = time.monotonic() > end
            if over and taken[0]:
                break
            for model, times in zip(models, taken, strict=True):
                milliseconds = _time_ms(model, inputs.copied(), cuda=cuda)
                if over or index >= warmup:
                    times.append(milliseconds)
    return taken


def _time_ms(model: nn.Module, given: Inputs, *, cuda: bool) -> float:
    if cuda:  # the copy of the inputs is no part of it
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.inference_mode():
        read_iterators(model(*given.args, **(given.kwargs or {})))
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)
