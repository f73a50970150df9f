"""Example inputs: how a network is called, and the same call in another precision or with other values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from intrafusion.errors import ModelError


@dataclass(frozen=True, eq=False)
class Inputs:
    """Positional and keyword arguments of one forward call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, example: ExampleInputs) -> Inputs:
        """A tensor is one argument, a tuple or list is all positional ones, a dict is all keyword ones."""
        if isinstance(example, Inputs):
            return example
        if isinstance(example, Mapping):
            return cls((), dict(example))
        if isinstance(example, (tuple, list)):
            return cls(tuple(example))
        if isinstance(example, Tensor):
            return cls((example,))
        raise ModelError(
            f"example_inputs: expected a tensor, a tuple of positional or a dict of keyword arguments, "
            f"got {type(example).__name__}."
        )

    def call(self, model: nn.Module) -> list[Tensor]:
        """Run the network and return every tensor of its output, in a fixed order.

        Raises:
            ModelError: the forward pass fails on these inputs, or returns no tensor.
        """
        try:
            output = model(*self.args, **(self.kwargs or {}))
        except Exception as error:
            raise ModelError(
                f"the network ({type(model).__name__}) does not run on the example inputs {self}: "
                f"{type(error).__name__}: {error}. Pass inputs of the shape and type that `model(...)` takes."
            ) from error
        outputs = output_tensors(output)
        if not outputs:
            raise ModelError(
                f"the network returns no tensor on {self}, but a {type(output).__name__}; wrap its forward."
            )
        return outputs

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs or {}))) if isinstance(leaf, Tensor)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same call with every tensor replaced by function(tensor)."""
        change = lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf  # noqa: E731
        return Inputs(tree_map(change, self.args), tree_map(change, dict(self.kwargs or {})))

    def double(self) -> Inputs:
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def varied(self, seed: int = 0) -> Inputs:
        """Nearby inputs in which no two values coincide, so that nothing looks constant by accident."""
        generator = torch.Generator().manual_seed(seed)

        def vary(t: Tensor) -> Tensor:
            if not t.is_floating_point() or t.numel() == 0:
                return t
            noise = torch.rand(t.shape, generator=generator).to(t) - 0.5
            return t + 0.2 * t.abs().mean().clamp(min=1e-3) * noise

        return self.map(vary)

    def __str__(self) -> str:
        describe = lambda t: f"{str(t.dtype)[6:]}{list(t.shape)}"  # noqa: E731
        return f"({', '.join(map(describe, self.tensors()))})"


def output_tensors(output: Any) -> list[Tensor]:
    """Every tensor in what a forward returned: a tensor, tuples, dicts, Hugging Face outputs, dataclasses."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    elif hasattr(output, "__dataclass_fields__"):
        output = vars(output)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any] | Inputs
