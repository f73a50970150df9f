"""Naming a network on the command line: every form, its arguments, its example input and its errors."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from intrafusion.cli.models import ModelSpec, NetworkKind, parse_arguments, resolve
from intrafusion.cli.network import read_device, read_network, read_networks
from intrafusion.errors import FolderError, IntrafusionWarning, ModelError
from intrafusion.lab import zoo
from intrafusion.network.sources import import_torchvision

needs_torchvision = pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="needs torchvision")
needs_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
needs_timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm")

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn
from widths import WIDTH

@dataclass
class Settings:  # looks its own module up by name
    outputs: int = 2

class Net(nn.Linear):
    def __init__(self, outputs=2, *, bias=True):
        super().__init__(WIDTH, outputs, bias=bias)

    @classmethod
    def wide(cls):
        return cls(9)

def make(outputs=Settings().outputs):
    return Net(outputs)

def needs(width):
    return Net(width)

def fails():
    raise ValueError("no luck")

def returns_text():
    return "a network"

ready = Net(4)
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with nets.py, which imports its neighbour, as the current folder."""
    (tmp_path / "nets.py").write_text(SOURCE)
    (tmp_path / "widths.py").write_text("WIDTH = 5\n")
    (tmp_path / "broken.py").write_text("import a_package_nobody_has\n")
    (tmp_path / "bad_syntax.py").write_text("def make(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    loaded = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - loaded:
        del sys.modules[name]


def features(spec: ModelSpec) -> tuple[int, int]:
    model = spec.build()
    assert isinstance(model, nn.Linear)
    return model.in_features, model.out_features


@pytest.mark.parametrize("place", ["nets", "nets.py"])
@pytest.mark.parametrize(
    ("factory", "arguments", "expected"),
    [
        ("make", [], (5, 2)),
        ("make", ["outputs=7"], (5, 7)),
        ("Net", ["outputs=7"], (5, 7)),
        ("Net.wide", [], (5, 9)),
        ("ready", [], (5, 4)),
    ],
)
def test_a_factory_is_a_function_a_class_or_an_instance(
    folder: Path, place: str, factory: str, arguments: list[str], expected: tuple[int, int]
) -> None:
    spec = resolve(f"{place}:{factory}", arguments)
    assert spec.kind == (NetworkKind.FILE if place.endswith(".py") else NetworkKind.MODULE)
    assert features(spec) == expected
    assert spec.example_input() is None


def test_arguments_reach_the_factory_with_their_types(folder: Path) -> None:
    assert resolve("nets.py:Net", ["bias=false"]).build().bias is None
    assert resolve("nets.py:Net", ["bias=true"]).build().bias is not None


def test_a_file_is_found_from_any_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert features(resolve(f"{folder / 'nets.py'}:make")) == (5, 2)


def test_an_instance_is_copied_at_each_build(folder: Path) -> None:
    spec = resolve("nets:ready")
    first, second = spec.build(), spec.build()
    assert torch.equal(first.weight, second.weight)
    with torch.no_grad():
        first.weight.zero_()
    assert second.weight.abs().sum() > 0
    assert spec.build().weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "resnet18",
            [],
            "cannot tell which network 'resnet18' is, and there is no such folder; expected module:factory",
        ),
        ("digits_resnet", [], "cannot tell which network 'digits_resnet' is, .*; .* Did you mean 'zoo:digits_resnet'"),
        ("zo:resnet18", [], "there is no module 'zo'. Did you mean 'zoo:resnet18'"),
        ("net.py:make", [], r"there is no file /.*/net\.py; did you mean 'nets\.py'"),
        ("nest:make", [], r"there is no module 'nest'; install it.* Did you mean 'nets'"),
        ("nets.py:", [], "cannot tell which network 'nets.py:' is"),
        ("absent.py:make", [], r"absent\.py:make: there is no file /.*/absent\.py"),
        ("absent:make", [], r"there is no module 'absent'; install it, .*path\.py:factory"),
        ("absent.deeper:make", [], "there is no module 'absent'"),
        ("broken:make", [], "broken:make: importing 'broken' raised ModuleNotFoundError: .*a_package_nobody_has"),
        ("broken.py:make", [], r"running broken\.py raised ModuleNotFoundError"),
        ("bad_syntax.py:make", [], r"running bad_syntax\.py raised SyntaxError"),
        ("nets.py:mak", [], r"nets\.py:mak: unknown attribute 'mak'\. Did you mean 'make'\?"),
        ("nets.py:Net.wid", [], r"unknown attribute 'wid'\. Did you mean 'wide'"),
        ("nets:fails", [], "nets:fails: calling it raised ValueError: no luck"),
        ("nets:needs", [], "calling it raised TypeError: .*'width'; pass its arguments as --arg key=value"),
        ("nets:returns_text", [], r"expected it to return a torch\.nn\.Module, got a str"),
        ("nets:number", [], "expected a function, a class or a network, got a int"),
        ("nets:ready", ["outputs=3"], "nets:ready is a network already and takes no --arg; got outputs"),
    ],
)
def test_errors_say_where_and_what_to_do(folder: Path, name: str, arguments: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(name, arguments).build()


def test_arguments_are_read_as_yaml() -> None:
    texts = ["a=3", "b=1e-3", "c=0.5", "d=true", "e=null", "f=text", "g=[1, 2]", "h='3'", "i=x=y", "j="]
    expected = dict(a=3, b=1e-3, c=0.5, d=True, e=None, f="text", g=[1, 2], h="3", i="x=y", j=None)
    parsed = parse_arguments(texts)
    assert parsed == expected
    assert [type(value) for value in parsed.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["width"], "--arg 'width': expected key=value"),
        (["=3"], "--arg '=3': expected key=value, with a Python name as key"),
        (["a-b=3"], "--arg 'a-b=3': expected key=value, with a Python name as key"),
        (["a=1", "a=2"], "--arg 'a=2': 'a' is given twice"),
        (["a=[1"], r"--arg 'a=\[1': the value is not YAML"),
    ],
)
def test_malformed_arguments_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_arguments(arguments)


