"""Parameters and multiply-accumulates against counts by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.errors import ModelError
from intrafusion.lab import zoo
from intrafusion.measure.size import Size, size_of


# weights per output value, times output values
@pytest.mark.parametrize(
    ("layer", "shape", "params", "macs"),
    [
        (nn.Linear(7, 5), (3, 7), 5 * 7 + 5, 3 * 5 * 7),
        (nn.Linear(7, 5, bias=False), (2, 3, 7), 5 * 7, 6 * 5 * 7),
        (nn.Conv2d(4, 6, 3), (1, 4, 8, 7), 6 * 4 * 9 + 6, (6 * 5) * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8), 6 * 4 * 9 + 6, 2 * (4 * 4) * 6 * 4 * 9),
        (nn.Conv2d(4, 6, (1, 3), dilation=2), (1, 4, 8, 8), 6 * 4 * 3 + 6, (8 * 4) * 6 * 4 * 3),
        (nn.Conv2d(4, 8, 3, groups=2), (1, 4, 5, 5), 8 * 2 * 9 + 8, (3 * 3) * 8 * 2 * 9),
        (nn.Conv2d(6, 6, 3, groups=6, bias=False), (1, 6, 5, 5), 6 * 9, (3 * 3) * 6 * 9),
        (nn.Conv1d(4, 6, 3), (2, 4, 7), 6 * 4 * 3 + 6, 2 * 5 * 6 * 4 * 3),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 5), 3 * 2 * 8 + 3, (2 * 3 * 4) * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 5, 5), 4 * 3 * 9 + 6, (5 * 5) * 4 * 3 * 9),
        (nn.BatchNorm2d(4), (1, 4, 5, 5), 8, 0),
    ],
)
def test_one_layer(layer: nn.Module, shape: tuple[int, ...], params: int, macs: int) -> None:
    assert size_of(layer, torch.randn(shape)) == Size(params, macs)


def test_a_small_network() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),  # 8 x 8 out
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False),  # 4 x 4 out
        nn.Conv2d(8, 16, 1, bias=False),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    params = (8 * 27 + 8) + 16 + 8 * 9 + 16 * 8 + (256 * 10 + 10)
    macs = 64 * 8 * 27 + 16 * 8 * 9 + 16 * 16 * 8 + 256 * 10
    assert size_of(model, torch.randn(1, 3, 8, 8)) == Size(params, macs)


def test_macs_are_those_of_the_whole_batch() -> None:
    model = zoo.build("digits_resnet")
    one, five = (size_of(model, zoo.example_input("digits_resnet", batch=n)) for n in (1, 5))
    assert five == Size(one.params, 5 * one.macs)


def test_a_cifar_resnet_has_its_published_size() -> None:
    """41 million MACs (He et al. 2016 give 0.27M parameters): 3x3 convolutions, stage by stage, and the head."""
    stem, stage = 1024 * 16 * 27, 1024 * 16 * 16 * 9
    first = [256 * 32 * 16 * 9, 64 * 64 * 32 * 9]  # of the second and third stage, which halve the image
    macs = stem + 6 * stage + 2 * 5 * stage + sum(first) + 640
    assert size_of(zoo.build("cifar10_resnet20_pad"), zoo.example_input("cifar10_resnet20_pad")) == Size(269_722, macs)


class SelfAttention(nn.Module):
    """PyTorch's own, which has a fused fast path in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


PROJECTIONS, SCORES = 4 * (2 * 5) * 8 * 8, 2 * (2 * 5 * 5) * 8  # batch 2, 5 tokens, width 8


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        (SelfAttention(), PROJECTIONS + SCORES),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), PROJECTIONS + SCORES + 2 * (2 * 5) * 8 * 16),
        (nn.LSTM(8, 6, batch_first=True), (2 * 5) * 4 * 6 * (8 + 6)),
        (nn.GRU(8, 6, batch_first=True), (2 * 5) * 3 * 6 * (8 + 6)),
    ],
    ids=["attention", "encoder", "lstm", "gru"],
)
def test_fused_kernels_count_too(model: nn.Module, macs: int) -> None:
    assert size_of(model, torch.randn(2, 5, 8)).macs == macs
    assert torch.backends.mha.get_fastpath_enabled()


def test_grouped_queries_count_every_query_head() -> None:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    inputs = (torch.randn(2, 4, 5, 3), torch.randn(2, 2, 7, 3))  # 4 query heads, 2 key heads
    assert size_of(Grouped(), inputs) == Size(0, 2 * 4 * 2 * 5 * 7 * 3)


def test_shared_parameters_count_once_and_their_work_each_time() -> None:
    shared = nn.Linear(6, 6)
    assert size_of(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(1, 6)) == Size(42, 72)


def test_the_network_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    size_of(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_named_inputs_and_inputs_that_do_not_fit() -> None:
    assert size_of(nn.Linear(4, 3), {"input": torch.zeros(2, 4)}) == Size(15, 24)
    with pytest.raises(ModelError, match=r"the network \(Linear\) does not run on the example inputs"):
        size_of(nn.Linear(4, 3), torch.zeros(2, 5))
