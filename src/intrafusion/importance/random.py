"""Random importance: the control experiment that ignores the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from intrafusion.arguments import Seed, checked
from intrafusion.graph import ChannelGroup


@checked
@dataclass(frozen=True)
class Random:
    """Uniform scores in [0, 1), drawn anew for each group: the same seed and group name give the same scores.

    Reference: Theus et al. 2024, Table 5.
    """

    seed: Seed = 0

    random = True  # of the class: scores belong to indices, not to what is there

    @checked
    def __call__(self, group: ChannelGroup, weights: Mapping[str, Tensor], observations: object = None) -> Tensor:
        generator = np.random.default_rng([self.seed, *group.name.encode()])
        return torch.from_numpy(generator.random(group.size))
