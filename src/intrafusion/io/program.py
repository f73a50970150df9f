"""A network as a `torch.export` program: it runs without the code that it was made from."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from intrafusion.errors import FolderError, IntrafusionError, ModelError
from intrafusion.network.double import output_difference
from intrafusion.network.images_first import put_images_first
from intrafusion.network.inputs import Inputs, describe
from intrafusion.network.outputs import storable_output
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import copy_model

PROGRAM = "program.pt2"
_BATCHES = (1, 7)
"""Sizes that a program must run on where it takes any."""
_TRACED = 3
_SHORTEST = 2  # a length of one is a way of its own
_TOLERANCE = 1e-4
_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_NOISY = ("torch.onnx", "torch.fx", "torch.export", "torch._subclasses", "torch._guards", "torch._dynamo")  # loggers
_NOISY += ("onnxscript", "onnx_ir")
_WHY = "The forward draws random numbers, keeps a state, or has an operation that the format defines otherwise"
_FAST = (
    "PyTorch's fast path of attention, which no file has, leaves zeros where a mask does: say "
    "enable_nested_tensor=False to nn.TransformerEncoder, or torch.backends.mha.set_fastpath_enabled(False)"
)
T = TypeVar("T")
Written = tuple[T, Callable[[Inputs], list[Tensor]]]
"""What was made of a program, and what runs it."""


class Program(nn.Module):
    """A network that was loaded from a program: it computes, in evaluation mode only, and has the saved weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of how PyTorch copies its own programs
            return Program(copy.deepcopy(self.network, memo))

    def train(self, mode: bool = True) -> Program:
        """
        Raises:
            ModelError: training mode is asked for.
        """
        if mode:
            raise ModelError(
                "a program computes as in evaluation mode and has no other; load the network onto its class to train."
            )
        return self


def export_network(model: nn.Module, inputs: Inputs) -> tuple[bytes, bool]:
    """The content of a .pt2 file without the example inputs, and whether it takes batches of every size.

    Raises:
        ModelError: `torch.export` does not take the network, or makes another one of it.
    """
    try:
        content, free, _ = export_checked(model, inputs, write_program)
        return content, free > 0
    except IntrafusionError:
        raise
    except OtherOutputs as error:
        raise ModelError(
            f"save: program=True, but what torch.export makes of {type(model).__name__} {error}. {error.why}. "
            "Save without a program, and load onto the class."
        ) from error
    except Exception as error:  # whatever tracing makes a forward raise
        raise ModelError(
            f"save: program=True, but torch.export does not take {type(model).__name__} ({brief_error(error)}); save "
            "without a program, and load onto the class."
        ) from error