def test_a_network_of_the_zoo() -> None:
    spec = resolve("zoo:digits_resnet", ["pretrained=false", "seed=3"])
    expected = zoo.build("digits_resnet", seed=3).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in spec.build().state_dict().items())
    assert torch.equal(spec.example_input(), zoo.example_input("digits_resnet"))
    assert str(spec) == "zoo:digits_resnet"


def test_a_network_of_the_zoo_without_trained_weights() -> None:
    with pytest.raises(ModelError, match=r"^zoo:digits_resnet has no trained weights; give some with --weights, or"):
        resolve("zoo:digits_resnet").build()
    expected = zoo.build("digits_resnet").state_dict()
    built = resolve("zoo:digits_resnet", trained=False).build().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in built.items())


def test_the_zoo_gives_trained_weights_unless_told_otherwise(data_dir: Path) -> None:
    expected = zoo.build("mnist_mlp_a", pretrained=True).state_dict()
    built = resolve("zoo:mnist_mlp_a").build().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in built.items())


def test_errors_of_the_zoo_pass_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTRAFUSION_DATA", raising=False)
    with pytest.raises(FolderError, match=r"^models/mnist_mlp_a\.safetensors is needed"):
        resolve("zoo:mnist_mlp_a").build()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zoo:digits_resnt", "unknown zoo model 'digits_resnt'. Did you mean 'digits_resnet'"),
        pytest.param(
            "torchvision:resnet81",
            "unknown torchvision model 'resnet81'. Did you mean 'resnet",
            marks=needs_torchvision,
        ),
        pytest.param("timm:resnet18x", "unknown timm model 'resnet18x'. Did you mean 'resnet18'", marks=needs_timm),
    ],
)
@pytest.mark.parametrize("step", [ModelSpec.build, ModelSpec.example_input])
def test_unknown_names_are_answered_with_the_nearest(
    name: str, message: str, step: Callable[[ModelSpec], object]
) -> None:
    with pytest.raises(ModelError, match=message):
        step(resolve(name))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("nets:make", []),
        ("nets:make", ["outputs=7"]),
        ("nets:Net.wide", []),
        ("nets:ready", []),
        ("nets.py:make", []),
        ("nets.py:Net", ["outputs=7", "bias=false"]),
        ("zoo:digits_resnet", ["pretrained=false", "seed=3"]),
        pytest.param("torchvision:mobilenet_v3_small", ["num_classes=7"], marks=needs_torchvision),
        pytest.param("timm:test_resnet", ["num_classes=7"], marks=needs_timm),
    ],
)
def test_the_python_of_a_network_builds_it(folder: Path, name: str, arguments: list[str]) -> None:
    spec = resolve(name, arguments)
    imports, expression = spec.python()
    scope: dict[str, Any] = {}
    built = spec.build()  # first: it puts the current folder on sys.path, as `python -c` does
    exec(f"{imports}; original = {expression}", scope)
    original = scope["original"]
    again = original if isinstance(original, nn.Module) else original()
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}


