"""intrafusion compress: what it saves is what the library gives, what it says is true, and how it ends."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from torch import nn

import intrafusion
from intrafusion import ModelError, pipeline
from intrafusion.cli import compress as compress_module
from intrafusion.cli import console
from intrafusion.cli.compress import compress_command, read_keep
from intrafusion.cli.console import messages, working
from intrafusion.cli.inputs import read_inputs
from intrafusion.cli.models import ModelSpec, resolve
from intrafusion.cli.outputs import save_network
from intrafusion.recipe import Recipe
from intrafusion.restore import Distill, load_images

Program = Callable[[str], Result]
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def original(**args: Any) -> nn.Module:
    return resolve("nets.py:Net", [f"{key}={value}" for key, value in args.items()]).build()


def outputs_of(line: str) -> torch.Tensor:
    """What the network that a printed line of Python loads says to X."""
    scope: dict[str, Any] = {}
    exec(line, scope)
    return scope["model"](X)


def test_the_saved_network_is_the_one_of_the_library(program: Program) -> None:
    result = program("compress nets.py:Net --input 2,4 --keep 0.5 -o small")
    assert result.exit_code == 0
    expected = intrafusion.compress(original(), read_inputs(["2,4"]), keep=0.5)
    assert torch.equal(intrafusion.load("small", original())(X), expected.model(X))
    shown = result.stdout.splitlines()
    start = shown.index("")
    assert shown[start + 3].split() == ["first", "8", "->", "4", "mixed", "second"]
    assert "\n".join(shown[start:]).startswith(str(expected).partition("\n\n")[2].join(["\n", "\n\nsaved to small"]))
    assert "\nparameters  115 -> 47 (40.9%)\nMACs        196 -> 74 (37.8%)\n" in result.stdout
    summary = str(expected).partition("\n\n")[0]  # a measured latency may wrap in one of the two and not in the other
    kinds, printed = (
        [
            line.split()[0]
            for line in lines
            if line[0] != " " and not line.startswith("warning: the smaller network is not")
        ]
        for lines in (summary.splitlines(), shown[:start])  # whether it is faster is measured, too
    )
    assert printed == kinds
    assert {"latency", "outputs", "restored:"} <= set(kinds)
    assert torch.equal(outputs_of(result.stdout.splitlines()[-1]), expected.model(X))


def test_json_is_one_document_that_loads_the_network_back(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = program("compress nets.py:Net --arg width=10 --input 2,4 -o small --json")
    assert "\x1b" not in result.stdout
    data = json.loads(result.stdout)
    expected = intrafusion.compress(original(width=10), read_inputs(["2,4"]))
    assert data["model"] == "nets.py:Net"
    assert data["output"] == "small"
    assert data["rolled_back"] == []
    assert (data["before"], data["after"]) == (asdict(expected.before), asdict(expected.after))
    assert [(g["group"], g["n"], g["m"]) for g in data["groups"]] == [
        ("first", 10, 7),
        ("second", 6, 4),
        ("third", 3, 3),
    ]
    assert data["recipe"]["keep"] == 0.7
    assert torch.equal(outputs_of(data["load"]), expected.model(X))


def test_what_is_loaded_computes_as_it_was_measured(program: Program) -> None:
    """A class makes networks in training mode, a command none: its batch norms would else take the user's batch."""
    assert program("compress nets.py:Net --input 2,4 --restore none -o small").exit_code == 0
    assert not intrafusion.load("small", lambda: original().train()).training


def test_without_a_folder_nothing_is_written(program: Program, user_folder: Path) -> None:
    before = sorted(user_folder.rglob("*"))
    result = program("compress nets.py:Net --input 2,4")
    assert result.exit_code == 0
    assert "nothing was written; -o FOLDER saves it" in result.stdout
    assert [p for p in sorted(user_folder.rglob("*")) if "__pycache__" not in str(p)] == before
    assert json.loads(program("compress nets.py:Net --input 2,4 --json").stdout)["load"] is None


