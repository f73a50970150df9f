"""What each operation does to channel labels.

Data movement is executed on the labels by the very same operation; contractions, norms, reductions and element-wise
operations have a rule of a few lines each; everything else blocks the channels it touches. A rule takes the tracer
and the call and returns what is known about each output (None: nothing, a constant).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from intrafusion.trace.info import Result
from intrafusion.trace.rules import contraction, convolution, elementwise, movement, norm, reduction
from intrafusion.trace.rules.refusal import refuse

if TYPE_CHECKING:
    from intrafusion.trace.tracer import Call, Tracer

Rule = Callable[["Tracer", "Call"], Result]

BY_NAME: dict[str, Rule] = {
    **dict.fromkeys(movement.IDENTITIES, movement.identity),
    **dict.fromkeys(movement.MOVES, movement.move),
    **dict.fromkeys(("cat", "stack"), movement.concatenate),
    **dict.fromkeys(movement.FACTORIES, movement.constant),
    **dict.fromkeys(("fill", "zero"), movement.constant),
    "copy": movement.copy,
    "view_as_real": movement.view_as_real,
    "view_as_complex": movement.view_as_complex,
    "embedding": contraction.embedding,
    "linear": contraction.linear_layer,
    **dict.fromkeys(contraction.PRODUCTS, contraction.product),
    "convolution": convolution.convolution,
    **dict.fromkeys(norm.NORMS, norm.norm),
    "_weight_norm_interface": norm.weight_norm,
    **dict.fromkeys(reduction.REDUCTIONS, reduction.reduction),
    **dict.fromkeys(reduction.SOFTMAXES, reduction.softmax),
    **dict.fromkeys(reduction.ORDERED, reduction.ordered),
    "glu": elementwise.glu,
    **dict.fromkeys(("tril", "triu"), elementwise.triangle),
    "rrelu_with_noise": elementwise.first_alone,
    **dict.fromkeys(elementwise.EXTRA, elementwise.elementwise),
}


def rule_for(call: Call) -> Rule:
    """The rule of an operation; operations that torch tags as pointwise are element-wise, unknown ones are refused."""
    if "out" in call.kwargs or call.func._overloadname == "dtype":
        return refuse
    if call.name in BY_NAME:
        return BY_NAME[call.name]
    if torch.Tag.pointwise in call.func.tags:
        return elementwise.elementwise
    if call.name.startswith(reduction.POOLS):
        return reduction.pool
    return refuse
