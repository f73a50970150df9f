"""The shell completes commands, options, and the names of networks and methods."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess

import programs
import pytest

from intrafusion.cli.completion import complete_device, complete_model

BASH = shutil.which("bash")
PROGRAM = "from intrafusion.cli.main import app; app(prog_name='intrafusion')"


def completed(*words: str) -> list[str]:
    """What bash is answered where the last of these words is completed; it has parted them at colons."""
    where = {"COMP_WORDS": "\n".join(("intrafusion", *words)), "COMP_CWORD": str(len(words))}
    return programs.run(["-c", PROGRAM], _INTRAFUSION_COMPLETE="complete_bash", **where).stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("comp",), {"compress"}),
        (("compress", "x", "--min"), {"--min-channels"}),
        (("compress", "x", "--reducer", "f"), {"fold", "flap"}),
        (("experiment", "whole-model", "--importance", "l"), {"l1", "l2", "linf", "lamp"}),
        (("inspect", "z"), {"zoo:"}),
        (("inspect", "zoo", ":", "digits"), {"digits_resnet"}),
        (("inspect", "zoo", ":", "digits_resnet", "--js"), {"--json"}),
    ],
)
def test_bash_gets_the_names(words: tuple[str, ...], expected: set[str]) -> None:
    assert set(completed(*words)) == expected


def test_behind_a_colon_alone_are_all_names() -> None:
    assert {"resnet18", "digits_resnet"} <= set(completed("inspect", "zoo", ":"))


def test_other_shells_take_whole_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMP_WORDS", raising=False)
    assert complete_model("zoo:digits") == ["zoo:digits_resnet"]
    assert complete_model("t") == ["torchvision:", "timm:"]
    assert complete_model("nowhere:x") == []
    assert complete_device("c")[:2] == ["cpu", "cuda"]


@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm")
def test_networks_of_timm_are_completed() -> None:
    assert complete_model("timm:test_resnet") == ["timm:test_resnet"]


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_the_script_for_bash_is_shown_and_runs() -> None:
    script = programs.run(["-c", PROGRAM], _INTRAFUSION_COMPLETE="source_bash").stdout
    assert "complete -o default -F _intrafusion_completion intrafusion" in script
    subprocess.run([str(BASH), "-c", f"{script}\ncomplete -p intrafusion"], check=True, capture_output=True)