def test_a_saved_folder_is_compressed_again(program: Program) -> None:
    program("compress nets.py:Net --input 2,4 --keep 0.5 -o small")
    result = program("compress small --base nets.py:Net --input 2,4 --keep 0.5 -o smaller --json")
    data = json.loads(result.stdout)
    assert [(g["n"], g["m"]) for g in data["groups"]] == [(4, 2), (3, 1), (3, 3)]
    once = intrafusion.load("small", original())
    twice = intrafusion.compress(once, read_inputs(["2,4"]), keep=0.5)
    assert torch.equal(outputs_of(data["load"]), twice.model(X))


def test_running_again_replaces_the_folder(program: Program) -> None:
    program("compress nets.py:Net --input 2,4 --keep 0.5 -o small")
    assert program("compress nets.py:Net --input 2,4 --keep 0.9 -o small").exit_code == 0
    expected = intrafusion.compress(original(), read_inputs(["2,4"]), keep=0.9)
    assert torch.equal(intrafusion.load("small", original())(X), expected.model(X))


def test_weights_are_loaded(program: Program, user_folder: Path) -> None:
    trained = original()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(2)
    save_file(trained.state_dict(), "trained.safetensors")
    assert program("compress nets.py:Net --weights trained.safetensors --input 2,4 -o small").exit_code == 0
    expected = intrafusion.compress(trained, read_inputs(["2,4"]))
    assert torch.equal(intrafusion.load("small", original())(X), expected.model(X))


def test_images_target_and_what_was_restored(program: Program) -> None:
    images = torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
    np.savez("images.npz", images=images.numpy())
    line = "compress nets.py:Net --arg width=24 --input 2,4 --target params=0.6 --min-channels 2 --images images.npz"
    data = json.loads(program(f"{line} --keep-images seen.safetensors -o small --json").stdout)
    expected = intrafusion.compress(
        original(width=24), read_inputs(["2,4"]), target={"params": 0.6}, min_channels=2, images=images
    )
    assert torch.equal(outputs_of(data["load"]), expected.model(X))
    (step,) = data["restored"]
    assert (step["step"], step["on"]) == ("LeastSquares", "40 images")
    assert step["error_after"] < step["error_before"]
    assert data["after"]["params"] / data["before"]["params"] == pytest.approx(0.6, rel=0.05)
    assert torch.equal(load_images("seen.safetensors"), images)
    assert json.loads(Path("small/plan.json").read_text())["restored"] == data["restored"]
    again = json.loads(
        program("compress nets.py:Net --arg width=24 --input 2,4 --recipe small/recipe.yaml --json").stdout
    )
    assert again["recipe"]["target"] == {"params": 0.6}


def test_nothing_is_restored_if_that_is_asked_for(program: Program) -> None:
    data = json.loads(program("compress nets.py:Net --input 2,4 --restore none -o small --json").stdout)
    assert data["restored"] == []
    expected = intrafusion.compress(original(), read_inputs(["2,4"]), restore=None)
    assert torch.equal(outputs_of(data["load"]), expected.model(X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--target half", "--target half: expected KIND=VALUE"),
        ("--target params=0.5 --keep 0.5", "expected keep or target, got both"),
        ("--target speed=2", "unknown measure 'speed'"),
        ("--images nets.py", "--images nets.py: expected .npy, or .npz, .safetensors or .pt"),
        ("--images absent.npz", "--images absent.npz: expected .npy, or .npz, .safetensors or .pt"),
        ("--restore images", 'restore="images": expected images='),
        ("--restore nois", "unknown restorer 'nois'. Did you mean 'noise'?"),
    ],
)
def test_bad_restoration_ends_with_its_message(program: Program, options: str, message: str) -> None:
    result = program(f"compress nets.py:Net --input 2,4 {options}")
    assert result.exit_code == 2
    assert message in result.stderr


