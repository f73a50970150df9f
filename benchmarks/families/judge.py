"""Whether a smaller network is the original without what it lacks. Knows no tracer: it compares weights by value.

Every weight of the original is a random number of its own, so each that a smaller network still has is recognised by
its value, up to one factor for each tensor, or for each half or third of one that holds queries, keys and values. In a
copy of the original all others become zero; then nothing comes from or goes into what was removed, and both must give
the same. Norms over channels count those that are zero everywhere as absent, as the smaller network does not
have them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import remove_parametrizations
from torch.overrides import TorchFunctionMode

from intrafusion.network.double import DoublePrecision

from .family import Call, Family, call, tensors_of

EXACT, EXACT_SINGLE = 1e-8, 1e-4  # largest relative error of what must be equal, in float64 and in float32
_CLOSE = 1e-9  # of a weight that is recognised


class Unjudged(Exception):
    """The smaller network holds weights that the original does not have, or norms are of a kind that is not known."""


# ---- recognising weights by their value ------------------------------------------------------------------------------


def find_kept(old: Tensor, new: Tensor) -> Tensor:
    """Which entries of a tensor another one has, up to a factor: a mask of the old one's shape.

    Raises:
        Unjudged: it has others.
    """
    kept = torch.zeros(old.numel(), dtype=torch.bool)
    for count in (1, 2, 3) if new.dim() else (1,):
        parts = new.chunk(count) if count > 1 else (new,)
        places = [_locate(old.flatten().double(), part.flatten().double()) for part in parts]
        found = [place for place in places if place is not None]
        if len(found) == len(parts):
            kept[torch.cat(found)] = True
            return kept.view(old.shape)
    raise Unjudged(f"{list(new.shape)} is no part of {list(old.shape)}")


def _locate(old: Tensor, new: Tensor) -> Tensor | None:
    """Where in `old` each entry of `new` stands, up to one factor."""
    values, order = old.sort()
    for factor in (1.0, *_list_factors(values, new)):
        wanted = new / factor
        right = torch.searchsorted(values, wanted).clamp(0, len(values) - 1)
        left = (right - 1).clamp(min=0)
        nearest = torch.where((values[left] - wanted).abs() < (values[right] - wanted).abs(), left, right)
        if bool(((values[nearest] - wanted).abs() <= _CLOSE * wanted.abs() + 1e-300).all()):
            return order[nearest]
    return None


def _list_factors(values: Tensor, new: Tensor) -> Iterator[float]:
    """Numbers that make the first two entries of `new` of two entries of the old tensor."""
    if len(new) < 2 or not bool(new[:2].all()):
        return
    factors = new[0] / values
    wanted = new[1] / factors
    right = torch.searchsorted(values, wanted).clamp(0, len(values) - 1)
    for near in (right, (right - 1).clamp(min=0)):
        hits = (values[near] - wanted).abs() <= _CLOSE * wanted.abs()
        yield from factors[hits & factors.isfinite()].tolist()


@torch.no_grad()
def without_removed(original: nn.Module, small: nn.Module) -> nn.Module:
    """A copy of the original in which every weight is zero that the smaller network does not have."""
    expected = _plain(original)
    old, new = dict(_named_tensors(_plain(original))), dict(_named_tensors(_plain(small)))
    for name, tensor in _named_tensors(expected):
        if name not in new:
            raise Unjudged(f"{name} is not in the smaller network")
        if tensor.shape != new[name].shape and tensor.is_floating_point():
            tensor.mul_(find_kept(old[name], new[name]))
    return expected


def _plain(model: nn.Module) -> nn.Module:
    """A copy in which weights are stored as they are used, not as a direction and a length."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        names = list(getattr(module, "parametrizations", ()))
        if names:  # its class was made for it, and is shared with what it was copied from
            kind = type(module)
            object.__setattr__(module, "__class__", type(kind.__name__, kind.__bases__, dict(kind.__dict__)))
        for name in names:
            remove_parametrizations(module, name)
    return model


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((n, p.detach()) for n, p in model.named_parameters(remove_duplicate=False))
    yield from model.named_buffers(remove_duplicate=False)


# ---- norms over the channels that are left ---------------------------------------------------------------------------


