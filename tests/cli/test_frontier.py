"""intrafusion frontier: a row for each size, a folder for each, and what is wrong is told before the work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import intrafusion
from intrafusion import pipeline

Program = Callable[[str], Result]
OWN = "frontier nets.py:Net --input 2,4 --arg width=24"


def test_every_size_is_shown_drawn_and_saved(program: Program) -> None:
    line = f"{OWN} --size 0.8 --size 0.5 --restore noise -o several --picture f.svg"
    result = program(line)
    assert result.exit_code == 0, result.stderr
    assert "macs 0.8" in result.stdout
    assert "saved in several" in result.stdout
    assert "<svg" in Path("f.svg").read_text()
    alone = program("compress nets.py:Net --input 2,4 --arg width=24 --target macs=0.5 --restore noise -o alone --json")
    assert alone.exit_code == 0, alone.stderr
    theirs = json.loads(alone.stdout)
    data = json.loads(program(f"{line} --json").stdout)
    assert [point["asked"] for point in data["points"]] == ["macs 0.8", "macs 0.5"]
    assert data["points"][1]["after"] == theirs["after"]
    assert data["points"][1]["groups"] == {g["group"]: g["m"] for g in theirs["groups"] if g["m"] < g["n"]}
    assert Path("several/macs-0.5/model.safetensors").read_bytes() == Path("alone/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--size half", "--size half: expected a fraction alone here, such as 0.7"),
        ("--size 2", "expected a fraction in (0, 1], got 2"),
        ("--size 0.5 --size 0.5", "expected each size once, got 0.5 twice"),
        ("--of weights", "unknown measure 'weights'"),
        ("-o nets.py", "nets.py: expected a folder, but this is a file"),
        ("--images none.npy", "there is no such file"),
        ("--picture f.docx --size 0.5", "--picture f.docx: expected a picture in .png, .svg or .pdf"),
    ],
)
def test_what_means_nothing_is_told(options: str, message: str, program: Program) -> None:
    result = program(f"{OWN} --restore none {options}")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_what_is_finished_is_written_where_it_is_interrupted(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    carry_out, done = pipeline.Prepared.carry_out, []

    def interrupted(self: pipeline.Prepared, recipe: intrafusion.Recipe) -> intrafusion.Compressed:
        if done:
            raise KeyboardInterrupt
        done.append(recipe)
        return carry_out(self, recipe)

    monkeypatch.setattr(pipeline.Prepared, "carry_out", interrupted)
    result = program(f"{OWN} --size 0.8 --size 0.5 --restore none -o several")
    assert result.exit_code == 130
    assert "several/macs-0.8 is written" in result.stderr
    assert Path("several/macs-0.8/plan.json").exists()
    assert not Path("several/macs-0.5").exists()