def test_every_option_reaches_the_recipe_and_the_recipe_runs_again(program: Program) -> None:
    options = (
        "--keep first=0.5 --keep 0.9 --reducer intrafusion --normalization function --importance l2 --order backward "
        "--round-to 2 --include first --include second --exclude third:outputs --seed 7"
    )
    first = program(f"compress nets.py:Net --input 2,4 {options} -o small --json")
    expected = Recipe.of(
        keep={"first": 0.5, "*": 0.9},
        reducer=intrafusion.IntraFusion(normalization="function"),
        importance="l2",
        order="backward",
        round_to=2,
        include=["first", "second"],
        exclude="third:outputs",
        seed=7,
    )
    assert Recipe.from_yaml(Path("small/recipe.yaml").read_text()) == expected
    again = program("compress nets.py:Net --input 2,4 --recipe small/recipe.yaml -o again --json")
    assert json.loads(again.stdout)["groups"] == json.loads(first.stdout)["groups"]
    assert Path("again/model.safetensors").read_bytes() == Path("small/model.safetensors").read_bytes()


def test_options_beside_a_recipe_count_more(program: Program) -> None:
    Path("recipe.yaml").write_text(Recipe.of(keep=0.5, importance="linf", exclude="second").to_yaml())
    data = json.loads(program("compress nets.py:Net --input 2,4 --recipe recipe.yaml --keep 0.8 --json").stdout)
    assert data["recipe"] | {"keep": 0.8, "importance": "linf", "exclude": ["second:outputs"]} == data["recipe"]
    assert [(g["n"], g["m"]) for g in data["groups"]] == [(8, 6), (6, 6), (3, 3)]


def test_plain_pruning_selects(program: Program) -> None:
    result = program("compress nets.py:Net --input 2,4 --reducer select --keep 0.5 -o small")
    assert "selected" in result.stdout
    small, full = intrafusion.load("small", original()), original()
    scores = full.first.weight.square().sum(1) + full.second.weight.square().sum(0)
    kept = scores.topk(4).indices.sort().values
    assert torch.equal(small.first.weight, full.first.weight[kept])


@pytest.mark.parametrize(("flag", "code"), [("", 0), ("--strict", 3)])
def test_a_group_that_had_to_be_rolled_back_is_said_and_with_strict_ends_with_code_3(
    program: Program, flag: str, code: int
) -> None:
    result = program(f"compress nets.py:Literal --input 2,4 --keep 0.5 -o small {flag}")
    assert result.exit_code == code
    assert "rolled back: first" in result.stdout
    assert "the smaller network does not run" in result.stdout
    assert intrafusion.load("small", resolve("nets.py:Literal").build()).second.weight.shape == (3, 8)
    data = json.loads(program(f"compress nets.py:Literal --input 2,4 --keep 0.5 --json {flag}").stdout)
    assert data["rolled_back"] == ["first"]


def test_strict_is_content_where_nothing_was_rolled_back(program: Program) -> None:
    assert program("compress nets.py:Net --input 2,4 --exclude first --strict").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--keep 1.5", "keep: expected a fraction in (0, 1], got 1.5"),
        ("--keep 0", "keep: expected a fraction in (0, 1], got 0.0"),
        ("--keep nan", "keep: expected a fraction in (0, 1], got nan"),
        ("--keep half", "--keep half: expected a fraction such as 0.7, or PATTERN=0.7"),
        ("--keep first=", "--keep first=: expected a fraction"),
        ("--keep 0.5 --keep 0.6", "--keep 0.6: there is a fraction for '*' already"),
        ("--keep firts=0.5", "keep: unknown group 'firts'. Did you mean 'first'?"),
        ("--reducer intrafuson", "unknown reducer 'intrafuson'. Did you mean 'intrafusion'?"),
        ("--importance l22", "unknown importance 'l22'. Did you mean 'l2'?"),
        ("--normalization sources", "unknown normalization 'sources'. Did you mean 'source'?"),
        ("--normalization source --reducer select", "--normalization goes with the reducer intrafusion, got Select()"),
        ("--order backwards", "unknown order 'backwards'. Did you mean 'backward'?"),
        ("--round-to 0", "Invalid value for '--round-to'"),
        ("--keep =0.5", "--keep =0.5: expected a pattern in front of ="),
        ("--target params=inf", "target['params']: expected a number above 0, got inf"),
        ("--exclude thrid", "unknown layer 'thrid'. Did you mean 'third'?"),
        ("--include third", "include and exclude leave no channel group to reduce"),
        ("--recipe nets.py", "recipe: "),
        ("--weights nets.py", "cannot tell from the suffix '.py'"),
        ("--weights absent.safetensors", "absent.safetensors: there is no such file"),
        ("-o .", ".: exists and was not written by intrafusion"),
        ("-o nets.py", "nets.py: exists and was not written by intrafusion"),
        ("-o nets.py/small", "Not a directory"),
    ],
)
def test_bad_input_ends_with_its_message_and_code_2(program: Program, options: str, message: str) -> None:
    result = program(f"compress nets.py:Net --input 2,4 --json {options}")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_pickle_is_refused_with_the_remedy(program: Program) -> None:
    Path("whole.pth").write_bytes(pickle.dumps(Path("code")))
    result = program("compress nets.py:Net --input 2,4 --weights whole.pth -o small")
    assert result.exit_code == 2
    assert "whole.pth: refused, reading it would run code" in result.stderr
    assert "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')" in result.stderr
    assert not Path("small").exists()