def brief_error(error: Exception) -> str:
    """Its kind, and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


class OtherOutputs(Exception):
    """What was exported computes something else, in words, and why that may be."""

    def __init__(self, said: str, why: str = _WHY) -> None:
        super().__init__(said)
        self.why = why


def export_checked(
    model: nn.Module,
    inputs: Inputs,
    write: Callable[[ExportedProgram, Inputs], Written[T]],
    read: Callable[[Any], Any] = storable_output,
) -> tuple[T, int, float]:
    """What `write` makes of the network's program, how many dimensions of its inputs are free, and how far it is off.

    The program is in evaluation mode and on the CPU. The dimension of every input along which its images lie is free
    where the network has none that depends on it, and so is the length where all inputs are texts. What was written is
    run and compared with the network, on inputs that it was not made from.

    Args:
        write: what is wanted, and a function that runs it; of a program and a call of it, images first.
        read: what of an output is the program's. Classes must not be left: they are not there when it is loaded.
    Returns:
        What was wanted; 2 if batches and lengths are free, 1 if batches are, or 0; the largest difference of the
        outputs, relative to their largest.
    Raises:
        OtherOutputs: it gives other outputs than the network.
        ModelError: the network gives nothing that could be compared.
    """
    core = copy_model(model).cpu()
    apart = inputs.copied().map(lambda t: t.cpu().clone())  # what is one tensor need not stay so
    given = put_images_first(apart, core)
    core.register_forward_hook(lambda _, args, output: read(output))
    with warnings.catch_warnings(action="ignore"), _quiet():
        with preserve_state(core):
            _check_telling(given.call(core))
        for free in range(_count_free(given), 0, -1):
            with preserve_state(core), contextlib.suppress(Exception):  # a network of one length, or one batch size
                case = _with_batch(given, _TRACED)
                written, run = write(_trace_free(core, case, free), case)
                cases = [_with_batch(_vary(given), size) for size in _BATCHES]
                cases += [case.map(lambda t: t[:, : (t.shape[1] + 1) // 2]) for case in cases if free > 1]
                return written, free, max(_compare(run, core, case) for case in cases)
        with preserve_state(core):
            written, run = write(_trace(core, given), given)
            return written, 0, max(_compare(run, core, case) for case in (given, _vary(given)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters log as they go; what fails is told in an error."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def find_batch_axes(inputs: Inputs) -> list[int]:
    """Of every tensor of a call, images first, along which dimension they lie as the network takes it."""
    leaves = [(name, leaf) for name, value in inputs.named.items() for leaf in tree_leaves(value)]
    return [int(name in inputs.turned) for name, leaf in leaves if isinstance(leaf, Tensor)]


def _trace_free(model: nn.Module, inputs: Inputs, free: int) -> ExportedProgram:
    """The program for batches of every size, and for texts of every length that the network takes.

    A forward that is run as it is has one number for `len(x)`; one whose code is read, which fewer allow, has not.
    """
    _name_keywords_(model, inputs)

    def say_free(name: int | str, value: Any) -> Any:
        axes = [0, 1][:: -1 if name in inputs.turned else 1]
        sizes = dict(zip(axes, (torch.export.Dim("batch", min=1), torch.export.Dim.AUTO)[:free], strict=False))
        return tree_map(lambda x: sizes if isinstance(x, Tensor) else None, value)

    args = [say_free(index, value) for index, value in enumerate(inputs.args)]
    kwargs = {name: say_free(name, value) for name, value in (inputs.kwargs or {}).items()}
    shapes = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    try:
        return _trace(model, inputs, dict(shapes))
    except Exception:  # whatever tracing makes a forward raise
        return _trace(model, inputs, dict(shapes), strict=True)


def _name_keywords_(model: nn.Module, inputs: Inputs) -> None:
    """Have a forward that takes **keywords name those that it is given, as PyTorch frees no dimension of others."""
    forward, signature = model.forward, inspect.signature(model.forward)
    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    given = [name for name in inputs.kwargs or {} if name not in signature.parameters]
    if len(kept) == len(signature.parameters) or not given:
        return

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in given]
    named.__signature__ = signature.replace(parameters=[*kept, *more])  # pyright: ignore[reportFunctionMemberAccess]
    model.forward = named


def _trace(model: nn.Module, inputs: Inputs, shapes: Any = None, *, strict: bool = False) -> ExportedProgram:
    taken = inputs.as_taken()
    args, kwargs = tuple(taken.args), dict(taken.kwargs or {})
    with contextlib.redirect_stderr(io.StringIO()):  # of what it does not take, PyTorch prints the whole graph
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)


def write_program(program: ExportedProgram, _: Inputs) -> Written[bytes]:
    """The content of a .pt2 file."""
    program._example_inputs = None  # they may be somebody's data
    file = io.BytesIO()
    torch.export.save(program, file)
    content = file.getvalue()
    loaded = _read(content).module()
    return content, lambda case: case.call(loaded)


def _compare(run: Callable[[Inputs], list[Tensor]], model: nn.Module, inputs: Inputs) -> float:
    found = run(inputs)
    try:
        return _find_difference(found, inputs.call(model))
    except OtherOutputs as error:
        try:
            with _slow_attention():
                _find_difference(found, inputs.call(model))
        except OtherOutputs:
            raise error from None
        raise OtherOutputs(str(error), _FAST) from None


@contextlib.contextmanager
def _slow_attention() -> Iterator[None]:
    """Without the kernels that PyTorch takes for encoders where no gradient is wanted."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _find_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """
    Raises:
        OtherOutputs: it is more than rounding.
    """
    if len(found) != len(expected):
        raise OtherOutputs(f"gives {len(found)} outputs, expected {len(expected)}")
    for ours, theirs in zip(found, expected, strict=True):
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            more = " (return torch.view_as_real of it: ONNX has no complex numbers)" if theirs.is_complex() else ""
            raise OtherOutputs(f"gives {describe(ours)}, expected {describe(theirs)}{more}")
    off = max(output_difference(found, expected), *(map(_share_of_others, found, expected)))
    allowed = max((_TOLERANCES.get(t.dtype, _TOLERANCE) for t in expected), default=_TOLERANCE)
    if not off <= allowed:
        raise OtherOutputs(f"gives other outputs (they differ by {off:.2g} of the largest value)")
    return off


def _check_telling(outputs: list[Tensor]) -> None:
    if not any(bool(t.isfinite().any()) for t in outputs):
        raise ModelError(
            "example_inputs: expected some on which the network gives numbers to compare by, got outputs that are "
            "empty, NaN or infinite throughout; give others."
        )


def _share_of_others(found: Tensor, expected: Tensor) -> float:
    """Of whole numbers and truth values, which have no distance, the share that differs."""
    if not found.numel() or found.is_floating_point() or found.is_complex():
        return 0.0
    return float((found != expected).double().mean())


def _vary(inputs: Inputs) -> Inputs:
    """Other inputs of the same kind: numbers nearby, and the same indices in another order."""
    generator = torch.Generator().manual_seed(1)

    def shuffle(t: Tensor) -> Tensor:
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool or len(t.unique()) <= 2:  # the last: masks
            return t
        return t.flatten()[torch.randperm(t.numel(), generator=generator)].view(t.shape)

    return inputs.varied(1).map(shuffle)


def _count_free(inputs: Inputs) -> int:
    """2 of texts, which are indices and masks; 1 where all inputs have as many images; else 0."""
    tensors = inputs.tensors()
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors}
    if len(sizes) != 1 or 0 in sizes:
        return 0
    texts = (t.dim() == 2 and t.shape[1] > _SHORTEST and not (t.is_floating_point() or t.is_complex()) for t in tensors)
    return 2 if all(texts) else 1


def _with_batch(inputs: Inputs, size: int) -> Inputs:
    return inputs.map(lambda t: t[torch.arange(size) % len(t)])


def _read(content: bytes) -> ExportedProgram:
    return torch.export.load(io.BytesIO(content))


def read_program(path: Path, content: bytes, state: Mapping[str, Tensor]) -> Program:
    """
    Args:
        state: the weights beside it, which must be its own.
    Raises:
        FolderError: it is damaged, or has other weights.
    """
    try:
        program = _read(content)
        network = program.module()
    except Exception as error:  # it passes on whatever a damaged file makes its readers raise
        raise FolderError(f"{path}: no program, or a damaged one ({type(error).__name__}: {error}).") from error
    for name, tensor in program.state_dict.items():
        if name in state and not _is_equal(tensor, state[name]):
            raise FolderError(f"{path}: its {name!r} is not that of the weights beside it; save the folder again.")
    return Program(network)


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
