"""The networks of the zoo by name: how each is built, what it was trained on, and where its weights are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from intrafusion.arguments import Count, Seed, checked
from intrafusion.brief import show_briefly
from intrafusion.errors import ArgumentError, unknown_name
from intrafusion.io.weights import load_into, read_state
from intrafusion.lab.zoo.images import Normalisation
from intrafusion.lab.zoo.networks import (
    MLP,
    VGG,
    DenseNet,
    MobileNetV1,
    PaddedResNet,
    ViT,
    cifar_resnet,
    digits_resnet,
    resnet18,
    resnet50,
)
from intrafusion.lab.zoo.root import data_file
from intrafusion.network.provenance import set_source_


class Factory(Protocol):
    """Builds a network with random weights."""

    def __call__(self, *, num_classes: int) -> nn.Module: ...


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Attributes:
        data: name of the data set it is for.
        input_shape: (C, H, W) of one image.
        weights: stem of the file of trained weights, None if there are none.
    """

    factory: Factory
    data: str
    normalisation: Normalisation
    input_shape: tuple[int, int, int]
    num_classes: int = 10
    weights: str | None = None

    __repr__ = show_briefly


CIFAR10 = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_CIFAR10_EXACT_STD = Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = Normalisation((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761))
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SYMMETRIC = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MNIST = Normalisation((0.1307,), (0.3081,))
DIGITS = Normalisation((0.3058,), (0.3756,), white=16.0)

_SMALL, _LARGE, _GREY, _DIGIT = (3, 32, 32), (3, 224, 224), (1, 28, 28), (1, 8, 8)

_VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

NETWORKS: dict[str, Entry] = {
    "cifar10_resnet20": Entry(partial(cifar_resnet, 20), "cifar10", CIFAR10, _SMALL, weights="cifar10_resnet20"),
    "cifar10_resnet32": Entry(partial(cifar_resnet, 32), "cifar10", CIFAR10, _SMALL, weights="cifar10_resnet32"),
    "cifar10_resnet20_pad": Entry(
        partial(PaddedResNet, 20), "cifar10", IMAGENET, _SMALL, weights="cifar10_resnet20_pad"
    ),
    "cifar10_vgg11_bn": Entry(partial(VGG, _VGG11), "cifar10", IMAGENET, _SMALL, weights="cifar10_vgg11_bn"),
    "cifar10_densenet100": Entry(DenseNet, "cifar10", CIFAR10, _SMALL, weights="cifar10_densenet100"),
    "cifar10_vit": Entry(ViT, "cifar10", _CIFAR10_EXACT_STD, _SMALL, weights="cifar10_vit"),
    "cifar100_resnet20": Entry(
        partial(cifar_resnet, 20), "cifar100", CIFAR100, _SMALL, num_classes=100, weights="cifar100_resnet20"
    ),
    "imagenet_mobilenetv1_025": Entry(
        partial(MobileNetV1, 0.25), "imagenet", _SYMMETRIC, _LARGE, num_classes=1000, weights="imagenet_mobilenetv1_025"
    ),
    "mnist_mlp_a": Entry(MLP, "mnist", MNIST, _GREY, weights="mnist_mlp_a"),
    "mnist_mlp_b": Entry(MLP, "mnist", MNIST, _GREY, weights="mnist_mlp_b"),
    "digits_resnet": Entry(digits_resnet, "digits", DIGITS, _DIGIT),
    "resnet18": Entry(resnet18, "cifar10", CIFAR10, _SMALL),
    "resnet50": Entry(resnet50, "imagenet", IMAGENET, _LARGE, num_classes=1000),
    "vgg11_bn": Entry(partial(VGG, _VGG11), "cifar10", CIFAR10, _SMALL),
    "vgg16_bn": Entry(partial(VGG, _VGG16), "cifar10", CIFAR10, _SMALL),
}


@checked
def names(*, trained: bool = False) -> tuple[str, ...]:
    """Names of the networks; with `trained`, of those that have trained weights."""
    return tuple(name for name, entry in NETWORKS.items() if entry.weights or not trained)


@checked
def entry(name: str) -> Entry:
    """What is known of a network.

    Raises:
        ArgumentError: unknown network.
    """
    if name not in NETWORKS:
        raise ArgumentError(unknown_name("network", name, NETWORKS))
    return NETWORKS[name]


@checked
def build(name: str, *, pretrained: bool = False, seed: Seed = 0) -> nn.Module:
    """Build a network, in evaluation mode, with random or trained float32 weights.

    Trained weights are read from `$INTRAFUSION_DATA/models`. The random numbers of the program are left alone.

    Args:
        seed: of the random weights.
    Raises:
        ArgumentError: unknown network, or `pretrained` and it has no trained weights.
        FolderError: INTRAFUSION_DATA is unset, or the weight file is missing, damaged or of another network.
    """
    found = entry(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = found.factory(num_classes=found.num_classes).eval()
        _he_init_(model)
    if pretrained:
        if found.weights is None:
            trained = ", ".join(names(trained=True))
            raise ArgumentError(
                f"{name} has no trained weights; build it with pretrained=False, or take one of {trained}."
            )
        load_into(model, read_state(data_file("models", f"{found.weights}.safetensors")))
    return set_source_(model, "zoo", name, {})


@checked
def example_input(name: str, *, batch: Count = 1, seed: Seed = 0) -> Tensor:
    """Random images (batch, C, H, W), standard normal, of the shape a network takes.

    Raises:
        ArgumentError: unknown network.
    """
    return torch.randn(batch, *entry(name).input_shape, generator=torch.Generator().manual_seed(seed))


def _he_init_(model: nn.Module) -> None:
    """Convolutions that keep the size of the signal from layer to layer (He et al. 2015, Eq. 10).

    PyTorch's own start lets it fade: an untrained MobileNet then answers the same to every image.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
