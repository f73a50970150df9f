"""intrafusion inspect: of networks and of saved folders, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

import intrafusion
from intrafusion.cli.models import resolve

Program = Callable[[str], Result]


def test_the_table_shows_every_group_with_its_layers_or_reason(program: Program) -> None:
    result = program("inspect nets.py:Net --input 2,4")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[2] == ["first", "8", "mixed", "second"]
    assert lines[3] == ["second", "6", "mixed", "third"]
    assert lines[4] == ["third", "3", "kept", "output", "of", "the", "network"]
    assert "2 of 3 groups can be reduced" in result.stdout
    assert "parameters 115; MACs 196" in result.stdout  # 5*8 + 9*6 + 7*3; 2 * (4*8 + 8*6 + 6*3)


def test_json_is_the_graph_of_the_library(program: Program) -> None:
    result = program("inspect nets.py:Net --input 2,4 --arg width=10 --json")
    data = json.loads(result.stdout)
    assert data["model"] == "nets.py:Net"
    assert data["size"] == {"params": 137, "macs": 236}
    assert [(g["group"], g["n"], g["reason"]) for g in data["groups"]] == [
        ("first", 10, None),
        ("second", 6, None),
        ("third", 3, "output of the network"),
    ]
    assert data["groups"][0]["members"] == [
        "first.weight[0] produces",
        "second.weight[1] consumes",
        "first.bias[0] shifts",
    ]
    assert "a word from the network" not in result.stdout
    assert "a word from the network" in result.stderr


def test_named_and_whole_number_inputs_reach_the_network(program: Program) -> None:
    data = json.loads(program("inspect nets.py:Words --input 2,5:int64 --input mask=2,5 --json").stdout)
    assert {g["group"]: (g["n"], g["reason"]) for g in data["groups"]}["up"] == (12, None)


def test_a_network_of_the_zoo_needs_no_weights(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTRAFUSION_DATA", raising=False)
    data = json.loads(program("inspect zoo:cifar10_resnet20 --json").stdout)
    assert data["size"]["params"] == 272_474
    assert [g["n"] for g in data["groups"] if g["group"] == "layer2.0.conv1"] == [32]


def test_a_saved_folder_without_its_original_shows_what_was_done(program: Program, user_folder: Path) -> None:
    small = intrafusion.compress(resolve("nets.py:Net").build(), torch.ones(1, 4), keep=0.5)
    small.save("small")
    result = program("inspect small")
    assert result.exit_code == 0
    said, _, table = result.stdout.partition("\n\n")
    lines = said.splitlines()
    assert lines[:2] == ["parameters  115 -> 47 (40.9%)", "MACs        98 -> 37 (37.8%)"]
    assert "latency" not in said
    assert str(small.restored[0]) in " ".join(said.split())
    assert "output error: the mean squared difference" in said
    assert table.splitlines()[2].split() == ["first", "8", "->", "4", "mixed", "second"]
    assert "parameters" not in table
    data = json.loads(program("inspect small --json").stdout)
    assert data["after"] == {"params": 47, "macs": 37}
    assert [(g["group"], g["n"], g["m"]) for g in data["groups"]] == [
        ("first", 8, 4),  # 5*4 + 5*3 + 4*3 parameters
        ("second", 6, 3),
        ("third", 3, 3),
    ]
    assert data["recipe"]["keep"] == 0.5
    assert [step["step"] for step in data["restored"]] == [step.step for step in small.restored]
    assert data["comparison"]["after"]["params"] == 47


def test_a_folder_that_tells_no_more_than_its_sizes(program: Program, user_folder: Path) -> None:
    """As those of 0.1, and plans that were carried out without restoring."""
    model, example = resolve("nets.py:Net").build(), torch.ones(1, 4)
    intrafusion.apply(model, intrafusion.compress(model, example, 0.5, restore=None).plan, example).save("small")
    result = program("inspect small")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("group")
    assert "parameters 115 -> 47 (40.9%); MACs 98 -> 37 (37.8%)" in result.stdout


def test_a_saved_folder_with_its_original_shows_the_smaller_network(program: Program, user_folder: Path) -> None:
    program("compress nets.py:Net --input 2,4 --keep 0.5 -o small")
    data = json.loads(program("inspect small --base nets.py:Net --input 2,4 --json").stdout)
    assert [(g["group"], g["n"]) for g in data["groups"]] == [("first", 4), ("second", 3), ("third", 3)]
    assert data["size"]["params"] == 47


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("inspect nets.py:Nit --input 2,4", "unknown attribute 'Nit'. Did you mean 'Net'?"),
        ("inspect zoo:resnet81", "unknown zoo model 'resnet81'. Did you mean 'resnet18'?"),
        ("inspect nets.py:Net", "no example input is known for it; give its shape, such as --input 1,3,224,224"),
        ("inspect nets.py:Net --input 2,5", "does not run on the example inputs (float32[2, 5])"),
        (
            "inspect nowhere",
            "cannot tell which network 'nowhere' is, and there is no such folder; expected module:factory",
        ),
        ("inspect .", "this folder was not saved by intrafusion"),
        ("inspect nets.py:Net --input 2,4 --base zoo:resnet18", "--base zoo:resnet18 goes with a saved folder"),
    ],
)
def test_bad_input_ends_with_its_message_and_code_2(program: Program, line: str, message: str) -> None:
    result = program(line)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
