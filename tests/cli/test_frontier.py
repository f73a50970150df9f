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
SCORES = """
count = lambda model: sum(p.numel() for p in model.parameters())
fail = lambda model: 1 / 0
say = lambda model: "good"
"""
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


def test_what_a_function_of_the_user_gives_is_shown_for_each_size_and_for_the_original(program: Program) -> None:
    Path("scores.py").write_text(SCORES)
    line = f"{OWN} --size 0.8 --size 0.5 --restore none --evaluate scores.py:count --memory 1GB"
    data = json.loads(program(f"{line} --json").stdout)
    assert data["score"] == data["before"]["params"]
    assert [point["score"] for point in data["points"]] == [point["after"]["params"] for point in data["points"]]
    assert "score" in program(line).stdout.splitlines()[0]
    without = json.loads(program(f"{OWN} --size 0.8 --restore none --json").stdout)
    assert (without["score"], without["points"][0]["score"]) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--size half", "--size half: expected a fraction alone here, such as 0.7"),
        ("--size 2", "expected a fraction in (0, 1], got 2"),
        ("--size 0.5 --size 0.5", "expected each size once, got 0.5 twice"),
        ("--of weights", "unknown measure 'weights'"),
        ("--memory much", "Invalid value for '--memory'"),
        ("--evaluate nets.py:Net", "--evaluate nets.py:Net: expected a function of a network, got a type; name one"),
        ("--evaluate zoo:mlp", "--evaluate zoo:mlp: expected a function of a network as path.py:function or"),
        ("--evaluate nets.py:torch", "--evaluate nets.py:torch: expected a function of a network, got a module"),
        ("--evaluate nets.py:count", "nets.py:count: "),
        ("--evaluate scores.py:fail", "--evaluate scores.py:fail: raised ZeroDivisionError: division by zero; it is"),
        ("--evaluate scores.py:say", "evaluate: expected it to return a number, got 'good'; return one"),
        ("-o nets.py", "nets.py: expected a folder, but this is a file"),
        ("--images none.npy", "there is no such file"),
        ("--picture f.docx --size 0.5", "--picture f.docx: expected a picture in .png, .svg or .pdf"),
    ],
)
def test_what_means_nothing_is_told(options: str, message: str, program: Program) -> None:
    Path("scores.py").write_text(SCORES)
    result = program(f"{OWN} --restore none {options}")
    assert result.exit_code == 2, result.stderr
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
