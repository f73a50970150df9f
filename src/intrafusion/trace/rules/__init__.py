"""What each operation does to channel labels.

Data movement is executed on the labels by the very same operation; contractions, norms, reductions and element-wise
operations have a rule of a few lines each; everything else blocks the channels it touches. A rule takes the ledger
and the call and returns what is known about each output (None: nothing, a constant).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from intrafusion.arguments import checked
from intrafusion.errors import ArgumentError
from intrafusion.trace.call import Call
from intrafusion.trace.info import Outcome
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.rules import (
    across,
    contraction,
    convolution,
    elementwise,
    movement,
    norm,
    quantisation,
    reduction,
)
from intrafusion.trace.rules.refusal import READS, refuse

__all__ = ["Rule", "find_rule", "refuse", "register_rule"]

Rule = Callable[[Ledger, Call], Outcome]

_BY_OPERATION: dict[str, Rule] = {
    **dict.fromkeys(movement.IDENTITIES, movement.pass_on),
    **dict.fromkeys(movement.MOVES, movement.move),
    **dict.fromkeys(("cat", "stack"), movement.concatenate),
    **dict.fromkeys(movement.FACTORIES, movement.forget),
    **dict.fromkeys(("fill", "zero"), movement.forget),
    "copy": movement.overwrite,
    "view_as_real": movement.view_as_real,
    "view_as_complex": movement.view_as_complex,
    "embedding": contraction.embed,
    "linear": contraction.apply_linear,
    **dict.fromkeys(contraction.PRODUCTS, contraction.multiply),
    "convolution": convolution.convolve,
    **dict.fromkeys(norm.NORMALISATIONS, norm.normalise),
    "_weight_norm_interface": norm.reparametrise,
    **dict.fromkeys(reduction.AGGREGATIONS, reduction.summarise),
    **dict.fromkeys(reduction.SOFTMAXES, reduction.couple_by_softmax),
    **dict.fromkeys(reduction.SCANS, reduction.scan),
    **dict.fromkeys(across.WRITES, across.write_rows),
    "index_put": across.put_rows,
    "segment_reduce": across.reduce_segments,
    **dict.fromkeys(across.TRANSFORMS, across.transform),
    **dict.fromkeys(across.SAMPLERS, across.sample),
    "_pack_padded_sequence": across.pack,
    **dict.fromkeys(quantisation.PER_TENSOR, quantisation.round_alike),
    **dict.fromkeys(quantisation.PER_CHANNEL, quantisation.round_by_channel),
    **dict.fromkeys(quantisation.OBSERVED, quantisation.round_observed),
    "aminmax": quantisation.observe,
    **dict.fromkeys(across.BAGS, across.embed_bags),
    **dict.fromkeys(elementwise.DISTANCES, across.compare_rows),
    "glu": elementwise.gate,
    **dict.fromkeys(("tril", "triu"), elementwise.mask_triangle),
    "rrelu_with_noise": elementwise.keep_first,
    **dict.fromkeys(READS, partial(refuse, why="its values are read by Python")),
    **dict.fromkeys(elementwise.UNTAGGED, elementwise.combine_elementwise),
}


@checked
def register_rule(operation: str, rule: Rule, *, replace: bool = False) -> None:
    """Say what an operation does to channels, for every trace from now on.

    A rule that lies is found out where it matters: `inspect` and `compress` permute every group before they touch it.

    Args:
        operation: "mine::name" for an operation of one's own, without the overload; "name" for one of PyTorch's (aten),
            without a trailing underscore.
        rule: takes the ledger and the call, and returns what is known of the output; a list for several outputs.
        replace: an existing rule may be replaced.
    Raises:
        ArgumentError: the operation has a rule already, and `replace` is not set.
    """
    operation = operation.removeprefix("aten::")
    if operation in _BY_OPERATION and not replace:
        raise ArgumentError(f"register_rule: {operation!r} has a rule already; pass replace=True to replace it.")
    _BY_OPERATION[operation] = rule


def find_rule(call: Call) -> Rule:
    """The rule of an operation; operations that torch tags as pointwise are element-wise, unknown ones are refused."""
    if "out" in call.kwargs:
        return partial(refuse, why="written into a tensor that was given as out=")
    if call.func._overloadname == "dtype":
        return partial(refuse, why="bits read as numbers of another kind")
    if call.name in _BY_OPERATION:
        return _BY_OPERATION[call.name]
    if torch.Tag.pointwise in call.func.tags:
        return elementwise.combine_elementwise
    if call.name.startswith(reduction.POOLS):
        return reduction.pool
    return refuse
