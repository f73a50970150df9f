"""Options mean the same wherever they stand, the page says what the program does, and old names still work."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType

import pytest
from click.testing import Result

from intrafusion.cli.compress import compress_command
from intrafusion.cli.defaults import join_defaults, told_defaults
from intrafusion.cli.main import COMMANDS
from intrafusion.cli.program import OLD_OPTIONS, expand_word
from intrafusion.lab.experiments import EXPERIMENTS

Program = Callable[[str], Result]


def test_a_name_means_the_same_in_every_command(option_script: ModuleType) -> None:
    meanings: dict[str, set[tuple[object, ...]]] = {}
    places: dict[str, list[str]] = {}
    for command, function in COMMANDS.items():
        for option in option_script.options_of(function):
            for name in option.names:
                meaning = (option.about, option.kind, option.metavar, option.limits, option.names)
                meanings.setdefault(name, set()).add(meaning)
                places.setdefault(name, []).append(command)
    several = {"MODEL..."}  # of networks of one structure
    assert {name: found for name, found in meanings.items() if len(found) > 1 and name not in several} == {}
    assert {"--images", "--keep", "--output", "--json", "--device"} <= {n for n, p in places.items() if len(p) > 2}


def test_a_meaning_has_one_name(option_script: ModuleType) -> None:
    names: dict[str, set[str]] = {}
    for function in COMMANDS.values():
        for option in option_script.options_of(function):
            names.setdefault(option.about, set()).add(option.names[0])
    assert {about: found for about, found in names.items() if len(found) > 1} == {}


def test_every_option_is_explained(option_script: ModuleType) -> None:
    for command, function in COMMANDS.items():
        for option in option_script.options_of(function):
            assert option.about, f"{command} {option.names[0]}"
            assert option.kind is bool or option.metavar, f"{command} {option.names[0]}"


def test_the_page_is_what_the_program_says(option_script: ModuleType) -> None:
    text = option_script.PAGE.read_text(encoding="utf-8")
    assert option_script.page(text) == text, "run: python docs/cli_options.py"
    assert option_script.page(text.replace("| `--json` |", "| `--yaml` |")) == text
    assert all(f"`intrafusion {command}" in text for command in COMMANDS)


def test_old_names_lead_to_options_that_exist(option_script: ModuleType) -> None:
    for command, renamed in OLD_OPTIONS.items():
        known = {name for option in option_script.options_of(COMMANDS[command]) for name in option.names}
        assert set(renamed.values()) <= known
        assert not set(renamed) & known


@pytest.mark.parametrize("line", ["--criterion l2 --batch 0", "--criterion=l2 --batch=0"])
def test_an_old_name_is_taken_and_the_new_one_said(program: Program, line: str) -> None:
    result = program(f"experiment whole-model {line}")
    assert result.exit_code == 2
    assert "note: --criterion is called --importance now." in result.stderr
    assert "--batch-size" in result.stderr.partition("Invalid value")[2]


def test_an_option_that_there_is_not_is_answered_with_the_nearest(program: Program) -> None:
    result = program("experiment whole-model --images 3")
    assert result.exit_code == 2
    assert "--test-images, --train-images" in " ".join(result.stderr.replace("│", "").split())


# ---- defaults -------------------------------------------------------------------------------------------------------

WITHOUT = {
    *(
        "--ranks",
        "--memory",
        "--merge-heads",
        "--evaluate",
        "--base",
        "--weights",
        "--arg",
        "--input",
        "--images",
        "--texts",
        "--keep-images",
        "--recipe",
        "--ray",
        "--cores",
    ),
    *("--max-drop", "--max-error"),
    *("--target", "--round-to", "--include", "--exclude", "--outputs", "--test-images", "--picture", "--checkpoints"),
}
"""Options that nothing stands for where they are left out."""
ONLY_SOMETIMES = {("fuse", "--data"), ("compress", "--output"), ("frontier", "--output"), ("fuse", "--output")} | {
    (command, "--train-images") for command in ("split-train", "experiment")
}


def test_every_default_is_shown(option_script: ModuleType, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The help of every command shows the default of every option; what has none is known here by name."""
    monkeypatch.setenv("COLUMNS", "1000")
    for command, function in COMMANDS.items():
        lines = {w: line for line in program(f"{command} --help").stdout.splitlines() for w in line.split()[1:3]}
        for option in option_script.options_of(function):
            name = option.names[0]
            if option.argument or option.kind is bool or name in WITHOUT or (command, name) in ONLY_SOMETIMES:
                continue
            assert option.default is not None, f"{command} {name} shows no default"
            assert f"[default: {option.default}]" in lines[name].replace("(", "").replace(")", ""), f"{command} {name}"


def test_the_defaults_shown_are_the_real_ones(program: Program) -> None:
    """A line with all of them is the line without."""
    options = (f"--{name.replace('_', '-')} {text}" for name, text in told_defaults(compress_command).items())
    spelt = " ".join(options)
    for other in ("--normalization source", "--of macs", "--distill-seconds 300"):  # of other methods, and of sizes
        spelt = spelt.replace(other, "")
    bare, full = (program(f"compress nets.py:Net --input 2,4 {line} --json") for line in ("", spelt))
    assert spelt.count("--") == len(told_defaults(compress_command)) - 3
    assert json.loads(full.stdout)["recipe"] == json.loads(bare.stdout)["recipe"]
    fused = "fuse nets.py:Net nets.py:Net --input 2,4 --json"
    spelt = " --keep 1 --restore none --using weights --seed 0 --cost distance --sides both --share 1 --share 1"
    assert json.loads(program(fused + spelt).stdout) == json.loads(program(fused).stdout)


def test_defaults_that_differ_by_case_are_all_told() -> None:
    assert join_defaults({"a": 0.5, "b": (0.9, 0.7), "c": 0.5, "d": ("x",)}) == "0.5; b: 0.9, 0.7; d: x"
    assert join_defaults({"a": {"name": "pivot"}}) == "pivot"
    keep = {name: e.defaults.keep for name, e in EXPERIMENTS.items()}
    told = told_defaults(COMMANDS["experiment"])["keep"]
    assert told.startswith("0.7; ")
    assert all(f"{n}: {', '.join(map(str, k))}" in told for n, k in keep.items() if k != (0.7,))


def test_words_may_begin_at_the_home_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind an option and the kind of a network, where no shell says so; patterns are no paths."""
    monkeypatch.setenv("HOME", "/home/me")
    asked = ["~/net.py:Net", "hf:~/folder", "--output=~/small", "-o", "~", "~x", "a~/b", "--include=~fc"]
    meant = ["/home/me/net.py:Net", "hf:/home/me/folder", "--output=/home/me/small", "-o", "/home/me", *asked[5:]]
    assert [expand_word(word) for word in asked] == meant
