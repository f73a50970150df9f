"""A missed target in words."""

from __future__ import annotations

import pytest

from intrafusion.budget.missed import describe_amount, explain_miss
from intrafusion.plan import is_miss


@pytest.mark.parametrize(
    ("kind", "amount", "text"),
    [
        ("params", 47.0, "47 parameters"),
        ("params", 999_999, "999,999 parameters"),
        ("params", 25_557_032, "25.6 M parameters"),
        ("macs", 4_089_184_256, "4.09 G MACs"),
        ("macs", 1.5e16, "15,000 T MACs"),
        ("latency_ms", 3.0, "3 ms"),
        ("latency_ms", 0.03456, "0.0346 ms"),
        ("latency_ms", 1234.5, "1,234 ms"),
    ],
)
def test_amounts_are_written_as_people_write_them(kind: str, amount: float, text: str) -> None:
    assert describe_amount(kind, amount) == text


def test_a_miss_says_both_amounts_and_their_shares() -> None:
    text = explain_miss("params", 1_361_022, 1_308_675, 2_617_350)
    assert text.startswith("target missed: 1.36 M parameters (52 %) instead of 1.31 M (50 %); ")
    assert explain_miss("latency_ms", 4.25, 3.0, 9.0).startswith("target missed: 4.25 ms instead of 3 ms; ")
    assert is_miss(text)
    even = explain_miss("macs", 1e6, 2e6, 4e6, even=True)
    assert "nothing comes closer" not in even
    assert (
        "no such share of every group comes closer, and sizes that do were measured to change the output more" in even
    )
    assert "e+" not in explain_miss("macs", 1.23e12, 1e12, 4e12)
