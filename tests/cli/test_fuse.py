"""`intrafusion fuse` on networks of a user's own folder and on those of the zoo."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

Program = Callable[[str], Result]


def written(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of nets.py's Net, and the same with its first hidden units in another order."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"first.weight": (8, 4), "first.bias": (8,), "second.weight": (6, 8), "second.bias": (6,)}
    shapes |= {"third.weight": (3, 6), "third.bias": (3,)}
    a = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    order = torch.tensor([3, 0, 7, 1, 2, 6, 4, 5])
    b = {**a, "first.weight": a["first.weight"][order], "first.bias": a["first.bias"][order]}
    b["second.weight"] = a["second.weight"][:, order]
    save_file(a, folder / "a.safetensors")
    save_file({k: t.contiguous() for k, t in b.items()}, folder / "b.safetensors")
    return a, b


def test_files_of_weights_of_one_network(program: Program, user_folder: Path) -> None:
    a, _ = written(user_folder)
    result = program("fuse nets.py:Net --weights a.safetensors --weights b.safetensors --input 1,4 -o fused")
    assert result.exit_code == 0, result.output
    found = load_file(user_folder / "fused" / "model.safetensors")
    for name, tensor in a.items():
        torch.testing.assert_close(found[name], tensor)
    assert "2 networks" in result.stdout
    line = result.stdout.strip().splitlines()[-1]
    state = {**globals()}
    exec(line, state)
    torch.testing.assert_close(state["model"].state_dict()["first.weight"], a["first.weight"])


def test_as_json(program: Program, user_folder: Path) -> None:
    written(user_folder)
    result = program("fuse nets.py:Net --weights a.safetensors --weights b.safetensors --input 1,4 --json")
    data = json.loads(result.stdout)
    assert data["moved"] == {"first": 1.0, "second": 0.0}
    assert not (user_folder / "fused").exists()


def test_networks_of_the_zoo_by_activations(program: Program) -> None:
    line = "fuse zoo:digits_resnet zoo:digits_resnet --arg pretrained=false"
    result = program(f"{line} --using activations --train-images 20")
    assert result.exit_code == 0, result.output
    assert "0% of the channels" in result.stdout
    save_file({"images": torch.zeros(5, 1, 8, 8)}, "images.safetensors")
    assert program(f"{line} --using activations --images images.safetensors").exit_code == 0


def test_what_cannot_be_fused_ends_with_2(program: Program, user_folder: Path) -> None:
    written(user_folder)
    for line, message in (
        ("fuse nets.py:Net --input 1,4", "expected two networks or more"),
        (
            "fuse nets.py:Net nets.py:Net --weights a.safetensors --input 1,4",
            "expected a file for each of 2 networks",
        ),
        (
            "fuse nets.py:Net nets.py:Literal --input 1,4 --using activations",
            "no data are known for it; name some with --data",
        ),
        ("fuse nets.py:Net nets.py:Net --input 1,4 --restore images", "--restore: expected one of none, least_squares"),
        ("fuse nets.py:Net nets.py:Net --input 1,4 --data imagenet", "imagenet: expected training images, and it has"),
        ("fuse nets.py:Net nets.py:Words --input 1,4", "does not run on the example inputs"),
    ):
        result = program(line)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
