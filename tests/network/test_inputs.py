"""Example inputs that are changed a little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion
from intrafusion import ModelError
from intrafusion.errors import watching
from intrafusion.measure.size import size_of
from intrafusion.network.inputs import Inputs, told_of

SHUT = {"least": torch.finfo(torch.float32).min, "infinite": -torch.inf, "large": -1e4}


@pytest.mark.parametrize("value", SHUT)
def test_a_mask_that_is_added_to_scores_stays_one(value: str) -> None:
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) == 1, SHUT[value])
    varied = Inputs((mask,)).varied().args[0]
    assert torch.equal(varied[mask < 0], mask[mask < 0])
    assert float(varied[mask == 0].abs().max()) < 1e-3
    assert len(varied[mask == 0].unique()) == 15
    whole = Inputs((torch.full((3,), SHUT[value]),)).varied().args[0]
    assert torch.equal(whole, torch.full((3,), SHUT[value]))


@pytest.mark.parametrize("value", SHUT)
def test_attention_with_such_a_mask_is_reduced(value: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(F.scaled_dot_product_attention(x, x, x.relu(), mask))

    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) == 1, SHUT[value])
    small = intrafusion.compress(Masked(), (torch.randn(2, 5, 3), mask), 0.5, restore=None)
    assert not small.rolled_back


class Cache:
    """As those of transformers."""

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


def test_keys_and_values_of_earlier_tokens_are_refused() -> None:
    x = torch.zeros(2, 3)
    assert Inputs.of({"x": x, "cache": Cache(0), "kind": Cache}).tensors() == [x]
    for example in ({"x": x, "cache": Cache(5)}, (x, [Cache(5)])):
        with pytest.raises(ModelError, match="got a Cache of 5 of them, which fit this network alone; leave it out"):
            Inputs.of(example)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_named(layout: torch.layout) -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nested.to_padded_tensor(self.layer(nest([x[0, :3], x[1, :2]], layout=layout)), 0.0)

    nest, x = torch.nested.as_nested_tensor, torch.randn(2, 3, 4)
    with pytest.raises(ModelError, match="example_inputs: expected tensors of one shape, got a nested tensor"):
        intrafusion.inspect(nn.Linear(4, 2), nest([x[0], x[1, :2]], layout=layout))
    assert Ragged()(x).shape == (2, 3, 2)
    with pytest.raises(
        ModelError, match=r"^_nested_\w+ in the network gives a nested tensor.*padded sequences and a mask"
    ):
        intrafusion.inspect(Ragged(), x)


def test_what_fails_in_the_library_is_not_told_as_wrong_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(60, 4)
    monkeypatch.setattr("intrafusion.network.layers.zlib", None)  # which places of a layer are looked at needs it
    with pytest.raises(ModelError, match=r"AttributeError.*fault in intrafusion \(network.layers.py, line \d+\)"):
        intrafusion.compress(net, x, 0.5, inputs=x)


def test_packages_with_names_that_begin_alike_are_not_taken_for_the_library() -> None:
    code = compile("1 / 0", f"{Path(intrafusion.__file__).parent}_hooks/own.py", "exec")
    blamed = r"ZeroDivisionError.*fault in intrafusion \(network"
    with pytest.raises(ModelError, match=blamed), told_of(nn.Identity(), Inputs.of(torch.ones(1))), watching():
        exec(code)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 4, 4, 5)])
def test_wrong_inputs_are_told_as_such_in_every_mode(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for run in (intrafusion.inspect, size_of):
        with pytest.raises(ModelError, match="Pass inputs of the shape"):
            run(net, torch.randn(shape))


class _Image(torch.Tensor):
    """A class of its own that operations keep, as of libraries of images."""


def test_images_of_a_class_of_their_own_are_followed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    image = torch.randn(1, 3, 8, 8).as_subclass(_Image)
    assert [g.size for g in intrafusion.inspect(model, image).reducible] == [8]
