"""Timing leaves networks and the mode of gradients as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intrafusion.measure.latency import latencies_ms


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_on_or_off_as_before_and_modes_too(enabled: bool) -> None:
    models = [nn.Linear(3, 2).train(), nn.Linear(3, 2).eval()]
    with torch.set_grad_enabled(enabled):
        latencies_ms(models, torch.zeros(1, 3), repeats=1, warmup=0)
        assert torch.is_grad_enabled() is enabled
        assert not torch.is_inference_mode_enabled()
    assert [m.training for m in models] == [True, False]
