"""Networks that name themselves come back from the folder alone; a folder that means harm gets nowhere."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bare import compress
from torch import nn

import intrafusion
from intrafusion import Compressed, load
from intrafusion.errors import FolderError, IntrafusionError, IntrafusionWarning, ModelError
from intrafusion.io.checksums import digest_document, digest_file
from intrafusion.lab import zoo
from intrafusion.network.inputs import Inputs
from intrafusion.network.sources import find_timm, find_torchvision, import_transformers

needs_torchvision = pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="needs torchvision")
needs_timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm")
needs_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def saved_source(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "plan.json").read_text())["source"]


def check_alone(small: Compressed, folder: Path) -> nn.Module:
    """Saved, and loaded from the folder alone: the same weights to the bit, the same outputs."""
    small.save(folder)
    found = load(folder)
    own = small.model.state_dict()
    assert not found.training
    assert own.keys() == found.state_dict().keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in found.state_dict().items())
    for a, b in zip(small.inputs.call(found), small.inputs.call(small.model.eval()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    return found


def test_a_network_of_the_zoo(tmp_path: Path) -> None:
    small = compress(zoo.build("digits_resnet", seed=3), noise(2, 1, 8, 8), 0.5)
    state = torch.get_rng_state()
    check_alone(small, tmp_path / "net")
    assert torch.equal(torch.get_rng_state(), state)
    assert saved_source(tmp_path / "net") == {"kind": "zoo", "name": "digits_resnet", "args": {}}
    assert "zoo:digits_resnet" in (tmp_path / "net" / "README.md").read_text()


@needs_timm
def test_a_network_of_timm_with_its_arguments(tmp_path: Path) -> None:
    timm = find_timm("test_resnet")
    net = timm.create_model("test_resnet", num_classes=7, in_chans=1).eval()
    check_alone(compress(net, noise(2, 1, 32, 32), 0.5), tmp_path / "net")
    args = {"num_classes": 7, "in_chans": 1}
    assert saved_source(tmp_path / "net") == {"kind": "timm", "name": "test_resnet", "args": args}
    assert set(json.loads((tmp_path / "net" / "plan.json").read_text())["made_with"]) == {
        *("intrafusion", "torch", "timm", "python")
    }


@needs_timm
def test_a_network_that_was_changed_is_not_taken_for_the_one_of_its_name(tmp_path: Path) -> None:
    net = find_timm("test_resnet").create_model("test_resnet", num_classes=7).eval()
    changed = next(name for name, module in net.named_modules() if isinstance(module, nn.ReLU))
    net.set_submodule(changed, nn.GELU())
    small = compress(net, noise(2, 3, 32, 32), 0.5)
    small.save(tmp_path / "net")
    assert saved_source(tmp_path / "net") is None
    with pytest.raises(ModelError, match=r"Give the class timm.models.resnet.ResNet: intrafusion.load\('.*', ResNet\)"):
        load(tmp_path / "net")


@needs_torchvision
def test_a_network_of_torchvision_is_known_by_its_tensors(tmp_path: Path) -> None:
    models = find_torchvision("squeezenet1_1")
    net = models.squeezenet1_1(weights=None, num_classes=5).eval()
    check_alone(compress(net, noise(1, 3, 32, 32), 0.5), tmp_path / "net")
    args = {"num_classes": 5}
    assert saved_source(tmp_path / "net") == {"kind": "torchvision", "name": "squeezenet1_1", "args": args}


def tiny_bert() -> nn.Module:
    transformers = import_transformers()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    labels = {0: "tench, Tinca tinca", 1: "a/b"}
    config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=16, id2label=labels)
    config._name_or_path = "/home/somebody/secret"
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "bert"
    compress(tiny_bert(), {"input_ids": torch.arange(10).reshape(2, 5)}, 0.5).save(folder)
    return folder


@needs_transformers
def test_a_network_of_transformers(bert: Path, tmp_path: Path) -> None:
    small = compress(tiny_bert(), {"input_ids": torch.arange(10).reshape(2, 5)}, 0.5)
    found: Any = check_alone(small, tmp_path / "net")
    assert found.config.id2label == {0: "tench, Tinca tinca", 1: "a/b"}
    assert "secret" not in (bert / "plan.json").read_text()


# ---- folders that mean harm -----------------------------------------------------------------------------------------


def rewrite(folder: Path, target: Path, **entries: Any) -> Path:
    """The folder with other entries, signed as somebody would who means harm."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    data = json.loads((folder / "plan.json").read_text()) | entries
    data["sha256"] = {"model.safetensors": digest_file(target / "model.safetensors")}
    data["sha256"]["plan.json"] = digest_document(data)
    (target / "plan.json").write_text(json.dumps(data))
    return target


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "resnet"
    compress(zoo.build("digits_resnet"), noise(2, 1, 8, 8), 0.5).save(folder)
    return folder


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "pickle", "name": "x", "args": {}}, "its source is none that intrafusion knows"),
        ({"kind": "zoo", "name": "digits_resnet"}, "its source is none that intrafusion knows"),
        ({"kind": "zoo", "name": ["x"], "args": {}}, "its source has no name and arguments"),
        ({"kind": "zoo", "name": "digits_resnet", "args": {}, "code": "x"}, "its source has no name and arguments"),
        ({"kind": "zoo", "name": "digits_resne", "args": {}}, "Did you mean 'digits_resnet'"),
        ({"kind": "zoo", "name": "resnet50", "args": {}}, "far more|plan is for another network"),
        ({"kind": "zoo", "name": "digits_resnet", "args": {"pretrained": True}}, "refused argument 'pretrained'"),
        ({"kind": "timm", "name": "hf-hub:evil/net", "args": {}}, "expected the name of a network"),
        ({"kind": "timm", "name": "local-dir:/tmp", "args": {}}, "expected the name of a network"),
        ({"kind": "timm", "name": "resnet18", "args": {"checkpoint_path": "x"}}, "refused argument 'checkpoint_path'"),
        ({"kind": "timm", "name": "resnet18", "args": {"num_classes": 10**12}}, "refused argument 'num_classes'"),
        ({"kind": "torchvision", "name": "resnet18", "args": {"weights": "DEFAULT"}}, "refused argument 'weights'"),
        ("zoo:digits_resnet", "its source is none that intrafusion knows"),
    ],
    ids=str,
)
def test_sources_that_no_network_needs(mlp: Path, tmp_path: Path, source: Any, message: str) -> None:
    folder = rewrite(mlp, tmp_path / "net", source=source)
    with pytest.raises(IntrafusionError, match=message):
        load(folder)


