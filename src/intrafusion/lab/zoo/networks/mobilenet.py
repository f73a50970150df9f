"""MobileNetV1: depthwise and pointwise convolutions in turn, layer names as in Keras (Howard et al. 2017)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# output width at alpha = 1, and stride, of the 13 depthwise-pointwise pairs
_PAIRS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)


class SamePadConv2d(nn.Conv2d):
    """3x3 convolution with TensorFlow's "same" padding for even sizes: at stride 2 only right and bottom are padded."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride, padding=1 if stride == 1 else 0, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)) if self.stride == (2, 2) else input)


class MobileNetV1(nn.Module):
    """Stem, 13 depthwise-pointwise pairs with ReLU6, global average pooling, 1x1 convolution as head.

    Args:
        alpha: multiplies every width; widths must stay whole.
    """

    def __init__(self, alpha: float = 1.0, *, num_classes: int = 1000) -> None:
        super().__init__()
        width = int(32 * alpha)
        self.layers = ["conv1"]
        self._add("conv1", SamePadConv2d(3, width, stride=2))
        for k, (full_width, stride) in enumerate(_PAIRS, start=1):
            outputs = int(full_width * alpha)
            self.layers += [f"conv_dw_{k}", f"conv_pw_{k}"]
            self._add(f"conv_dw_{k}", SamePadConv2d(width, width, stride, groups=width))
            self._add(f"conv_pw_{k}", nn.Conv2d(width, outputs, 1, bias=False))
            width = outputs
        self.conv_preds = nn.Conv2d(width, num_classes, 1)

    def _add(self, name: str, conv: nn.Conv2d) -> None:
        self.add_module(name, conv)
        self.add_module(f"{name}_bn", nn.BatchNorm2d(conv.out_channels, eps=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.layers:
            x = F.relu6(self.get_submodule(f"{name}_bn")(self.get_submodule(name)(x)))
        return self.conv_preds(x.mean((2, 3), keepdim=True)).flatten(1)
