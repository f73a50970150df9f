"""How large a network is: parameters, and multiply-accumulates of one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from intrafusion.arguments import checked
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.trace.decomposition import decompose
from intrafusion.trace.products import Factors, Product, Products


@checked
@dataclass(frozen=True)
class Size:
    """Parameters, and multiply-accumulates for the example inputs as they were given (the whole batch)."""

    params: int
    macs: int


@checked
def size_of(model: nn.Module, example_inputs: ExampleInputs) -> Size:
    """Count parameters (shared ones once) and the MACs of convolutions and matrix products on these inputs.

    Every product counts, whatever calls it: layers, functions, attention and recurrent layers with all of theirs, fused
    kernels or not.

    >>> import torch
    >>> size_of(nn.Linear(4, 3), torch.zeros(2, 4))
    Size(params=15, macs=24)
    """
    macs = sum(math.prod(factors) for factors in factors_of_products(model, example_inputs))
    return Size(params_of(model), macs)


@checked
def params_of(model: nn.Module) -> int:
    """Entries of all parameters, shared ones once.

    >>> params_of(nn.Linear(4, 3))
    15
    """
    return sum(p.numel() for p in model.parameters())


@checked
def factors_of_products(model: nn.Module, example_inputs: ExampleInputs) -> list[Factors]:
    """Of every convolution and matrix product of a forward pass, in order, the sizes of which its MACs are the product.

    >>> import torch
    >>> factors_of_products(nn.Linear(4, 3), torch.zeros(2, 4))
    [(2, 4, 3)]
    """
    found: list[Factors] = []
    _watch(model, example_inputs, lambda product: found.append(product.factors))
    return found


@checked
def macs_by_weight(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, float]:
    """Multiply-accumulates of the products that each weight enters, by its name; of several weights, the largest.

    A weight may have been moved, scaled, or computed from others before; who owns it, and whether a module or a
    function multiplies by it, does not matter. Products of two activations, as in attention, belong to no weight.
    """
    tensors, spent = named_tensors(model), dict[str, float]()

    def seen(product: Product) -> None:
        if product.weights:
            name = max(sorted(product.weights), key=lambda n: tensors[n].numel())
            spent[name] = spent.get(name, 0.0) + product.macs

    _watch(model, example_inputs, seen)
    return spent


def _watch(model: nn.Module, example_inputs: ExampleInputs, seen: Callable[[Product], None]) -> None:
    inputs = Inputs.of(example_inputs)
    with preserve_state(model), decompose(model), Products(named_tensors(model), inputs, seen):
        inputs.call(model)