@needs_transformers
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Trainer", {}, "no network 'Trainer'"),
        ("os.system", {}, "no network 'os.system'"),
        ("PreTrainedModel", {}, "no network 'PreTrainedModel'"),
        ("BertModel", {"auto_map": {"AutoModel": "evil--x.Y"}}, "refused 'auto_map'"),
        ("BertForSequenceClassification", {"attn_implementation": "evil"}, "refused 'attn_implementation'"),
        ("BertForSequenceClassification", {"quantization_config": {"x": 1}}, "refused 'quantization_config'"),
        ("BertForSequenceClassification", {"x": {"backbone": "evil"}}, "refused 'backbone'"),
        ("BertForSequenceClassification", {"hidden_act": "evil/repository"}, "refused 'hidden_act'"),
        ("BertForSequenceClassification", {"hidden_act": "evil"}, "cannot be built here"),
        ("BertForSequenceClassification", {"__class__": "x"}, "refused"),
        ("BertForSequenceClassification", {"num_hidden_layers": 10**9}, "refused 'num_hidden_layers'"),
        ("BertForSequenceClassification", {"num_hidden_layers": 9999}, "far more"),
        ("BertForSequenceClassification", {"vocab_size": 10**9}, "far more entries"),
        ("BertForSequenceClassification", {"hidden_size": 0}, "."),
    ],
    ids=str,
)
def test_configurations_that_fetch_run_or_allocate(
    bert: Path, tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    config = saved_source(bert)["args"]
    source = {"kind": "hf", "name": name, "args": config | change}
    folder, start = rewrite(bert, tmp_path / "net", source=source), time.monotonic()
    with pytest.raises(IntrafusionError, match=message):
        load(folder)
    assert time.monotonic() - start < 60


def test_an_original_that_is_far_larger_than_what_is_there(
    mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intrafusion.io.rebuild._FREE", 1000)
    monkeypatch.setattr("intrafusion.io.rebuild._MOST_TIMES", 1)
    with pytest.raises(FolderError, match="names an original of [0-9,]+ entries for [0-9,]+ that it holds"):
        load(mlp)


def test_a_source_does_not_help_against_a_changed_file(mlp: Path, tmp_path: Path) -> None:
    folder = rewrite(mlp, tmp_path / "net")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(FolderError, match="is not what was saved"):
        load(folder)


# ---- which network is given -----------------------------------------------------------------------------------------


def net(act: nn.Module, eps: float = 1e-5) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, eps=eps), act, nn.Linear(8, 2)).eval()


