"""Example inputs: how a network is called, and the same call in another precision or with other values."""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from intrafusion.arguments import check_by, checked
from intrafusion.brief import show_briefly
from intrafusion.errors import IntrafusionError, ModelError, is_own_fault, show
from intrafusion.network.outputs import Opened, name_entries, open_output, pick_outputs, read_iterators
from intrafusion.network.row_weights import SHUT, RowWeights


@checked
@dataclass(frozen=True, eq=False)
class Inputs:
    """Positional and keyword arguments of one forward call.

    Attributes:
        source: what messages call them.
        labels: what came with a batch of images and is no argument.
        weights: how much its positions count, where it has a mask; see `row_weights`.
        outputs: names or indices of those outputs of the network that matter; None for all.
        turned: positions and names of arguments that the network takes with the images along their second dimension;
            here these run along the first of all.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    source: str = "the example inputs"
    labels: Tensor | None = None
    weights: RowWeights | None = None
    outputs: tuple[str | int, ...] | None = None
    turned: tuple[int | str, ...] = ()

    __repr__ = show_briefly

    @classmethod
    def of(cls, example: ExampleInputs) -> Inputs:
        """A tensor is one argument, a tuple or list is all positional ones, a dict is all keyword ones."""
        if isinstance(example, Inputs):
            return example
        _check_depth(example)
        _check_caches(example)
        _check_nested(example)
        if isinstance(example, Mapping):
            return cls((), _check_keywords(example))
        if isinstance(example, (tuple, list)):
            return cls(tuple(example))
        if isinstance(example, Tensor):
            return cls((example,))
        is_array = type(example).__module__ == "numpy"
        advice = "torch.from_numpy(...) makes a tensor of it" if is_array else "pass what one call of the network takes"
        advice = f"pass {_TOKENIZED}" if isinstance(example, str) else advice
        raise ModelError(
            "example_inputs: expected a tensor, a tuple of positional or a dict of keyword arguments, "
            f"got {show(example)}; {advice}."
        )

    def call(self, model: nn.Module) -> list[Tensor]:
        """Run the network on a copy of the inputs and return every tensor of its output, in a fixed order.

        They have no history, also where a forward differentiates itself.

        Raises:
            ModelError: the forward pass fails on these inputs, or returns no tensor.
        """
        return self.turn_outputs([t.detach() if t.requires_grad else t for t in self.opened(model).tensors])

    def opened(self, model: nn.Module) -> Opened:
        """The same, with what of the output could not be looked into."""
        output = self.run(model)
        opened = open_output(output)
        opened.entries = name_entries(output)
        if not opened.tensors:
            holds = f" that holds {', '.join(opened.closed)}" if opened.closed else ""
            raise ModelError(
                f"the network returns no tensor on {self}, but a {type(output).__name__}{holds}; wrap its forward."
            )
        return opened

    def run(self, model: nn.Module) -> Any:
        """What the network returns on a copy of the inputs, whole or the `outputs` that matter; iterators are lists.

        Raises:
            ModelError: the forward pass fails on these inputs, or has no such output.
        """
        given = self.copied()
        with told_of(model, self):
            output = read_iterators(model(*given.args, **(given.kwargs or {})))
        return output if self.outputs is None else pick_outputs(output, self.outputs)

    def copied(self) -> Inputs:
        """As a network takes it, with arguments of its own, for a forward that writes into them.

        What was one tensor stays one. Tensors keep `requires_grad`, not their history.
        """
        own: dict[int, Any] = {}
        return self._changed(lambda leaf: own.setdefault(id(leaf), _own_copy(leaf))).as_taken()

    def as_taken(self) -> Inputs:
        """The call as a network takes it; see `turned`."""
        return replace(self.turn(self.turned), turned=())

    def turn(self, names: tuple[int | str, ...]) -> Inputs:
        """With the first two dimensions of these arguments in each other's place."""
        args = tuple(_swap(value) if index in names else value for index, value in enumerate(self.args))
        kwargs = {name: _swap(value) if name in names else value for name, value in (self.kwargs or {}).items()}
        return replace(self, args=args, kwargs=kwargs, turned=names) if names else self

    def turn_outputs(self, outputs: list[Tensor]) -> list[Tensor]:
        """What the network gave, with the images first where those of the arguments were turned."""
        if not self.turned:
            return outputs
        count, length = self.named[self.turned[0]].shape[:2]
        is_first = lambda t: t.dim() < 2 or t.shape[1] != count or (len(t) == count != length)  # noqa: E731
        return [t if is_first(t) else t.transpose(0, 1) for t in outputs]

    @property
    def named(self) -> dict[int | str, Any]:
        """Every argument by its position or its name."""
        return dict(enumerate(self.args)) | dict(self.kwargs or {})

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs or {}))) if isinstance(leaf, Tensor)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same call with every tensor replaced by function(tensor)."""
        return self._changed(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)

    def _changed(self, change: Callable[[Any], Any]) -> Inputs:
        return replace(self, args=tree_map(change, self.args), kwargs=tree_map(change, dict(self.kwargs or {})))

    def double(self) -> Inputs:
        double = lambda t: t.double() if t.is_floating_point() else t.to(torch.complex128) if t.is_complex() else t  # noqa: E731
        return self.map(double)

    def varied(self, seed: int = 0) -> Inputs:
        """Nearby inputs in which no two values coincide, so that nothing looks constant by accident."""
        generator = torch.Generator().manual_seed(seed)

        def vary(t: Tensor) -> Tensor:
            if not t.is_floating_point() or t.numel() == 0 or t.layout is not torch.strided:
                return t
            noise = torch.rand(t.shape, generator=generator).to(t) - 0.5
            shut = t <= SHUT  # in a mask that is added to scores; of the size of such numbers nothing else may change
            size = (t if t.is_meta else t[~shut]).abs().mean().nan_to_num().clamp(min=1e-3)
            return torch.where(shut, t, t + 0.2 * size * noise)

        return self.map(vary)

    def shapes(self) -> list[str] | None:
        """Shape and dtype of every argument, as `--input` of the command line takes them; None if one is no tensor.

        >>> Inputs((torch.zeros(2, 4),), {"mask": torch.zeros(2, 7, dtype=torch.int64)}).shapes()
        ['2,4:float32', 'mask=2,7:int64']
        """
        named = [("", value) for value in self.args] + [(f"{k}=", value) for k, value in (self.kwargs or {}).items()]
        if not all(isinstance(value, Tensor) for _, value in named):
            return None
        return [f"{name}{','.join(map(str, t.shape))}:{str(t.dtype).removeprefix('torch.')}" for name, t in named]

    def __str__(self) -> str:
        return f"({', '.join(map(describe, self.as_taken().tensors()))})"


def describe(t: Tensor) -> str:
    """As messages name a tensor, such as float32[2, 4]."""
    return f"{str(t.dtype)[6:]}{list(t.shape)}"


@contextlib.contextmanager
def told_of(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """What fails inside is told of a network that does not run on these inputs.

    Raises:
        ModelError: something failed.
    """
    try:
        yield
    except IntrafusionError:
        raise
    except Exception as error:
        raise ModelError(
            f"the network ({type(model).__name__}) does not run on {inputs.source} {inputs}: "
            f"{type(error).__name__}: {error}. {_advise_on(inputs, error)}"
        ) from error


def _advise_on(inputs: Inputs, error: Exception) -> str:
    """What to pass in place of inputs that a network does not take; or that the network is not to blame."""
    if (place := _find_own_fault(error)) is not None:
        return (
            f"That is a fault in intrafusion ({place}), not in the network or its inputs: please report it. Another "
            "reducer, or restore=None, may do without."
        )
    if "more than 1 value per channel" in str(error):
        return (
            "A norm takes its statistics from the batch, also in evaluation mode: pass two images or more in each call "
            "(drop_last=True of a DataLoader leaves out a last one)."
        )
    leaves = tree_leaves((inputs.args, dict(inputs.kwargs or {})))
    if leaves and all(isinstance(leaf, str) for leaf in leaves):
        return f"Pass {_TOKENIZED}."
    if leaves and all(type(leaf) is int for leaf in leaves):
        if inputs.kwargs:
            return f"Pass tensors, such as {_TOKENIZED}."
        return f"These are numbers: torch.randn({', '.join(map(str, leaves))}) is an input of that shape."
    return "Pass inputs of the shape and type that `model(...)` takes."


def _find_own_fault(error: Exception) -> str | None:
    """File and line of this package, if what watches the network failed and not the network itself."""
    if not is_own_fault(error) or isinstance(error, MemoryError) or "memory" in str(error):
        return None
    places = [(Path(step.filename), step.lineno) for step in traceback.extract_tb(error.__traceback__)]
    own = [f"{path.relative_to(_PACKAGE)}, line {line}" for path, line in places if path.is_relative_to(_PACKAGE)]
    return own[-1] if own else None


_PACKAGE = Path(__file__).parents[1]
_TOKENIZED = "what tokenizer(texts, padding=True, return_tensors='pt') gives"


def _check_depth(example: Any) -> None:
    try:
        tree_leaves(example)
    except RecursionError as error:
        raise ModelError(
            "example_inputs: expected tensors in a tuple or a dict, got some that are nested too deeply, or within "
            "themselves; pass what one call of the network takes."
        ) from error


def _check_caches(example: Any) -> None:
    """
    Raises:
        ModelError: keys and values of earlier tokens, which the layers of the original gave: no smaller one takes them.
    """
    for leaf in tree_leaves(example):
        length = getattr(leaf, "get_seq_length", None)
        if callable(length) and not isinstance(leaf, type) and length():
            raise ModelError(
                f"example_inputs: expected no keys and values of earlier tokens, got a {type(leaf).__name__} of "
                f"{length()} of them, which fit this network alone; leave it out: a smaller network makes its own."
            )


def _check_nested(example: Any) -> None:
    """
    Raises:
        ModelError: sequences of several lengths in one tensor.
    """
    if any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in tree_leaves(example)):
        raise ModelError(
            "example_inputs: expected tensors of one shape, got a nested tensor, which cannot be followed; pass padded "
            "sequences (torch.nested.to_padded_tensor), and a mask if the network takes one."
        )


def _check_keywords(example: Mapping[Any, Any]) -> dict[str, Any]:
    for name in example:
        if not isinstance(name, str):
            raise ModelError(
                f"example_inputs: expected the names of keyword arguments in a dict, got {show(name)}; "
                "put positional arguments into a tuple."
            )
    return dict(example)


def _swap(value: Any) -> Any:
    return value.transpose(0, 1) if isinstance(value, Tensor) and value.dim() > 1 else value


def _own_copy(leaf: Any) -> Any:
    """A plain tensor of one that is a class of its own, such as an image: what is made of it would be wrapped anew.

    A class that stands for another tensor, with a `__torch_dispatch__`, stays what it is.
    """
    if isinstance(leaf, Tensor):
        own = leaf.detach().clone().requires_grad_(leaf.requires_grad)
        stands = any("__torch_dispatch__" in kind.__dict__ for kind in type(leaf).__mro__[: -len(Tensor.__mro__)])
        return own if stands or type(leaf) is Tensor else own.as_subclass(Tensor)
    try:
        return copy.deepcopy(leaf)
    except Exception:  # an open file, a handle: nothing that a forward could be kept from changing
        return leaf


def output_tensors(output: Any) -> list[Tensor]:
    """Every tensor in what a forward returned, see `outputs.open_output`."""
    return open_output(output).tensors


ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any] | Inputs

check_by(ExampleInputs, Inputs.of)
