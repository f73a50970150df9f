"""The networks of the zoo as plain modules, one architecture family per file."""

from intrafusion.lab.zoo.networks.densenet import DenseNet
from intrafusion.lab.zoo.networks.mlp import MLP
from intrafusion.lab.zoo.networks.mobilenet import MobileNetV1
from intrafusion.lab.zoo.networks.padded_resnet import PaddedResNet
from intrafusion.lab.zoo.networks.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    cifar_resnet,
    digits_resnet,
    resnet18,
    resnet50,
)
from intrafusion.lab.zoo.networks.vgg import VGG
from intrafusion.lab.zoo.networks.vit import ViT

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
