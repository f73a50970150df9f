"""Example inputs from the command line: values, names and refusals."""

from __future__ import annotations

import pytest
import torch

from intrafusion.cli.inputs import read_inputs
from intrafusion.errors import ModelError


def test_shapes_become_noise_that_is_the_same_at_each_call() -> None:
    (image, half), names = read_inputs(["1,3,4,4", "2,5:float16"]).args, read_inputs(["1,3,4,4"]).kwargs
    assert image.shape == (1, 3, 4, 4)
    assert image.dtype == torch.float32
    assert half.shape == (2, 5)
    assert half.dtype == torch.float16
    assert names == {}
    assert torch.equal(image, read_inputs(["1,3,4,4"]).args[0])
    assert image.unique().numel() == image.numel()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2,5:int64", torch.tensor([[1, 0, 1, 0, 1]] * 2)),
        ("3:bool", torch.tensor([True, False, True])),
        ("1:int32", torch.tensor([1], dtype=torch.int32)),
    ],
)
def test_whole_numbers_alternate(text: str, expected: torch.Tensor) -> None:
    (found,) = read_inputs([text]).args
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_named_inputs_are_keyword_arguments() -> None:
    inputs = read_inputs(["2,7:int64", "mask=2,7:bool", "scale=1"])
    assert [t.dtype for t in inputs.args] == [torch.int64]
    assert {name: tuple(t.shape) for name, t in (inputs.kwargs or {}).items()} == {"mask": (2, 7), "scale": (1,)}


@pytest.mark.parametrize("text", ["", "3,", "a,b", "1,0", "1,-3", "1x3", "3:int46", "3:Tensor", ":int64", "mask="])
def test_what_is_no_shape_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ModelError, match=r"^--input .*: expected sizes, .* such as 1,3,224,224 or 2,7:int64"):
        read_inputs([text])


def test_a_name_stands_once() -> None:
    with pytest.raises(ModelError, match="--input 'mask=3': 'mask' is given twice"):
        read_inputs(["mask=2", "mask=3"])