@needs_torchvision
def test_a_network_of_torchvision() -> None:
    spec = resolve("torchvision:mobilenet_v3_small", ["num_classes=7"])
    example = spec.example_input()
    assert example.shape == (1, 3, 224, 224)
    assert torch.equal(example, spec.example_input())
    assert spec.build().eval()(example).shape == (1, 7)


@needs_torchvision
def test_torchvision_networks_that_do_not_classify_one_image_have_no_example() -> None:
    assert resolve("torchvision:r3d_18").example_input() is None
    assert resolve("torchvision:fasterrcnn_resnet50_fpn").example_input() is None


@needs_timm
def test_a_network_of_timm_has_an_example_of_its_own_resolution() -> None:
    assert resolve("timm:vit_tiny_patch16_384").example_input().shape == (1, 3, 384, 384)
    spec = resolve("timm:test_resnet", ["num_classes=7"])
    assert spec.build().eval()(spec.example_input()).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "absent", "command"),
    [
        ("torchvision:resnet18", "torchvision", r"pip install 'intrafusion\[torchvision\]'"),
        ("timm:resnet18", "timm", r"pip install 'intrafusion\[timm\]'"),
        ("timm:resnet18", "torchvision", r"pip install 'intrafusion\[timm\]'"),
    ],
)
def test_a_missing_extra_is_answered_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str, absent: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", math)  # any module at all
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ModelError, match=f"^{absent} is not installed; run: {command}$"):
        resolve(name).build()


