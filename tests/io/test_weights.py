"""Reading weight files without running code from them, and the strict copy into a network."""

from __future__ import annotations

import argparse
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from intrafusion.errors import FolderError
from intrafusion.io.weights import load_into, read_state


def network() -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 2)))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in right)


class Attack:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.embed.weight


def test_safetensors_are_read(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_file(state, tmp_path / "w.safetensors")
    assert same(read_state(tmp_path / "w.safetensors"), state)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".PTH"])
def test_torch_files_are_read(tmp_path: Path, suffix: str) -> None:
    state = network().state_dict()
    torch.save(state, tmp_path / f"w{suffix}")
    assert same(read_state(tmp_path / f"w{suffix}"), state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state},
        lambda state: {"epoch": 3, "model": {"state_dict": state, "arch": "resnet"}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
    ],
)
def test_checkpoints_and_prefixes_are_unwrapped(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    state = network().state_dict()
    torch.save(wrap(state), tmp_path / "w.pt")
    assert same(read_state(tmp_path / "w.pt"), state)


def test_a_prefix_that_only_some_names_carry_stays(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(1), "n_averaged": torch.zeros(1)}
    torch.save(state, tmp_path / "w.pt")
    assert same(read_state(tmp_path / "w.pt"), state)


def test_a_tensor_named_like_a_wrapper_is_a_tensor(tmp_path: Path) -> None:
    state = {"model": torch.ones(2), "state_dict": torch.zeros(1)}
    torch.save(state, tmp_path / "w.pt")
    assert same(read_state(tmp_path / "w.pt"), state)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"state_dict": {}, "args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_objects_is_refused_by_name(tmp_path: Path, content: Any, named: str, zipped: bool) -> None:
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FolderError, match=f"refused, reading it would run code: it needs {named}.*state_dict"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_an_attack_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": Attack(tmp_path / "pwned")}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FolderError, match=r"it needs io\.open\b"):
        read_state(tmp_path / "w.pt")
    assert os.listdir(tmp_path) == ["w.pt"]


def test_a_plain_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(pickle.dumps(Attack(tmp_path / "pwned")))
    with pytest.raises(FolderError, match="refused, reading it would run code.*trust it"):
        read_state(tmp_path / "w.bin")
    assert os.listdir(tmp_path) == ["w.bin"]


def test_torchscript_is_refused(tmp_path: Path) -> None:
    class Empty(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated in newer releases
        torch.jit.script(Empty()).save(str(tmp_path / "w.pt"))
    with pytest.raises(FolderError, match="it is a TorchScript program"):
        read_state(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world, this is no weight file"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FolderError, match=rf"{name}: not a .* file, or a damaged one \(.+\); fetch it again"):
        read_state(tmp_path / name)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    state = {"a": torch.ones(1000)}
    save_file(state, tmp_path / name) if name.endswith(".safetensors") else torch.save(state, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2000])
    with pytest.raises(FolderError, match="or a damaged one"):
        read_state(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ([torch.ones(1)], "got a list"),
        ({}, "got nothing"),
        ({"a": torch.ones(1), "epoch": 3, "name": "x"}, "got 'epoch': int, 'name': str"),
        ({"state_dict": {"a": 1}}, "got 'a': int"),
    ],
)
def test_content_other_than_named_tensors_is_refused(tmp_path: Path, content: Any, got: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(FolderError, match=f"expected named tensors.*{got}.*Save model.state_dict"):
        read_state(tmp_path / "w.pt")


def test_a_missing_file_and_an_unknown_suffix_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="w.pt: there is no such file"):
        read_state(tmp_path / "w.pt")
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(FolderError, match=r"suffix '\.h5'.*expected \.safetensors, \.pth"):
        read_state(tmp_path / "w.h5")


def test_loading_copies_every_tensor() -> None:
    torch.manual_seed(1)
    source, target = network(), network()
    source.norm.running_mean.fill_(3)  # type: ignore[union-attr]
    load_into(target, source.state_dict())
    assert same(target.state_dict(), source.state_dict())


def test_loading_converts_the_precision() -> None:
    source, target = network(), network()
    load_into(target, {name: tensor.half() for name, tensor in source.state_dict().items()})
    assert target.conv.weight.dtype == torch.float32
    assert torch.equal(target.conv.weight, source.conv.weight.half().float())


def test_a_batch_norm_may_lack_its_count() -> None:
    source, target = network(), network()
    state = source.state_dict()
    del state["norm.num_batches_tracked"]
    load_into(target, state)
    assert torch.equal(target.fc.weight, source.fc.weight)


def test_misfits_are_listed_with_the_nearest_names_and_nothing_is_written() -> None:
    target = network()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    state["conv1.weight"] = state.pop("conv.weight")
    state["fc.weight"] = torch.ones(7, 4)
    with pytest.raises(FolderError) as caught:
        load_into(target, state)
    assert str(caught.value) == (
        "the weights do not fit Sequential: 1 missing (conv.weight, nearest conv1.weight); "
        "1 unexpected (conv1.weight); 1 of another shape (fc.weight (7, 4) for (2, 4)). "
        "Build the network that these weights were saved from, or rename them."
    )
    assert same(target.state_dict(), before)


def test_only_the_first_names_are_listed() -> None:
    many = nn.Sequential(*[nn.Linear(1, 1) for _ in range(10)])
    with pytest.raises(
        FolderError, match=r"20 missing \(0.weight, 0.bias, 1.weight, 1.bias, 2.weight, \.\.\.\)\. Build"
    ):
        load_into(many, {})


def test_one_name_of_a_tied_tensor_is_enough() -> None:
    for name in ("embed.weight", "head.weight"):
        target = Tied()
        load_into(target, {name: torch.full((3, 3), 2.0)})
        assert target.embed.weight is target.head.weight
        assert torch.equal(target.embed.weight, torch.full((3, 3), 2.0))


def test_different_weights_for_a_tied_tensor_are_refused() -> None:
    state = {"embed.weight": torch.zeros(3, 3), "head.weight": torch.ones(3, 3)}
    with pytest.raises(FolderError, match=r"embed\.weight and head\.weight are one tensor in the network but differ"):
        load_into(Tied(), state)


def test_real_weights_are_read(data_dir: Path) -> None:
    state = read_state(data_dir / "models" / "mnist_mlp_a.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "fc1.weight": (400, 784),
        "fc2.weight": (200, 400),
        "fc3.weight": (100, 200),
        "fc4.weight": (10, 100),
    }


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("fc.weight", torch.ones(2, 4, dtype=torch.complex64), "its imaginary part would be lost; save the real part"),
        ("fc.weight", torch.ones(2, 4, dtype=torch.int8), "these look like quantized weights, whose scale would be"),
        ("norm.num_batches_tracked", torch.tensor(1.5), "what is behind the point would be lost"),
        ("norm.running_mean", torch.full((4,), 2**24 + 1), "numbers would be lost that do not fit"),
    ],
)
def test_tensors_of_which_a_part_would_be_lost_are_refused(name: str, tensor: Tensor, message: str) -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = f"^{name}: expected {before[name].dtype}, got {tensor.dtype}: {message}"
    with pytest.raises(FolderError, match=expected):
        load_into(model, {**before, name: tensor})
    assert same(model.state_dict(), before)


def test_tensors_that_change_their_type_without_loss_are_taken() -> None:
    model = network()
    given = {**model.state_dict(), "norm.running_mean": torch.tensor([1, 2, 3, 4])}
    given |= {"norm.num_batches_tracked": torch.tensor(3.0), "fc.bias": torch.tensor([0.5, 0.25], dtype=torch.float64)}
    load_into(model, given)
    assert model.norm.running_mean.tolist() == [1, 2, 3, 4]
    assert model.norm.num_batches_tracked.item() == 3
    assert model.fc.bias.tolist() == [0.5, 0.25]
