"""intrafusion export: saved folders and other networks as one file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

Program = Callable[[str], Result]


def test_a_saved_folder_is_exported_by_its_own_name(program: Program) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs intrafusion[onnx]")
    assert program("compress nets.py:Net --input 2,4 --restore none -o small").exit_code == 0
    result = program("export small --base nets.py:Net")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("small.onnx: ONNX, opset 20, any batch size")
    session = runtime.InferenceSession("small.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {session.get_inputs()[0].name: torch.randn(3, 4).numpy()})[0].shape == (3, 3)


def test_any_network_and_a_program(program: Program) -> None:
    result = program("export nets.py:Net --input 2,4 -o net.pt2")
    assert result.exit_code == 0, result.stderr
    assert torch.export.load("net.pt2").module()(torch.randn(3, 4)).shape == (3, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "export nets.py:Net --input 2,4 -o net.tflite",
            "expected a file that ends in .onnx or .pt2, got 'net.tflite'",
        ),
        ("export nets.py:Net --input 2,4 -o taken.pt2", "taken.pt2: exists; choose another name"),
        ("export nets.py:Net --input 2,4 -o net.pt2 --opset 20", "opset= is a version of ONNX's operators"),
        ("export nets.py:Net --input 2,5 -o net.pt2", "float32[2, 5]"),
        ("export nothing.py:Net --input 2,5 -o net.pt2", "nothing.py"),
        ("export ./nothing/ -o nothing.pt2", "cannot tell which network './nothing/' is, and there is no such folder"),
    ],
)
def test_what_is_refused_writes_nothing(line: str, message: str, program: Program) -> None:
    Path("taken.pt2").write_text("precious")
    before = sorted(os.listdir())
    result = program(line)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert Path("taken.pt2").read_text() == "precious"
    assert sorted(set(os.listdir()) - {"__pycache__"}) == sorted(set(before) - {"__pycache__"})
