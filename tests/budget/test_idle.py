"""Options that change nothing say so, and say nothing where they change something."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bare import compress
from torch import Tensor, nn

from intrafusion import ModelError


def network() -> nn.Module:
    """Groups "0" of 12 channels and "2" of 6; "4" is the output."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))


def notes_of(**options: Any) -> tuple[str, ...]:
    return compress(network(), torch.randn(2, 4), **options).plan.warnings


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"keep": 0.9, "round_to": 12}, "round_to=12 leaves every group as it is: 0 (12), 2 (6); give a smaller "),
        ({"keep": 0.5, "round_to": 6}, "round_to=6 leaves groups as they are that keep would shrink: 2 (6); give "),
        ({"keep": 0.5, "min_channels": 20}, "min_channels=20 leaves every group as it is: 0 (12), 2 (6); give "),
        ({"keep": 0.5, "min_channels": 7}, "min_channels=7 leaves groups as they are that keep would shrink: 2 (6);"),
        ({"keep": 1.0}, "keep=1.0 leaves every group as it is; give a smaller fraction."),
        ({"keep": 0.99, "include": "2", "min_channels": 6}, "min_channels=6 leaves every group as it is: 2 (6); "),
        (
            {"keep": {"0": 0.5, "4": 0.5}},
            "keep['4'] changes nothing: no group that can be reduced goes by it (4: output ",
        ),
        (
            {"keep": {"4": 0.5, "*": 1.0}},
            "keep['4'] changes nothing: no group that can be reduced goes by it (4: output ",
        ),
        ({"keep": {"*": 0.5, "2": 0.9}}, "keep['2'] changes nothing: its groups go by '*', which comes first and so "),
        ({"keep": {"*": 1.0, "2": 0.9}}, "keep['2'] changes nothing: its groups go by '*', which comes first and so "),
        ({"keep": 0.5, "include": ["0", "4"]}, "include '4' changes nothing: none of its channels can be "),
        ({"keep": 0.5, "exclude": "1"}, "exclude '1' changes nothing: these layers have no channels of "),
        ({"target": {"params": 1.0}}, "target {'params': 1.0}: no group becomes smaller."),
    ],
)
def test_an_option_that_changes_nothing_says_so(options: dict[str, Any], note: str) -> None:
    (found,) = notes_of(**options)
    assert found.startswith(note)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.5},
        {"keep": 0.5, "round_to": 3, "min_channels": 2},
        {"keep": {"0": 0.5, "2": 1.0}},
        {"keep": 0.5, "include": "0"},
        {"keep": 0.5, "exclude": "2"},
    ],
)
def test_options_with_effect_are_passed_over(options: dict[str, Any]) -> None:
    assert notes_of(**options) == ()


class _Attention(nn.Module):
    """Queries, keys and values take the width of a head from one number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.k, self.v = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.o, self.head, self.width = nn.Linear(8, 8), nn.Linear(8, 2), 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (layer(x).unflatten(-1, (2, self.width)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head(self.o(mixed.reshape(*x.shape[:2], 2 * self.width)).relu())


@pytest.mark.parametrize(
    ("keep", "note", "sizes"),
    [
        ({"q": 0.5, "*": 1.0}, "q#{0,1}: cut in step with v#0, of which 100% were asked for; whole heads ", {}),
        ({"k": 0.5, "stem": 1.0}, "q#{0,1}: cut in step with v#0, of which 100% were asked for; whole heads ", {}),
        (
            {"v*": 0.5, "q*": 0.75},
            "v#{0,1}: cut in step with q#0, of which 75% were asked for; whole ",
            {"q": 3, "v": 3},
        ),
        ({"v#0": 0.5, "*": 0.75}, "v#0: cut in step with q#0, of which 75% were asked for; whole ", {"q": 3, "v": 3}),
    ],
)
def test_the_side_of_heads_that_is_cut_in_step_with_another_says_so(
    keep: dict[str, float], note: str, sizes: dict[str, int]
) -> None:
    torch.manual_seed(0)
    plan = compress(_Attention(), torch.randn(2, 5, 3), keep).plan
    (found,) = [text for text in plan.warnings if "in step" in text]
    assert found.startswith(note)
    assert {name.partition("#")[0]: m for name, m in plan.sizes.items() if "#" in name} == sizes
    assert not any("give a smaller fraction" in text for text in plan.warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "*"}, "include and exclude leave no channel group to reduce; select other layers. '0': excluded"),
        ({"include": "1"}, "include and exclude leave no channel group to reduce; select other layers. '0': not incl"),
        ({"include": "4"}, "include and exclude leave no channel group to reduce; select other layers. '4': "),
    ],
)
def test_selectors_that_leave_nothing_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as error:
        compress(network(), torch.randn(2, 4), 0.5, **options)
    assert str(error.value).startswith(message)
