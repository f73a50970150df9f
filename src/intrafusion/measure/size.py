"""How large a network is: parameters, and multiply-accumulates of one forward pass."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.state import preserve_state
from intrafusion.trace.decomposition import decompose


@dataclass(frozen=True)
class Size:
    """Parameters, and multiply-accumulates for the example inputs as they were given (the whole batch)."""

    params: int
    macs: int


class _MacCounter(TorchDispatchMode):
    """Adds up the work of every operation that PyTorch's flop counter has a formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def size_of(model: nn.Module, example_inputs: ExampleInputs) -> Size:
    """Count parameters (shared ones once) and the MACs of convolutions and matrix products on these inputs.

    Attention and recurrent layers count with all their matrix products, fused kernels or not.

    >>> size_of(nn.Linear(4, 3), torch.zeros(2, 4))
    Size(params=15, macs=24)
    """
    with preserve_state(model), torch.no_grad(), decompose(model), _MacCounter() as counter:
        Inputs.of(example_inputs).call(model)
    return Size(sum(p.numel() for p in model.parameters()), counter.flops // 2)


def macs_by_weight(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, float]:
    """Multiply-accumulates of each module that owns a weight, by the name of the weight; nested modules count apart."""
    spent: dict[str, float] = {}
    stack: list[float] = []
    with preserve_state(model), torch.no_grad(), decompose(model), _MacCounter() as counter, ExitStack() as hooks:

        def entered(module: nn.Module, args: Any) -> None:
            stack.append(counter.flops)

        def left(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                spent[name] = spent.get(name, 0.0) + (counter.flops - stack.pop()) / 2

            return hook

        first: dict[int, str] = {}
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() > 1 and not list(module.children()):
                key = first.setdefault(id(weight), f"{name}.weight" if name else "weight")
                hooks.callback(module.register_forward_pre_hook(entered).remove)
                hooks.callback(module.register_forward_hook(left(key)).remove)
        Inputs.of(example_inputs).call(model)
    return spent
