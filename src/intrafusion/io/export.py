"""A network as one file that other programs run: ONNX, or a program of `torch.export`."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from intrafusion.arguments import Count, checked
from intrafusion.errors import ArgumentError, FolderError, IntrafusionError, ModelError
from intrafusion.io.atomic import atomic_file, report_unwritable
from intrafusion.io.program import OtherOutputs, Written, brief_error, export_checked, find_batch_axes, write_program
from intrafusion.network.inputs import ExampleInputs, Inputs
from intrafusion.network.outputs import keep_tensors, pick_outputs, plain_output, storable_output
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.network.wrappers import unwrap

_ONNX, _PROGRAM = ".onnx", ".pt2"
FORMATS = (_ONNX, _PROGRAM)
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LEAST_OPSET, DEFAULT_OPSET = 18, 20
"""Of ONNX's operators: the first that PyTorch writes, and the last that runtimes of two years ago read."""
_LARGEST = 1_800_000_000  # bytes of weights in one file: protocol buffers end at 2 GiB
_LACKING = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'|target=torch\.ops\.([\w.]+)\]")
_CALL = re.compile(r'The following call raised this error:\n\s*File "([^"]+)", line (\d+)')


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how it was checked.

    Attributes:
        path: the file; weights of more than 1.8 GB stand beside it, in a file of that name and `.data`.
        any_batch: whether it takes batches of every size; else that of the example only.
        any_length: whether it takes texts of every length that the network takes; else, and where inputs are no texts
            (indices and masks alone), only inputs as large as in the example.
        difference: largest difference of its outputs to those of the network, on inputs that it was not made from,
            relative to each output's largest value.
        opset: version of ONNX's operators; None for a program.
    """

    path: Path
    any_batch: bool
    difference: float
    opset: int | None = None
    any_length: bool = False

    def __str__(self) -> str:
        kind = "a program of torch.export" if self.opset is None else f"ONNX, opset {self.opset}"
        batch = "any batch size" if self.any_batch else "the batch size of the example only"
        batch += " and length of text" if self.any_length else ""
        where = "PyTorch" if self.opset is None else "onnxruntime"
        return f"{self.path}: {kind}, {batch}; in {where} its outputs are the network's up to {self.difference:.1g}"


@checked
def export(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: str | os.PathLike[str],
    *,
    opset: Count | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a network, in evaluation mode, as a file that runs without its class, and check what was written.

    Args:
        example_inputs: one call of the network. The file takes batches of any size where the network does, and texts
            of any length.
        path: ends in `.onnx`, for onnxruntime and other runtimes (needs `intrafusion[onnx]`), or in `.pt2`, for
            `torch.export.load`.
        opset: version of ONNX's operators, 20 if not said.
        overwrite: whether a file of that name may be replaced.
    Raises:
        ArgumentError: another ending, or an opset for a program.
        FolderError: the file exists, or cannot be written.
        ModelError: a package is missing; the format has no such network; what was written gives other outputs. Nothing
            is written then.
    """
    return export_inputs(model, Inputs.of(example_inputs), Path(path), opset=opset, overwrite=overwrite)


def export_inputs(
    model: nn.Module, inputs: Inputs, path: Path, *, opset: int | None = None, overwrite: bool = False
) -> Exported:
    """`export` with inputs that were read already; of several outputs those that they say matter."""
    check_export(path, opset=opset, overwrite=overwrite)
    model = unwrap(model)
    with preserve_state(model):
        inputs.call(model)  # refused in words if it does not run
    whole = replace(inputs, outputs=None)
    version = None if path.suffix == _PROGRAM else opset or DEFAULT_OPSET
    with atomic_file(path) as file, _reporting(model, path, file):
        write = partial(_write_program, file) if version is None else partial(_write_onnx, file, version)
        read = partial(_read_output, inputs.outputs, path.suffix)
        _, free, difference = export_checked(model, whole, write, read)
        weights = file.with_name(f"{file.name}.data")
        if weights.exists():  # they take their name before the file that needs them does
            _check_free(path.with_name(weights.name), overwrite=overwrite)
            with atomic_file(path.with_name(weights.name)) as place:
                os.replace(weights, place)
                path.resolve().unlink(missing_ok=True)  # killed now, it leaves none, not an old one with new weights
    return Exported(path, free > 0, difference, version, any_length=free > 1)


def _write_program(file: Path, program: ExportedProgram, inputs: Inputs) -> Written[None]:
    content, run = write_program(program, inputs)
    file.write_bytes(content)
    return None, run


