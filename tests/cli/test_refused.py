"""What a command cannot use ends in one message and exit code 2, never in an exception of somebody else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from torch import nn

Program = Callable[[str], Result]


@pytest.mark.parametrize("shape", ["2,4:qint8", "2,4:bits8", "99999999999999999999", "999999999999999,4"])
def test_an_input_that_no_tensor_can_be(shape: str, program: Program) -> None:
    result = program(f"inspect nets.py:Net --input {shape}")
    assert result.exit_code == 2
    assert f"--input {shape!r}: no example can be made of these sizes and this dtype" in result.stderr


def test_a_module_that_ends_the_program(program: Program, user_folder: Path) -> None:
    (user_folder / "ends.py").write_text("import sys; sys.exit(4)")
    result = program("inspect ends.py:x --input 2,4")
    assert result.exit_code == 2
    assert "ends.py:x: running ends.py raised SystemExit: 4" in result.stderr


@pytest.mark.parametrize(
    ("kind", "remedy"), [("meta", "load its values first"), ("sparse", "make it one with .to_dense()")]
)
def test_weights_without_dense_values(kind: str, remedy: str, program: Program, user_folder: Path) -> None:
    weight = nn.Linear(4, 8).weight.detach()
    torch.save({"first.weight": weight.to("meta") if kind == "meta" else weight.to_sparse()}, user_folder / "w.pth")
    result = program("inspect nets.py:Net --input 2,4 --weights w.pth")
    assert result.exit_code == 2
    assert "'first.weight']: expected a dense tensor with values, got " in result.stderr
    assert remedy in result.stderr
