"""Example inputs from the command line: values, names and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from intrafusion.cli.inputs import read_images, read_inputs
from intrafusion.errors import FolderError, ModelError


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


IMAGES = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "content",
    [IMAGES, IMAGES.double(), {"images": IMAGES, "labels": torch.arange(4)}, (IMAGES, torch.arange(4)), [IMAGES]],
    ids=["tensor", "double", "dict", "tuple", "list"],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_images_that_torch_saved(content: Any, suffix: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / f"images{suffix}")
    found = read_images(tmp_path / f"images{suffix}")
    assert found.dtype == torch.float32
    assert torch.equal(found, IMAGES)


class Opened:
    """Would write a file where it is read."""

    def __reduce__(self) -> Any:
        return open, ("opened", "w")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Opened(), r"refused, reading it would run code: it needs io.open. save the images alone: torch.save\(images"),
        ({"pictures": IMAGES}, "instead of a tensor; save the images alone"),
        (b"", "not a PyTorch file, or a damaged one"),
    ],
    ids=["code", "another name", "damaged"],
)
def test_files_that_torch_saved_and_that_hold_no_images(
    content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("images.pt").write_bytes(content)
    else:
        torch.save(content, "images.pt")
    with pytest.raises(FolderError, match=rf"--images images.pt: expected .npy, or .npz, .*: .*{message}"):
        read_images(Path("images.pt"))
    assert not Path("opened").exists()
