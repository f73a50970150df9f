"""The network inside what it was wrapped in (data parallelism, `torch.compile`), and what is no network to us."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from intrafusion.arguments import check_module
from intrafusion.errors import ModelError
from intrafusion.network.autocast import without_autocast
from intrafusion.network.tensors import check_initialised

P = ParamSpec("P")
T = TypeVar("T")

_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def unwrap(model: Any) -> nn.Module:
    """The eager network inside DataParallel, DistributedDataParallel and `torch.compile`, whose names have no prefix.

    Raises:
        ModelError: no module, TorchScript, a network in shards, or one with parameters that have no size yet.
    """
    check_module(model)
    core = model
    while (inner := _find_inside(core)) is not None:
        core = inner
    for name, module in core.named_modules():
        where = f"{name!r} ({type(module).__name__})" if name else f"the network ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{where} is TorchScript, which cannot be traced or changed: expected an eager network; "
                "build it from its Python class and load the weights, model.load_state_dict(scripted.state_dict())."
            )
        if any(cls.__name__ in _SHARDED for cls in type(module).__mro__):
            raise ModelError(f"{where} is in shards; gather it into one plain network first, and pass that.")
    check_initialised(core)
    return core


def _find_inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    return model._modules.get("_orig_mod") if type(model).__name__ == "OptimizedModule" else None


def wrap_like(wrapper: nn.Module, core: nn.Module) -> nn.Module:
    """A network wrapped as another one is; DistributedDataParallel is left off, see `note_unwrapped`."""
    inner = _find_inside(wrapper)
    if inner is None:
        return core
    core = wrap_like(inner, core)
    if isinstance(wrapper, nn.DataParallel):
        devices = {k: v for k in ("device_ids", "output_device", "dim") if (v := vars(wrapper).get(k))}  # CPU: none
        return _take_mode(nn.DataParallel(core, **devices), wrapper)
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        return core
    return _take_mode(type(wrapper)(core, wrapper.dynamo_ctx), wrapper)


def _take_mode(new: nn.Module, old: nn.Module) -> nn.Module:
    """Whether it trains, of the wrapper alone: modules inside may each be in another mode."""
    new.training = old.training
    return new


def note_unwrapped(wrapper: nn.Module) -> tuple[str, ...]:
    """What the user must do where a network does not come back in its wrapper."""
    if not any(isinstance(m, nn.parallel.DistributedDataParallel) for m in wrapper.modules()):
        return ()
    return ("the network came in DistributedDataParallel; the smaller one has none: wrap it again in every process",)


def check_inplace(wrapper: nn.Module) -> None:
    """
    Raises:
        ModelError: what holds buckets of the old sizes cannot go on with smaller weights.
    """
    if note_unwrapped(wrapper):
        raise ModelError(
            "inplace: DistributedDataParallel keeps buckets of the old sizes; pass the network inside it (ddp.module), "
            "and wrap it again afterwards."
        )


def outside_inference(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which runs outside inference mode and autocast also where it is called inside.

    Weights are written, and told from products that autocast would round.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with without_autocast():
            if not torch.is_inference_mode_enabled():
                return function(*args, **kwargs)
            with torch.inference_mode(False):
                return function(*args, **kwargs)

    return run


def holds_inference_tensors(model: nn.Module) -> bool:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return any(t.is_inference() for t in tensors)
