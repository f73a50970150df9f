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
    inputs = Inputs.of(example_inputs)
    cuda = any(p.is_cuda for model in models for p in model.parameters())
    times: list[list[float]] = [[] for _ in models]
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(preserve_state(model))
            inputs.call(model)  # refused in words if it does not run
        for index in range(warmup + repeats):
            for model, taken in zip(models, times, strict=True):
                milliseconds = _time_ms(model, inputs.copied(), cuda=cuda)
                if index >= warmup:
                    taken.append(milliseconds)
    return [statistics.median(taken) for taken in times]


def _time_ms(model: nn.Module, given: Inputs, *, cuda: bool) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        read_iterators(model(*given.args, **(given.kwargs or {})))
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)
