"""`--json` of every command is one document that docs/cli.schema.json describes, and nothing else is on the output."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from torch import nn

import intrafusion
from intrafusion.cli import demo
from intrafusion.cli.main import COMMANDS
from intrafusion.cli.show import print_json
from intrafusion.lab import zoo

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")

Program = Callable[[str], Result]
SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "cli.schema.json").read_text(encoding="utf-8"))
OWN = "nets.py:Net --input 2,4"
LINES = {
    "inspect": f"inspect {OWN}",
    "inspect, saved": "inspect saved",
    "compress": f"compress {OWN} --restore noise -o small",
    "compress, not saved": f"compress {OWN} --restore none",
    "frontier": f"frontier {OWN} --restore noise --size 0.8 --size 0.5 -o several",
    "frontier, not saved": f"frontier {OWN} --restore none --size 0.8 --of channels",
    "export": "export saved --base nets.py:Net -o saved.pt2",
    "fuse": f"fuse {OWN} --weights w.safetensors --weights w.safetensors -o fused",
    "split-train": "split-train --train-images 96 --epochs 1 --tune-epochs 1 --schedule fap",
    "experiment": f"experiment whole-model --model {OWN} --data d.safetensors --keep 0.5",
    "report": "report saved",
    "demo": "demo",
}


@pytest.fixture
def files(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    assert program(f"compress {OWN} -o saved").exit_code == 0
    net = nn.ModuleDict({"first": nn.Linear(4, 8), "second": nn.Linear(8, 6), "third": nn.Linear(6, 3)})
    save_file(net.state_dict(), "w.safetensors")
    labels = torch.arange(12) % 3
    images = {"test_images": torch.randn(12, 4), "train_images": torch.randn(12, 4)}
    save_file({**images, "test_labels": labels, "train_labels": labels.clone()}, "d.safetensors")
    monkeypatch.setattr(zoo, "train_digits", lambda **_: zoo.build("digits_resnet"))
    monkeypatch.setattr(demo, "run", partial(demo.run, keeps=(0.5,)))


@pytest.mark.parametrize("name", LINES)
def test_the_document_is_what_the_schema_says(name: str, program: Program, files: None) -> None:
    if name == "report":
        pytest.importorskip("plotly", reason="needs plotly: pip install 'intrafusion[report]'")
    result = program(f"{LINES[name]} --json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    jsonschema.Draft202012Validator(SCHEMA).validate(data)
    assert data["command"] == name.partition(",")[0]
    assert data["intrafusion"] == intrafusion.__version__


def test_every_command_is_in_the_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert {name.partition(",")[0] for name in LINES} == set(COMMANDS) == set(SCHEMA["properties"]["command"]["enum"])


@pytest.mark.parametrize("change", [{"command": "inspct"}, {"format": 2}, {"more": 1}, {"size": None}])
def test_the_schema_notices_what_is_wrong(change: dict[str, Any], program: Program) -> None:
    data = json.loads(program(f"inspect {OWN} --json").stdout)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate({**data, **change})


def test_numbers_that_json_does_not_have_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json("experiment", {"a": [float("nan"), (1.5, float("inf"))], "b": {"c": float("-inf")}})
    data = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert data["a"] == [None, [1.5, None]]
    assert data["b"] == {"c": None}
