"""How long a forward pass takes."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.outputs import read_iterators
from intrafusion.network.state import preserve_state


def latency_ms(model: nn.Module, example_inputs: ExampleInputs, *, repeats: int = 15, warmup: int = 3) -> float:
    """Median wall-clock milliseconds of one forward call on these inputs, in evaluation mode without gradients."""
    inputs = Inputs.of(example_inputs)
    cuda = any(p.is_cuda for p in model.parameters())
    times = []
    with preserve_state(model):
        inputs.call(model)  # refused in words if it does not run
        for index in range(warmup + repeats):
            given = inputs.copied()
            start = time.perf_counter()
            with torch.inference_mode():
                read_iterators(model(*given.args, **(given.kwargs or {})))
            if cuda:
                torch.cuda.synchronize()
            if index >= warmup:
                times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