def _write_onnx(file: Path, opset: int, program: ExportedProgram, inputs: Inputs) -> Written[None]:
    """The file, its weights beside it where they are too many, and a run of it by onnxruntime."""
    found = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    assert found is not None
    _name_values_(found.model.graph, program)
    _name_axes_(found, find_batch_axes(inputs))
    written = found.model.opset_imports.get("")
    if written != opset:  # what converts versions logs that it cannot, and passes on what it had
        raise ModelError(f"export: opset: the packages installed here write {written}, not {opset}; say another one.")
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    found.save(file, external_data=size > _LARGEST)
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what fails is told in an error
    return None, partial(_run_onnx, runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"]))


def _name_values_(graph: Any, program: ExportedProgram) -> None:
    """Inputs are called as in the forward, outputs as in what it returns; what lies between gives way."""
    inputs = list(program.graph_signature.user_inputs)
    inputs = inputs if len(inputs) == len(graph.inputs) else [value.name for value in graph.inputs]
    outputs, taken = [], {*inputs, *graph.initializers}
    for name in _name_outputs(program):
        while name in taken:
            name += "_output"
        taken.add(name)
        outputs.append(name)
    for value in [value for node in graph.all_nodes() for value in node.outputs]:
        if value.name in taken:
            value.name = f"{value.name}_within"
    for value, name in (*zip(graph.outputs, outputs, strict=True), *zip(graph.inputs, inputs, strict=True)):
        value.name = name


def _name_outputs(program: ExportedProgram) -> list[str]:
    """ "output" for a lone tensor, the keys of a dict, "output_0" and so on for the items of a tuple."""
    spec = program.call_spec.out_spec
    assert spec is not None
    paths, _ = tree_flatten_with_path(tree_unflatten(range(spec.num_leaves), spec))
    keys = [[getattr(step, "key", getattr(step, "idx", "")) for step in path] for path, _ in paths]
    named = [key if key and isinstance(key[0], str) and key[0] else ["output", *key] for key in keys]
    return ["_".join(str(part) for part in key if part != "") for key in named]


def _name_axes_(found: Any, batch: Sequence[int]) -> None:
    """Call what is free of the inputs "batch" and "length", rather than as tracing numbers it.

    Args:
        batch: along which dimension of each the images lie.
    """
    lengths: dict[str, str] = {}
    for value, axis in zip(found.model.graph.inputs, batch, strict=True):
        for dim, size in enumerate(value.shape):
            if not isinstance(size, int):
                name = "batch" if dim == axis else f"{value.name}_length"
                lengths.setdefault(str(size), name)
    names = {name for name in lengths.values() if name != "batch"}
    found.rename_axes({size: "length" if {name} == names else name for size, name in lengths.items()})


def _run_onnx(session: Any, inputs: Inputs) -> list[Tensor]:
    taken = inputs.copied()
    tensors = [t.numpy() for t in taken.tensors()]
    found = session.run(None, dict(zip([i.name for i in session.get_inputs()], tensors, strict=True)))
    return inputs.turn_outputs([torch.from_numpy(value) for value in found])


def check_export(path: Path, *, opset: int | None = None, overwrite: bool = False) -> None:
    """What can be known before the work.

    Raises:
        ArgumentError, FolderError, ModelError: as of `export`.
    """
    if path.suffix not in FORMATS:
        raise ArgumentError(f"export: expected a file that ends in {' or '.join(FORMATS)}, got {str(path)!r}.")
    if path.suffix == _PROGRAM and opset is not None:
        raise ArgumentError("export: opset= is a version of ONNX's operators; leave it out for a program (.pt2).")
    if opset is not None and opset < LEAST_OPSET:
        raise ArgumentError(
            f"export: opset: expected {LEAST_OPSET} or more, the first that the exporter writes, got {opset}."
        )
    _check_free(path, overwrite=overwrite)
    missing = [name for name in _PACKAGES if path.suffix == _ONNX and importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"export: {', '.join(missing)} not installed; run: pip install 'intrafusion[onnx]'")


def _check_free(path: Path, *, overwrite: bool) -> None:
    with report_unwritable(path):
        taken = path.exists()
    if taken and not overwrite:
        raise FolderError(f"{path}: exists; choose another name, or replace it (overwrite=True, --overwrite).")


def _read_output(wanted: tuple[str | int, ...] | None, suffix: str, output: Any) -> Any:
    """The outputs that matter, in containers that every reader has; ONNX has tensors alone, a program no texts."""
    picked = output if wanted is None else pick_outputs(output, wanted)
    return keep_tensors(plain_output(picked)) if suffix == _ONNX else storable_output(picked)


@contextmanager
def _reporting(model: nn.Module, path: Path, file: Path) -> Iterator[None]:
    """
    Args:
        file: what is written until it takes the name of `path`.
    Raises:
        ModelError: instead of what an exporter or a runtime raises.
    """
    name = type(model).__name__
    try:
        yield
    except (IntrafusionError, OSError):
        raise
    except OtherOutputs as error:
        raise ModelError(f"export: the file of {name} {error}. {error.why}. Nothing was written.") from error
    except Exception as error:  # whatever an exporter or a runtime raises
        half = any(t.dtype in (torch.float16, torch.bfloat16) for t in named_tensors(model).values())
        told = _tell_failure(name, path.suffix, error, half=half).replace(str(file), str(path))
        raise ModelError(
            f"export: {told}. Where the original fails alike, that is none of the "
            "compression's doing. Nothing was written."
        ) from error


def _tell_failure(name: str, suffix: str, error: Exception, *, half: bool) -> str:
    text = str(error)
    if suffix == _ONNX and (lacking := _LACKING.search(text)):
        operation = next(filter(None, lacking.groups()))
        return f"ONNX has no operation for {operation} of {name}; write it in other ones, or export a program (.pt2)"
    if "data-dependent" in text:
        line = _CALL.search(text)
        where = f" ({line[1]}, line {line[2]})" if line else ""
        return f"{name} goes by the values of its tensors{where}, and a file has one way; wrap a forward that does not"
    if type(error).__module__.startswith("onnxruntime"):
        lacks = (
            "export model.float(), or a program (.pt2)"
            if half or "NOT_IMPLEMENTED" in text
            else "another opset= may help"
        )
        return f"onnxruntime does not run the file of {name} ({brief_error(error)}); {lacks}"
    while isinstance(error.__cause__, Exception):  # what ONNX's says first are the steps
        error = error.__cause__
    return f"the exporter does not take {name} ({brief_error(error)}); wrap a forward that does without"
