"""Heads that share the weight of an embedding get one of their own, so that the stream between may be rotated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.names import name_some
from intrafusion.network.double import TOLERANCE, output_difference
from intrafusion.network.inputs import Inputs
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.surgery.configuration import is_configured

_SAYS = "tie_word_embeddings"


@dataclass(frozen=True, eq=False)
class _Tie:
    """A parameter of embeddings that other modules hold too.

    Attributes:
        name: the first of its names.
        heads: the other modules, by name, and what they call it.
    """

    name: str
    parameter: nn.Parameter
    heads: tuple[tuple[str, nn.Module, str], ...]

    __repr__ = show_briefly


def _find_ties(model: nn.Module) -> Iterator[_Tie]:
    first = {id(p): name for name, p in model.named_parameters()}
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, module, attribute))
    for key, found in owners.items():
        heads = tuple(owner for owner in found if not isinstance(owner[1], nn.Embedding))
        if heads and len(heads) < len(found):
            yield _Tie(first[key], getattr(found[0][1], found[0][2]), heads)


def undo_ties(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy in which heads share no weight with an embedding; the network itself where none does.

    All other tensors are those of the network, not copies; its configuration says no more that they are tied.

    Raises:
        ModelError: the forward asks the configuration whether they are tied, and computes something else then.
    """
    if next(_find_ties(model), None) is None:
        return model
    new = copy_model(model, share=True)
    undo_ties_(new)
    with preserve_state(model), preserve_state(new):
        found, expected = inputs.call(new), inputs.call(model)
    if len(found) != len(expected) or not output_difference(found, expected) <= TOLERANCE:
        raise ModelError(
            f"untie: {type(model).__name__} gives other outputs where its configuration says {_SAYS}=False; leave "
            "untie out."
        )
    return new


def undo_ties_(model: nn.Module) -> None:
    """The same in place, and without looking at what it computes."""
    ties = list(_find_ties(model))
    for tie in ties:
        own = nn.Parameter(tie.parameter.detach().clone(), requires_grad=tie.parameter.requires_grad)
        for _, module, attribute in tie.heads:
            setattr(module, attribute, own)
    for module in model.modules() if ties else ():
        if is_configured(module):
            _write_config_(module)


def _write_config_(network: Any) -> None:
    for config in (network.config, *vars(network.config).values()):
        if getattr(config, _SAYS, None) is True:
            setattr(config, _SAYS, False)
    if hasattr(network, "all_tied_weights_keys"):  # what save_pretrained leaves out
        network.all_tied_weights_keys = network.get_expanded_tied_weights_keys(all_submodels=False)


def tell_of_untying(model: nn.Module, untied: nn.Module) -> str:
    """What became of the ties of a network, in words."""
    if untied is model:
        return "untie: no head of this network shares its weight with an embedding, so nothing was untied."
    ties = list(_find_ties(model))
    heads = [f"{name}.{attribute}".lstrip(".") for tie in ties for name, _, attribute in tie.heads]
    more = sum(t.numel() for t in named_tensors(untied).values()) - sum(
        t.numel() for t in named_tensors(model).values()
    )
    return (
        f"untied: {name_some(heads)} had the weight of {name_some([tie.name for tie in ties])}, and has one of its own "
        f"now, {more:,} parameters before it was reduced; the original is counted without them."
    )
