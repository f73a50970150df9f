"""Memory as it is said, and as the system tells it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import intrafusion.network.free_memory as free_memory
from intrafusion.errors import RecipeError
from intrafusion.network.free_memory import choose_memory, find_free_memory, read_memory


@pytest.mark.parametrize(
    ("said", "expected"),
    [("2GB", 2 * 10**9), ("2 gb", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("700", 700), ("3k", 3000), (5, 5), (None, None)],
)
def test_what_is_said(said: str | int | None, expected: int | None) -> None:
    assert read_memory(said) == expected


@pytest.mark.parametrize("said", ["", "GB", "2PB", "-1GB", "1e9", "0", "0.1", 0, -1, 2**63, 1.5, True, "2 G B"])
def test_what_means_nothing(said: object) -> None:
    with pytest.raises(RecipeError, match="memory: expected bytes, at least one, such as 2GB"):
        read_memory(said)  # type: ignore[arg-type]


def test_a_limit_counts_where_it_leaves_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info, limit, used = tmp_path / "meminfo", tmp_path / "max", tmp_path / "current"
    info.write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    limit.write_text("30000\n")
    used.write_text("10000\n")
    monkeypatch.setattr(free_memory, "_MEMINFO", info)
    monkeypatch.setattr(free_memory, "_LIMITS", ((str(limit), str(used)),))
    assert find_free_memory(torch.device("cpu")) == 20_000
    limit.write_text("max\n")
    assert find_free_memory(torch.device("cpu")) == 50 * 1024
    assert (choose_memory(None), choose_memory(7)) == (25 * 1024, 7)
    info.unlink()
    assert find_free_memory(torch.device("cpu")) == free_memory._UNKNOWN
