"""Pre-norm vision transformer with a class token and learned positions (Dosovitskiy et al. 2021, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _PatchEmbedding(nn.Module):
    """One token per patch: (batch, 3, H, W) to (batch, HW / patch^2, width)."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2)


class _Embedding(nn.Module):
    """Class token and patches, with their positions added."""

    def __init__(self, image: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch_embeddings = _PatchEmbedding(patch, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embeddings = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embeddings(x)
        token = self.cls_token.expand(len(patches), -1, -1)
        return torch.cat([token, patches], dim=1) + self.pos_embeddings


class Attention(nn.Module):
    """Multi-head self-attention; heads are as wide as the projections make them, values apart from the others."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(project(x)) for project in (self.query, self.key, self.value))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _FeedForward(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _EncoderLayer(nn.Module):
    """Attention and feed-forward, each on normalised inputs and around an identity."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.ffn = _FeedForward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class _Encoder(nn.Module):
    """`depth` encoder layers, one after the other."""

    def __init__(self, depth: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(_EncoderLayer(width, heads, hidden) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ViT(nn.Module):
    """Embedding, encoder, and a linear head on the normalised class token; defaults are a small one for CIFAR.

    Args:
        image: height and width of the images, in pixels.
        patch: height and width of a patch, in pixels.
        width: size of a token.
        hidden: width of the feed-forward layers.
    """

    def __init__(
        self,
        image: int = 32,
        patch: int = 4,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        hidden: int = 256,
        *,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.embedding = _Embedding(image, patch, width)
        self.encoder = _Encoder(depth, width, heads, hidden)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp_head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.encoder(self.embedding(x)))
        return self.mlp_head(x[:, 0])