def test_a_saved_folder_wants_its_original_and_no_weights(program: Program) -> None:
    program("compress nets.py:Net --input 2,4 -o small")
    alone = program("compress small -o smaller")
    assert (alone.exit_code, alone.stdout) == (2, "")
    assert (
        "holds weights, not the code of its network. Name the original network, nets.Net, with --base (module:"
        in alone.stderr
    )
    weighted = program("compress small --base nets.py:Net --input 2,4 --weights x.pth")
    assert weighted.exit_code == 2
    assert "a saved folder has weights of its own; leave out --weights" in weighted.stderr
    other = program("compress small --base nets.py:Words --input 2,4")
    assert other.exit_code == 2
    assert "the plan is for another network" in other.stderr


def test_a_defect_ends_with_code_1_and_says_how_to_report_it(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("intrafusion.choice.decide", fails)
    result = program("compress nets.py:Net --input 2,4")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: RuntimeError at test_compress.py:" in result.stderr
    assert "unforeseen\nThis is a defect of intrafusion, or of the network." in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("INTRAFUSION_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in program("compress nets.py:Net --input 2,4").stderr


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["0.5"], 0.5),
        (["a=0.5"], {"a": 0.5}),
        (["0.7", "b=0.5", "a=1"], {"b": 0.5, "a": 1.0, "*": 0.7}),
        (["*=0.3"], 0.3),
        (["a=b=0.5"], {"a=b": 0.5}),
    ],
)
def test_keeps(texts: list[str], expected: Any) -> None:
    keep = read_keep(texts)
    assert keep == expected
    assert not isinstance(keep, dict) or list(keep) == list(expected)


def test_every_option_of_the_recipe_is_an_option_of_the_command() -> None:
    arguments = signature(compress_command).parameters
    assert set(Recipe.options()) <= set(arguments)
    assert all(arguments[name].default is None for name in Recipe.options())


def test_what_print_warns_of_is_in_the_json(program: Program) -> None:
    data = json.loads(program("compress nets.py:Literal --input 2,4 --json").stdout)
    assert "rolled back: first; the table says why." in data["warnings"]
    comparison = data["comparison"]
    assert (comparison["before"]["params"], comparison["batch"]) == (115, 2)
    assert comparison["after"]["latency_ms"] > 0
    held = comparison["held_out"]
    assert (held["unseen"], held["after"]["error"]) == (
        True,
        pytest.approx(data["restored"][0]["error_after"], rel=0.1),
    )


def test_a_missed_target_is_told_while_it_works_and_in_the_result(program: Program) -> None:
    line = "compress nets.py:Net --input 2,4 --restore none --target params=0.01 --min-channels 3"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("intrafusion.planning.warn_caller", lambda text: messages.print(f"warning: {text}"))
        result = program(line)
    said = "warning: target missed: 39 parameters (33.9 %) instead of 1 (1 %)"  # 5 * 3 + 4 * 3 + 4 * 3
    assert said in " ".join(result.stdout.split())
    assert said in " ".join(result.stderr.split())
    assert any(
        text.startswith(said.removeprefix("warning: "))
        for text in json.loads(program(f"{line} --json").stdout)["warnings"]
    )