class NormsOfTheLiving(TorchFunctionMode):
    """Layer, group and RMS norms take their statistics over the channels that are not zero everywhere."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        norm = _NORMS.get(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {})) if norm is None else norm(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    alive = _find_living(input, len(normalized_shape))
    count = alive.sum().clamp(min=1)
    mean = input.sum(dims, keepdim=True) / count
    centred = (input - mean) * alive
    return _affine(centred / ((centred**2).sum(dims, keepdim=True) / count + eps).sqrt(), weight, bias)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None, *_: Any
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    count = _find_living(input, len(normalized_shape)).sum().clamp(min=1)
    square = (input**2).sum(dims, keepdim=True) / count
    return _affine(input / (square + (torch.finfo(input.dtype).eps if eps is None else eps)).sqrt(), weight, None)


def _group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    split = input.reshape(len(input), num_groups, -1, input[0, 0].numel())
    alive = (split != 0).any(3).any(0)[None, :, :, None]
    count = (alive.sum((2, 3), keepdim=True) * split.shape[3]).clamp(min=1)
    centred = (split - split.sum((2, 3), keepdim=True) / count) * alive
    scaled = (centred / ((centred**2).sum((2, 3), keepdim=True) / count + eps).sqrt()).reshape(input.shape)
    along = (1, -1, *[1] * (input.dim() - 2))
    return _affine(scaled, *(None if t is None else t.view(along) for t in (weight, bias)))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _find_living(input: Tensor, dims: int) -> Tensor:
    """Entries of a norm that are not zero everywhere."""
    return (input != 0).flatten(0, input.dim() - dims - 1).any(0)


_UNKNOWN = ("EvoNorm", "GlobalResponseNorm")  # they look at several channels, step by step
_NORMS = {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm}


@contextmanager
def _hand_written_norms(model: nn.Module) -> Iterator[None]:
    """The same for the norms that Hugging Face writes out."""
    with ExitStack() as stack:
        for module in model.modules():
            kind = type(module)
            if kind.__module__.startswith("transformers.") and not isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                if "RMSNorm" in kind.__name__ or kind.__name__ == "T5LayerNorm":
                    _correct(module, stack)
                elif kind.__name__.endswith("LayerNorm") and len(list(module.parameters())) == 1:
                    _narrow(module, stack)
        yield


def _correct(module: nn.Module, stack: ExitStack) -> None:
    """Set what a root mean square is taken of so that it is that of the living."""
    ratios: list[float] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ratios.append((args[0].shape[-1] / max(int(_find_living(args[0], 1).sum()), 1)) ** 0.5)
        return (args[0] * ratios[-1], *args[1:])

    def behind(_: nn.Module, args: Any, out: Any) -> Any:
        return out / ratios.pop()

    after = module.register_forward_hook(behind)
    for handle in (module.register_forward_pre_hook(before), after):
        stack.callback(handle.remove)


def _narrow(module: nn.Module, stack: ExitStack) -> None:
    """Let a norm that subtracts a mean see the living only."""
    forward = module.forward

    def narrowed(x: Tensor) -> Tensor:
        alive, whole = _find_living(x, 1), dict(module._parameters)
        module._parameters = {n: nn.Parameter(p[..., alive]) for n, p in whole.items() if p is not None}
        out = torch.zeros_like(x)
        out[..., alive] = forward(x[..., alive])
        module._parameters = whole
        return out

    module.forward = narrowed
    stack.callback(delattr, module, "forward")


# ---- the verdict -----------------------------------------------------------------------------------------------------


def find_error(
    original: nn.Module, small: nn.Module, calls: Sequence[Call], family: Family, *, wanted_only: bool = False
) -> float:
    """Largest difference of the outputs to those of the original without what was removed, relative to the largest.

    Args:
        wanted_only: compare only the outputs that a user of the family wants.
    Raises:
        Unjudged: the smaller network has weights that the original does not have.
        ValueError: its outputs have other shapes.
    """
    expected = without_removed(original, small)
    errors = [0.0]
    for inputs in calls:
        with _hand_written_norms(expected), NormsOfTheLiving():
            want = _run(expected, inputs, family, wanted_only)
        got = _run(small, inputs, family, wanted_only)
        if [t.shape for t in want] != [t.shape for t in got]:
            raise ValueError(f"returns {[list(t.shape) for t in got]} instead of {[list(t.shape) for t in want]}")
        errors += [_difference(a, b) for a, b in zip(got, want, strict=True) if a.is_floating_point() and a.numel()]
    unknown = {type(m).__name__ for m in original.modules() if type(m).__name__.startswith(_UNKNOWN)}
    if unknown and max(errors) > EXACT:
        raise Unjudged(f"{', '.join(sorted(unknown))} looks at several channels in a way that is not known here")
    return max(errors)


def _run(model: nn.Module, inputs: Call, family: Family, wanted_only: bool) -> list[Tensor]:
    """Outputs in float64, also where the network casts to less, if the family can be run so."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), nullcontext() if family.single else DoublePrecision():
        output = call(model, inputs)
    return family.wanted(output) if wanted_only else tensors_of(output)


def _difference(a: Tensor, b: Tensor) -> float:
    """Infinite where either is not a number and the other is."""
    error = ((a - b).abs() / b.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=1e-12)).nan_to_num(float("inf"))
    same = (a == b) | (a.isnan() & b.isnan())
    return float(error.masked_fill(same, 0.0).max())
