"""Networks by name: seeds, modes, and what is said when a name or a file is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from intrafusion.errors import FolderError
from intrafusion.lab import zoo


def test_the_same_seed_builds_the_same_network_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (zoo.build("digits_resnet", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_networks_come_in_evaluation_mode() -> None:
    assert not any(module.training for module in zoo.build("digits_resnet").modules())


def test_untrained_convolutions_start_with_hes_variance() -> None:
    weight = zoo.build("cifar10_vgg11_bn").get_parameter("features.22.weight")
    assert float(weight.detach().std()) == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_example_inputs_are_the_same_each_time() -> None:
    x = zoo.example_input("mnist_mlp_a", batch=3)
    assert x.shape == (3, 1, 28, 28)
    assert torch.equal(x, zoo.example_input("mnist_mlp_a", batch=3))
    assert not torch.equal(x, zoo.example_input("mnist_mlp_a", batch=3, seed=1))


@pytest.mark.parametrize("function", [zoo.entry, zoo.build, zoo.example_input])
def test_an_unknown_network_is_named_with_the_nearest(function) -> None:
    with pytest.raises(ValueError, match=r"unknown network 'resnet_18'. Did you mean 'resnet18'\? Valid: cifar"):
        function("resnet_18")


def test_an_untrained_network_has_no_weights() -> None:
    assert "resnet18" not in zoo.names(trained=True)
    with pytest.raises(ValueError, match="resnet18 has no trained weights; .* pretrained=False.* cifar10_resnet20"):
        zoo.build("resnet18", pretrained=True)


def test_weights_want_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTRAFUSION_DATA", raising=False)
    with pytest.raises(FolderError, match="mnist_mlp_a.safetensors is needed, but INTRAFUSION_DATA is not set"):
        zoo.build("mnist_mlp_a", pretrained=True)


def test_weights_want_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INTRAFUSION_DATA", str(tmp_path))
    with pytest.raises(FolderError, match="expected the file models/mnist_mlp_a.safetensors there, found none"):
        zoo.build("mnist_mlp_a", pretrained=True)


def test_half_precision_weights_become_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INTRAFUSION_DATA", str(tmp_path))
    (tmp_path / "models").mkdir()
    state = {key: value.half() for key, value in zoo.build("mnist_mlp_a", seed=3).state_dict().items()}
    save_file(state, tmp_path / "models" / "mnist_mlp_a.safetensors")
    loaded = zoo.build("mnist_mlp_a", pretrained=True).state_dict()
    assert loaded["fc1.weight"].dtype == torch.float32
    assert torch.equal(loaded["fc1.weight"], state["fc1.weight"].float())


def test_weights_of_another_network_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INTRAFUSION_DATA", str(tmp_path))
    (tmp_path / "models").mkdir()
    save_file({"fc1.weight": torch.zeros(400, 784)}, tmp_path / "models" / "mnist_mlp_b.safetensors")
    with pytest.raises(FolderError, match=r"do not fit MLP: 3 missing \(fc2.weight"):
        zoo.build("mnist_mlp_b", pretrained=True)