def test_other_weights_do_not_matter_other_layers_are_told(tmp_path: Path) -> None:
    small = compress(net(nn.ReLU()), noise(2, 4), 0.5)
    small.save(tmp_path / "net")
    x = noise(3, 4)
    assert torch.equal(load(tmp_path / "net", net(nn.ReLU()))(x), small.model(x))
    with pytest.warns(IntrafusionWarning, match=r"of other layers \(2: ReLU\(\) there, GELU\(.*\) here\)") as seen:
        load(tmp_path / "net", net(nn.GELU()))
    assert seen[0].filename == __file__
    with pytest.warns(IntrafusionWarning, match=r"1: LayerNorm\(\(8,\), eps=1e-05.* there, .*eps=0.1"):
        load(tmp_path / "net", net(nn.ReLU(), eps=0.1))


def test_the_hash_of_the_original_is_that_of_its_weights(tmp_path: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        original = net(nn.ReLU())
        small = compress(original, noise(2, 4), 0.5, inplace=True)
        small.save(tmp_path / "net")
        found.append(json.loads((tmp_path / "net" / "plan.json").read_text())["original"]["sha256"])
    assert found[0] == found[1] != found[2]


def test_folders_of_before_load_and_later_ones_are_refused(tmp_path: Path, mlp: Path) -> None:
    data = json.loads((mlp / "plan.json").read_text())
    old = rewrite(mlp, tmp_path / "old")
    for key in ("source", "original", "made_with", "date", "program"):
        data.pop(key, None)
    del data["sha256"]
    (old / "plan.json").write_text(json.dumps(data))
    (old / "README.md").unlink()
    x = noise(2, 1, 8, 8)
    assert torch.equal(load(old, zoo.build("digits_resnet"))(x), load(mlp)(x))
    with pytest.raises(ModelError, match=r"Give the class of its original: intrafusion.load\('.*', MyNet\)"):
        load(old)
    with pytest.raises(IntrafusionError, match="has format 3, this version reads up to 2; upgrade intrafusion"):
        load(rewrite(mlp, tmp_path / "new", format=3))


def test_steps_and_low_rank_layers_keep_the_source(tmp_path: Path) -> None:
    x = noise(2, 1, 8, 8)
    small = intrafusion.compress_in_steps(zoo.build("digits_resnet"), x, 0.5, 2, restore=None)
    check_alone(small, tmp_path / "steps")
    from intrafusion.factorize import factorize

    check_alone(factorize(zoo.build("digits_resnet"), x), tmp_path / "split")
    assert saved_source(tmp_path / "split") is not None
    Inputs.of(x).call(load(tmp_path / "split"))
