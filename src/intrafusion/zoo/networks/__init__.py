"""The networks of the zoo as plain modules, one architecture family per file."""

from intrafusion.zoo.networks.densenet import DenseNet
from intrafusion.zoo.networks.mlp import MLP
from intrafusion.zoo.networks.mobilenet import MobileNetV1
from intrafusion.zoo.networks.padded_resnet import PaddedResNet
from intrafusion.zoo.networks.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    cifar_resnet,
    digits_resnet,
    resnet18,
    resnet50,
)
from intrafusion.zoo.networks.vgg import VGG
from intrafusion.zoo.networks.vit import ViT

__all__ = [
    "MLP",
    "VGG",
    "BasicBlock",
    "Bottleneck",
    "DenseNet",
    "MobileNetV1",
    "PaddedResNet",
    "ResNet",
    "ViT",
    "cifar_resnet",
    "digits_resnet",
    "resnet18",
    "resnet50",
]