@pytest.fixture
def torchvision_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Replaces torchvision by a package of this source and a submodule `part`, until the end of the test."""
    real = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torchvision"}
    for name in real:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "part.py").write_text("")
    yield (tmp_path / "torchvision" / "__init__.py").write_text
    for name in ("torchvision", "torchvision.part"):
        sys.modules.pop(name, None)


def test_torchvision_imports_where_its_operators_do_not_load(torchvision_source: Callable[[str], None]) -> None:
    torchvision_source(
        "import torch\n"
        "import torchvision.part\n"
        "@torch.library.register_fake('torchvision::an_operator_nobody_has')\n"
        "def meta(x): return x\n"
        "answer = meta(42)\n"
    )
    register = torch.library.register_fake
    with pytest.raises(RuntimeError, match="an_operator_nobody_has does not exist"):
        importlib.import_module("torchvision")
    torchvision = import_torchvision()
    assert torchvision.answer == 42
    assert torchvision.part is sys.modules["torchvision.part"]
    assert torch.library.register_fake is register


def test_operators_of_others_are_still_described(torchvision_source: Callable[[str], None]) -> None:
    torchvision_source(
        "import torch\n"
        "torch.library.register_fake('torchvision::an_operator_nobody_has')(id)\n"
        "torch.library.register_fake('others::an_operator_nobody_has')(id)\n"
    )
    register = torch.library.register_fake
    with pytest.raises(ModelError, match=r"others::an_operator_nobody_has does not exist.*built for another PyTorch"):
        import_torchvision()
    assert torch.library.register_fake is register


def test_a_torchvision_that_imports_is_left_alone(torchvision_source: Callable[[str], None]) -> None:
    torchvision_source("import torch\nseen = torch.library.register_fake\n")
    assert import_torchvision().seen is torch.library.register_fake


def test_other_failures_of_torchvision_say_the_remedy(torchvision_source: Callable[[str], None]) -> None:
    torchvision_source(
        "from pathlib import Path\n"
        "tried = Path(__file__).with_name('tried')\n"
        "if not tried.exists():\n"
        "    tried.touch()\n"
        "    raise RuntimeError('no such device')\n"
    )
    with pytest.raises(ModelError, match=r"no such device\); .*pip install --force-reinstall torch torchvision"):
        import_torchvision()


@pytest.fixture
def bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A small BERT, saved in the folder `bert`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    import_torchvision()
    transformers = importlib.import_module("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=10, **sizes)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained("bert")
    return model


@needs_transformers
def test_a_folder_of_transformers(bert: nn.Module) -> None:
    spec = resolve("hf:bert")
    example = spec.example_input()
    assert isinstance(example, dict)
    assert {name: tuple(t.shape) for name, t in example.items()} == {"input_ids": (1, 10), "attention_mask": (1, 10)}
    assert 0 <= int(example["input_ids"].min()) <= int(example["input_ids"].max()) < 20
    built = spec.build()
    torch.testing.assert_close(built(**example).logits, bert(**example).logits)
    assert not built.training
    scope: dict[str, Any] = {}
    imports, expression = spec.python()
    exec(f"{imports}; original = {expression}", scope)
    torch.testing.assert_close(scope["original"](**example).logits, bert(**example).logits)
    random = resolve("hf:bert", trained=False).build()
    assert not torch.allclose(random(**example).logits, bert(**example).logits)


@needs_transformers
@pytest.mark.parametrize("head", ["BertForMaskedLM", "AutoModelForMaskedLM"])
def test_another_head_of_a_folder(bert: nn.Module, head: str) -> None:
    with pytest.warns(IntrafusionWarning, match=r"has no weights of cls\.predictions.*: these are random"):
        built = resolve(f"hf:bert:{head}").build()
    assert type(built).__name__ == "BertForMaskedLM"


@needs_transformers
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:brt", r"hf:brt: expected a folder with a config\.json.* Did you mean 'hf:bert'"),
        ("hf:bert:BertForMaskedLN", "unknown architecture 'BertForMaskedLN'. Did you mean 'BertForMaskedLM'"),
        ("hf:bert:AutoModelForImageClassification", "BertConfig has no AutoModelForImageClassification; leave it out"),
    ],
)
def test_folders_and_heads_that_there_are_not(bert: nn.Module, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(name).build()


@needs_transformers
def test_pixels_of_a_folder(bert: nn.Module) -> None:
    transformers = importlib.import_module("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_channels=1, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained("vit")
    example = resolve("hf:vit").example_input()
    assert {name: tuple(t.shape) for name, t in example.items()} == {"pixel_values": (1, 1, 16, 16)}


@needs_timm
def test_an_example_of_timm_follows_the_arguments() -> None:
    assert resolve("timm:test_resnet", ["in_chans=1"]).example_input().shape[1] == 1


@pytest.mark.parametrize("text", ["cuda:99", "nowhere", "", "mps", "meta"])
def test_devices_that_there_are_not(text: str) -> None:
    with pytest.raises(ModelError, match=f"--device '{text}': expected a device of this machine"):
        read_device(text)


def test_a_network_and_its_inputs_go_to_the_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_device("auto") == read_device("cpu") == torch.device("cpu")
    there: list[object] = []
    monkeypatch.setattr("intrafusion.cli.network.read_device", lambda text: torch.device("meta"))
    network = read_network("nets.py:make", inputs=["1,5"], device="any")
    there += [next(network.model.parameters()).device, network.inputs.args[0].device]
    assert there == [torch.device("meta")] * 2


def test_files_of_weights_go_with_the_networks(folder: Path) -> None:
    for index in range(2):
        save_file({"weight": torch.full((2, 5), float(index)), "bias": torch.zeros(2)}, f"{index}.safetensors")
    files = [Path("0.safetensors"), Path("1.safetensors")]
    for names in (["nets.py:make"], ["nets.py:make", "nets.py:Net"]):
        found = read_networks(names, weights=files, inputs=["1,5"])
        assert [float(n.model.weight.detach()[0, 0]) for n in found] == [0.0, 1.0]
    with pytest.raises(ModelError, match="--weights: expected a file for each of 3 networks, .* got 2"):
        read_networks(["nets.py:make"] * 3, weights=files, inputs=["1,5"])
    with pytest.raises(ModelError, match="--weights: expected one file for one network, got 2"):
        read_network("nets.py:make", weights=files, inputs=["1,5"])