def test_warnings_of_the_library_are_one_line_without_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, working(), warnings.catch_warnings(action="always"):
        patch.setattr(console, "messages", console.make_console(stderr=True))
        warnings.warn("so it is", intrafusion.IntrafusionWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: so it is\n"


RANDOM = """
import torch
from torch import nn

class Drawn(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def trained():
    net = Drawn()
    for p in net.parameters():
        nn.init.constant_(p, 0.1)
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(32.).view(8, 4).sin())
    return net

def headless():
    net = trained()
    nn.init.normal_(net[2].weight)
    return net

ready = trained()
"""


@pytest.mark.parametrize(
    ("line", "doubt"),
    [
        ("drawn.py:Drawn", "drawn.py:Drawn: 4 of 4 parameters are random ({0,2}.weight, {0,2}.bias)"),
        ("drawn.py:headless", "drawn.py:headless: 1 of 4 parameters are random (2.weight)"),
        ("drawn.py:trained", None),
        ("drawn.py:ready", None),
        ("drawn.py:Drawn --weights w.safetensors", None),
        (
            "zoo:digits_resnet --arg pretrained=false",
            "zoo:digits_resnet has random weights: the zoo has no trained ones of it, --weights FILE",
        ),
    ],
)
def test_random_weights_are_told(line: str, doubt: str | None, program: Program) -> None:
    Path("drawn.py").write_text(RANDOM)
    shapes = {"0.weight": (8, 4), "0.bias": (8,), "2.weight": (3, 8), "2.bias": (3,)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, "w.safetensors")
    shape = "" if line.startswith("zoo") else " --input 2,4"
    result = program(f"compress {line}{shape} --restore none -o small --json")
    assert result.exit_code == 0, result.stderr
    notes = json.loads(result.stdout)["notes"]
    told = [note for note in notes if "random" in note]
    assert len(told) == (doubt is not None)
    assert (doubt is not None) == ("warning: " in result.stderr)
    if doubt is not None:
        assert f"warning: {doubt}" in result.stderr
        assert told[0].startswith(doubt)
        assert doubt in json.loads(Path("small/plan.json").read_text())["notes"][-1]


def test_timm_without_pretrained_weights_is_told() -> None:
    pytest.importorskip("timm", reason="needs timm: pip install 'intrafusion[timm]'")
    doubt = resolve("timm:resnet18").doubt_weights(nn.Linear(1, 1))
    assert doubt is not None
    assert doubt.startswith("timm:resnet18 has random weights: --arg pretrained=true fetches trained ones")
    assert resolve("timm:resnet18", ["pretrained=true"]).doubt_weights(nn.Linear(1, 1)) is None
    assert resolve("torchvision:resnet18", ["weights=DEFAULT"]).doubt_weights(nn.Linear(1, 1)) is None
    assert resolve("torchvision:resnet18").doubt_weights(nn.Linear(1, 1)) is not None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nets.py:Nit --input what", "unknown attribute 'Nit'. Did you mean 'Net'?"),
        ("nits.py:Net --input what", "did you mean 'nets.py'?"),
        ("nets.py", "Did you mean 'nets.py:Net' or 'nets.py:Literal' or 'nets.py:Words'?"),
        ("nowhere.net:Net", "there is no module 'nowhere'"),
        ("nets.py:torch", "expected a function, a class or a network, got a module"),
        ("zoo:resnet81 --input what", "unknown zoo model 'resnet81'"),
        ("nets.py:Net --input what --weights w.pth", "--input 'what': expected sizes"),
        ("nets.py:Net --input 2,4 --images absent.npy", "absent.npy: expected"),
    ],
)
def test_what_is_cheap_to_see_is_told_before_anything_is_built(
    line: str, message: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelSpec, "build", lambda _: pytest.fail("it was built"))
    result = program(f"compress {line}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


# ---- folders that load alone ----------------------------------------------------------------------------------------


def test_a_folder_that_names_its_network_needs_nothing_beside_it(program: Program) -> None:
    made = "zoo:digits_resnet --arg pretrained=false --arg seed=3"
    assert program(f"compress {made} --keep 0.5 --restore none -o small").exit_code == 0
    once = intrafusion.load("small")
    data = json.loads(program("compress small --keep 0.5 --restore none -o smaller --json").stdout)
    x = torch.randn(2, 1, 8, 8)
    expected = intrafusion.compress(once, torch.randn(1, 1, 8, 8), keep=0.5, restore=None)
    scope: dict[str, Any] = {}
    exec(data["load"], scope)
    assert torch.equal(scope["model"](x), expected.model(x))
    assert data["notes"] == list(expected.notes)  # its weights are in the folder: nothing is known against them
    assert program("fuse small small -o fused").exit_code == 0
    assert program("inspect small --json").exit_code == 0


def test_the_program_in_a_folder_is_read_where_it_is_trusted(program: Program) -> None:
    made = program("compress nets.py:Net --input 2,4 --keep 0.7 -o small --program")
    assert Path("small/program.pt2").is_file()
    assert "or without the code of the network:\n" in made.stdout
    assert torch.equal(outputs_of(made.stdout.splitlines()[-1]), outputs_of(made.stdout.splitlines()[-3]))
    refused = program("compress small")
    assert refused.exit_code == 2
    assert "Name the original network, nets.Net, with --base" in refused.stderr
    assert (
        "if you trust who wrote the folder, load its program, which can run code, with --trust-program."
        in refused.stderr
    )
    assert [g["n"] for g in json.loads(program("inspect small --trust-program --json").stdout)["groups"]] == [5, 4, 3]
    data = json.loads(program("compress small --trust-program --keep 0.5 --restore none -o smaller --json").stdout)
    once = intrafusion.load("small", trust_program=True)
    expected = intrafusion.compress(once, read_inputs(["2,4"]), keep=0.5, restore=None)
    assert torch.equal(outputs_of(data["load"]), expected.model(X))


def test_what_torch_export_does_not_take_is_told_before_the_work(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("odd.py").write_text(
        "from nets import Net\nclass Odd(Net):\n def forward(self, x):\n"
        "  return super().forward(x) * (2 if float(x.sum()) > 1e9 else 1)\n"
    )
    monkeypatch.setattr(pipeline, "inspect", lambda *_, **__: pytest.fail("the work was begun"))
    result = program("compress odd.py:Odd --input 2,4 -o small --program")
    assert result.exit_code == 2
    assert "error: --program: but" not in result.stderr
    assert "--program: torch.export does not take Odd" in result.stderr
    assert not Path("small").exists()
    assert (
        "--program: expected a folder to keep it in; give one with -o."
        in program("compress nets.py:Net --input 2,4 --program").stderr
    )


def test_a_smaller_network_that_is_not_exported_is_saved_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = intrafusion.compress(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), X, 0.5, restore=None)

    def refuse(*_: Any) -> None:
        raise ModelError("save: program=True, but torch.export does not take it.")

    monkeypatch.setattr("intrafusion.io.folder.export_network", refuse)
    with pytest.raises(ModelError, match="--program: torch.export does not take it. .*small was written without it."):
        save_network(small, tmp_path / "small", program=True)
    assert (tmp_path / "small" / "model.safetensors").is_file()


def test_an_interruption_after_saving_says_what_is_there(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compress_module, "save_images", interrupt)
    result = program("compress nets.py:Net --input 2,4 --restore noise -o small --keep-images seen.safetensors")
    assert result.exit_code == 130
    assert "interrupted: small is written; the rest is not" in result.stderr
    assert torch.isfinite(intrafusion.load("small", original())(X)).all()


EVALUATION = """
import torch
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(3))
seen = []
def close(model):
    y = model(X).detach()
    seen.append(y)
    return float(1 - (y - seen[0]).square().mean() / seen[0].var(0).mean())
fail = lambda model: 1 / 0
"""
FOUND = "compress nets.py:Net --input 2,4 --arg width=24 --restore noise"


def test_the_smallest_size_that_a_function_lets_pass_is_found(program: Program) -> None:
    Path("own.py").write_text(EVALUATION)
    result = program(f"{FOUND} --evaluate own.py:close --max-drop 0.3 --of channels -o small --json")
    assert result.exit_code == 0, result.stderr
    trials = json.loads(result.stdout)["trials"]
    assert (trials["measure"], trials["original"], trials["most"]) == ("score", 1.0, 0.3)
    assert all(trial["passes"] == (trial["value"] >= 0.7 - 1e-9) for trial in trials["tried"])
    assert "sizes that loses at most 0.3 of the score 1 (" in " ".join(Path("small/plan.json").read_text().split())
    (Path("r.yaml")).write_text("keep: 0.25\n")
    shown = program(f"{FOUND} --max-error 0.5 --recipe r.yaml --reducer select --of channels --images x.npy")
    assert "there is no such file" in shown.stderr
    shown = program(f"{FOUND} --max-error 0.5 --recipe r.yaml --of channels")
    assert "is the smallest of 38 sizes with output error at most 50 %, on" in " ".join(shown.stdout.split())


def test_distilled_within_a_budget_and_with_checkpoints(program: Program) -> None:
    save_file({"images": torch.randn(60, 4, generator=torch.Generator().manual_seed(0))}, "images.safetensors")
    Path("few.yaml").write_text("restore: {name: distill, steps: 4, views: false, lr: 0.001}")
    line = (
        "compress nets.py:Net --input 2,4 --images images.safetensors --recipe few.yaml --distill-seconds 50 -o small"
    )
    data = json.loads(program(f"{line} --checkpoints kept --json").stdout)
    assert [step["step"] for step in data["restored"]] == ["LeastSquares", "Distill"]
    recipe = intrafusion.Recipe.from_yaml(Path("small/recipe.yaml").read_text())
    assert recipe.restore[1] == Distill(steps=4, seconds=50.0, views=False, lr=0.001, folder="kept")
    assert list(Path("kept").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max-drop 0.01", "max_drop: expected evaluate= too"),
        ("--evaluate own.py:close", "evaluate: goes with max_drop="),
        ("--evaluate own.py:fail --max-drop 0.1", "--evaluate own.py:fail: raised ZeroDivisionError: division by zero"),
        ("--evaluate own.py:none --max-drop 0.1", "own.py:none: "),
        ("--evaluate own.py:close --max-drop -1", "max_drop: expected a number of at least 0, got -1"),
        ("--evaluate own.py:close --max-drop 0.1 --keep 0.5", "max_drop: goes without keep"),
        ("--max-error 0.1 --target macs=0.5", "max_error: goes without target"),
        ("--max-error 0.1 --of weights", "unknown measure 'weights'"),
        ("--lower-is-better", "lower_is_better: goes with max_drop="),
        ("--blockwise --max-error 0.1", "--blockwise: does not go with --arg, --input, --max-error"),
    ],
)
def test_a_search_that_means_nothing_is_told(options: str, message: str, program: Program) -> None:
    Path("own.py").write_text(EVALUATION)
    result = program(f"{FOUND} {options}")
    assert result.exit_code == 2, result.stderr
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--distill-seconds 20", "--distill-seconds 20: goes with --restore distill, which is not there; add it"),
        ("--checkpoints kept", "--checkpoints kept: goes with --restore distill"),
        ("--restore distill --distill-seconds 0", "expected a time above 0, got 0.0; to distil nothing"),
    ],
)
@pytest.mark.parametrize("command", ["compress", "frontier"])
def test_budgets_without_meaning(program: Program, command: str, options: str, message: str) -> None:
    result = program(f"{command} nets.py:Net --input 2,4 {options}")
    assert result.exit_code != 0
    assert message in " ".join(result.stderr.replace("\u2502", " ").split())
