"""Fake quantisation: numbers rounded to a grid, by one scale for a tensor or by one for each channel."""

from __future__ import annotations

from intrafusion.trace.call import Call
from intrafusion.trace.info import LabelledTensor, Outcome
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.rules.elementwise import combine
from intrafusion.trace.rules.refusal import refuse

PER_TENSOR = (
    "fake_quantize_per_tensor_affine",
    "fake_quantize_per_tensor_affine_cachemask",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "_fake_quantize_learnable_per_tensor_affine",
)
PER_CHANNEL = (
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_channel_affine_cachemask",
    "_fake_quantize_learnable_per_channel_affine",
)
OBSERVED = ("fused_moving_avg_obs_fake_quant", "_fused_moving_avg_obs_fq_helper")

_SWITCH_OFF = "switch observers off first, model.apply(torch.ao.quantization.disable_observer)"


def round_alike(ledger: Ledger, call: Call) -> Outcome:
    """One grid for all: element-wise."""
    if any(isinstance(ledger.look_up(grid), LabelledTensor) for grid in call.tensors[1:]):
        return refuse(ledger, call, "rounded to a grid that depends on the input")
    info = combine(ledger, call, call.tensors[:1], call.outputs[0].shape)
    return [info] * len(call.outputs) if len(call.outputs) > 1 else info


def round_by_channel(ledger: Ledger, call: Call) -> Outcome:
    """A grid for each channel: its zero points are whole numbers, which nothing can mix and no group holds."""
    why = "quantised with a scale and a zero point for each channel, which do not follow; use one for the tensor"
    return refuse(ledger, call, why)


def round_observed(ledger: Ledger, call: Call) -> Outcome:
    """Quantised and observed in one step, as networks are prepared for training; either may be off."""
    if bool(call["observer_on"].any()):
        return refuse(ledger, call, f"an observer sees the extremes of all channels ({_SWITCH_OFF})")
    if bool(call["fake_quant_on"].any()) and call["per_row_fake_quant"]:
        return round_by_channel(ledger, call)
    return round_alike(ledger, call)


def observe(ledger: Ledger, call: Call) -> Outcome:
    """Smallest and largest of a tensor."""
    return refuse(ledger, call, f"the extremes of all channels are taken (if by an observer, {_SWITCH_OFF})")
