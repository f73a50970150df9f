"""The networks of the zoo against independent arithmetic, and against published accuracies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from intrafusion.lab import zoo
from intrafusion.lab.zoo.networks import BasicBlock, ResNet, ViT, cifar_resnet, resnet18, resnet50
from intrafusion.lab.zoo.networks.mobilenet import SamePadConv2d
from intrafusion.lab.zoo.networks.padded_resnet import PaddedResNet, PadShortcut
from intrafusion.lab.zoo.networks.vit import Attention
from intrafusion.measure.accuracy import accuracy
from intrafusion.network.sources import import_torchvision

# accuracy in percent and the number of test images to measure it on; the published ones are of the full test sets,
# but for cifar10_vgg11_bn (first 2,000) and imagenet_mobilenetv1_025 (1,000 images)
PUBLISHED = {
    "cifar10_resnet20": (92.60, 500),
    "cifar10_resnet20_pad": (91.73, 500),
    "cifar10_vgg11_bn": (83.95, 500),
    "cifar10_resnet32": (93.53, 500),
    "cifar100_resnet20": (68.83, 500),
    "cifar10_densenet100": (90.9, 100),
    "cifar10_vit": (71.93, 500),
    "imagenet_mobilenetv1_025": (59.2, 200),
    "mnist_mlp_a": (97.72, 2000),
    "mnist_mlp_b": (97.75, 2000),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_trained_networks_reach_their_published_accuracy(name: str, data_dir: Path) -> None:
    published, count = PUBLISHED[name]
    data = zoo.load_data(name, "sample" if name.startswith("imagenet") else "test", count)
    measured = 100 * accuracy(zoo.build(name, pretrained=True), data.images, data.labels)
    standard_error = (published * (100 - published) / count) ** 0.5
    assert len(data) == count
    assert abs(measured - published) < (1.5 if count == 2000 else 3 * standard_error)


def test_every_trained_network_has_a_published_accuracy() -> None:
    assert set(PUBLISHED) == set(zoo.names(trained=True))


@pytest.mark.parametrize("name", zoo.names(trained=True))
def test_trained_weights_load_strictly_as_float32(name: str, data_dir: Path) -> None:
    from safetensors.torch import load_file

    stored = load_file(data_dir / "models" / f"{name}.safetensors")
    state = zoo.build(name, pretrained=True).state_dict()
    counts = {key for key in state if key.endswith("num_batches_tracked")}
    assert set(stored) | counts == set(state)
    for key, tensor in stored.items():
        assert torch.equal(state[key].to(tensor.dtype), tensor)
        assert state[key].dtype in (torch.float32, torch.int64)


@pytest.mark.parametrize(("ours", "theirs"), [(resnet18, "resnet18"), (resnet50, "resnet50")])
def test_imagenet_resnets_agree_with_torchvision(ours, theirs: str) -> None:
    try:
        reference = import_torchvision().models.get_model(theirs, weights=None, num_classes=7).eval()
    except ModuleNotFoundError:
        pytest.skip("needs torchvision")
    model = ours(num_classes=7, stem="imagenet").eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)


# parameters counted by hand from the papers' tables, norms included
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cifar10_resnet20_pad", 269_722),  # He et al. 2016: 0.27M
        ("cifar10_resnet20", 269_722 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64),  # and two projections
        ("cifar10_densenet100", 769_162 + 2 * 24),  # Huang et al. 2017: 0.8M; and the norm of the stem
        ("resnet18", 11_173_962),
        ("resnet50", 25_557_032),
        ("vgg11_bn", 9_231_114),
        ("vgg16_bn", 14_728_266),
        ("imagenet_mobilenetv1_025", 470_072),
        ("mnist_mlp_a", 784 * 400 + 400 * 200 + 200 * 100 + 100 * 10),
    ],
)
def test_parameter_counts(name: str, count: int) -> None:
    assert sum(p.numel() for p in zoo.build(name).parameters()) == count


def test_the_digits_network_is_small_and_has_both_shortcuts() -> None:
    model = zoo.build("digits_resnet")
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    assert [block.downsample is None for block in blocks] == [True, False, False]
    assert sum(p.numel() for p in model.parameters()) < 100_000


def test_a_basic_block_with_silent_branch_is_its_shortcut() -> None:
    block = BasicBlock(4, 4, 1).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_the_padded_shortcut_halves_the_image_and_adds_zero_channels_on_both_sides() -> None:
    x = torch.randn(2, 16, 6, 6)
    out = PadShortcut(32)(x)
    assert out.shape == (2, 32, 3, 3)
    assert torch.equal(out[:, 8:24], x[:, :, 0::2, 0::2])
    assert out[:, :8].abs().sum() == out[:, 24:].abs().sum() == 0


@pytest.mark.parametrize("constructor", [cifar_resnet, PaddedResNet])
def test_a_cifar_depth_is_6k_plus_2(constructor) -> None:
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in constructor(32).modules()) == 31
    with pytest.raises(ValueError, match=r"expected a depth of 6k \+ 2 .*, got 21"):
        constructor(21)


def test_a_resnet_wants_one_width_per_stage() -> None:
    with pytest.raises(ValueError, match="zip"):
        ResNet(BasicBlock, [1, 1], [8])


@pytest.mark.parametrize(("size", "stride"), [(8, 1), (7, 1), (8, 2), (14, 2)])
def test_same_padding_is_tensorflows(size: int, stride: int) -> None:
    conv = SamePadConv2d(2, 3, stride)
    x = torch.randn(1, 2, size, size)
    total = max((-(-size // stride) - 1) * stride + 3 - size, 0)  # TensorFlow: the smaller half goes first
    before, after = total // 2, total - total // 2
    expected = F.conv2d(F.pad(x, (before, after, before, after)), conv.weight, stride=stride)
    torch.testing.assert_close(conv(x), expected)


def test_attention_agrees_with_torchs() -> None:
    ours, theirs = Attention(12, heads=3), nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_without_positions_a_vit_ignores_the_order_of_patches() -> None:
    model = ViT(image=8, patch=4, width=12, depth=2, heads=3, hidden=16).eval()
    x = torch.randn(1, 3, 8, 8)
    swapped = torch.cat([x[..., 4:], x[..., :4]], dim=-1)
    assert not torch.allclose(model(x), model(swapped), atol=1e-6)
    nn.init.zeros_(model.embedding.pos_embeddings)
    torch.testing.assert_close(model(x), model(swapped))


@pytest.mark.parametrize("name", zoo.names())
def test_every_network_gives_one_score_per_class(name: str) -> None:
    model = zoo.build(name)
    with torch.no_grad():
        out = model(zoo.example_input(name, batch=2))
    assert out.shape == (2, zoo.entry(name).num_classes)
    assert out.isfinite().all()
    assert not torch.equal(out[0], out[1])
