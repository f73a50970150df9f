"""Families of timm and torchvision, on small images."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.network.sources import import_torchvision

from .family import Family


def image(pixels: int, channels: int = 3) -> tuple[Tensor]:
    return (torch.randn(1, channels, pixels, pixels),)


def _timm(name: str, pixels: int = 64, **options: Any) -> Family:
    return Family(f"timm:{name}", "timm", partial(_build_timm, name, options), partial(image, pixels))


def _build_timm(name: str, options: dict[str, Any]) -> nn.Module:
    import_torchvision()
    return importlib.import_module("timm").create_model(name, pretrained=False, num_classes=7, **options)


def _torchvision(name: str, pixels: int = 64, **options: Any) -> Family:
    return Family(
        f"torchvision:{name}", "torchvision", partial(_build_torchvision, name, options), partial(image, pixels)
    )


def _build_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    return import_torchvision().models.get_model(name, weights=None, num_classes=7, **options)


def _torchvision_module(name: str, build: Callable[[Any], nn.Module], pixels: int) -> Family:
    return Family(
        f"torchvision:{name}", "torchvision", lambda: build(import_torchvision().models), partial(image, pixels)
    )


def _vit(models: Any) -> nn.Module:
    return models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=7)


def _swin(models: Any) -> nn.Module:
    return models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=7)


TORCHVISION = (
    _torchvision("squeezenet1_1"),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("mobilenet_v2", width_mult=0.25),
    _torchvision("mnasnet0_5"),
    _torchvision("resnet18", width_per_group=64),
    _torchvision("googlenet", aux_logits=False, init_weights=False),
    _torchvision_module("vit", _vit, 32),
    _torchvision_module("swin", _swin, 32),
)

TIMM = (
    _timm("test_resnet"),
    _timm("test_byobnet"),
    _timm("test_convnext"),
    _timm("test_convnext2"),
    _timm("test_efficientnet"),
    _timm("test_efficientnet_gn"),
    _timm("test_efficientnet_ln"),
    _timm("test_efficientnet_evos"),
    _timm("test_nfnet"),
    _timm("test_mambaout"),
    _timm("test_vit", img_size=64),
    _timm("test_vit3", img_size=64),
    _timm("test_vit_relpos", img_size=64),
    _timm("densenet121", block_config=(2, 2, 2), growth_rate=8),
    _timm("mobilenetv3_small_050"),
    _timm("ghostnet_050"),
    _timm("skresnet18"),
    _timm("ese_vovnet19b_slim"),
    _timm("swin_tiny_patch4_window7_224", 56, img_size=56, embed_dim=24, depths=(1, 1), num_heads=(2, 4)),
    _timm("deit_tiny_patch16_224", img_size=64, embed_dim=48, depth=2, num_heads=3),
    _timm("beit_base_patch16_224", img_size=64, embed_dim=48, depth=2, num_heads=3),
    _timm("eva02_tiny_patch14_224", 56, img_size=56, embed_dim=48, depth=2, num_heads=3),
    _timm("cait_xxs24_224", img_size=64, embed_dim=48, depth=2, num_heads=4),
    _timm("xcit_nano_12_p16_224", img_size=64, embed_dim=48, depth=2, num_heads=4),
    _timm("mobilevit_xxs"),
    _timm("davit_tiny", depths=(1, 1), embed_dims=(24, 48), num_heads=(2, 4)),
    _timm("sequencer2d_s", img_size=64, layers=(1, 1, 1, 1), embed_dims=(24, 24, 24, 24), hidden_sizes=(6, 6, 6, 6)),
)
