"""Everything runs where the network is."""

import subprocess
import sys
from pathlib import Path

import elsewhere
import pytest
import torch

POSSIBLE = elsewhere.POSSIBLE or torch.cuda.is_available()


@pytest.mark.slow
@pytest.mark.skipif(not POSSIBLE, reason="needs a CUDA device, or a torch that takes devices written in Python")
def test_on_another_device_than_the_cpu() -> None:
    """In a process of its own: autograd looks for devices before its first backward pass, and never again."""
    checks = Path(__file__).with_name("device_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(checks)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=checks.parent.parent, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-2_000:]
    assert "passed" in run.stdout
