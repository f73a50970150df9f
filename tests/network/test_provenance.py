"""Sources of networks: what they remember, and what they refuse; folders with such are in tests/io/test_rebuild.py."""

from __future__ import annotations

import copy

import pytest
import torch

from intrafusion.errors import ModelError
from intrafusion.lab import zoo
from intrafusion.network.provenance import Source, check_source, get_source, set_source_
from intrafusion.network.sources import SourceKind


def test_a_network_remembers_its_name_and_so_do_its_copies() -> None:
    net = zoo.build("digits_resnet", seed=3)
    assert get_source(net) == Source(SourceKind.ZOO, "digits_resnet", {}) == get_source(copy.deepcopy(net))
    assert get_source(torch.nn.Linear(2, 2)) is None
    set_source_(net, "timm", "resnet18", {"num_classes": 3, "pretrained": True, "checkpoint_path": "x"})
    assert get_source(net) == Source(SourceKind.TIMM, "resnet18", {"num_classes": 3})


def test_building_is_in_evaluation_mode_and_draws_no_random_number_of_the_program() -> None:
    state = torch.get_rng_state()
    net = Source(SourceKind.ZOO, "digits_resnet").build()
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.training


@pytest.mark.parametrize(
    ("kind", "name", "args"),
    [
        (SourceKind.TIMM, "../x", {}),
        (SourceKind.TIMM, "", {}),
        (SourceKind.TIMM, "x" * 201, {}),
        (SourceKind.TIMM, "resnet18", {"pretrained_cfg": {}}),
        (SourceKind.TIMM, "resnet18", {"global_pool": "a/b"}),
        (SourceKind.TIMM, "resnet18", {"img_size": [224] * 9}),
        (SourceKind.TIMM, "resnet18", {"img_size": [[224]]}),
        (SourceKind.TIMM, "resnet18", {"drop_rate": float("nan")}),
        (SourceKind.HF, "BertModel", {"a": {"b": [{"auto_map": {"x": "y"}}]}}),
        (SourceKind.HF, "BertModel", {"a": [object()]}),
        (SourceKind.HF, "BertModel", {"a": list(range(200_000))}),
        (SourceKind.HF, "BertModel", {"_name_or_path": "x"}),
        (SourceKind.HF, "BertModel", {"use_pretrained_backbone": True}),
        (SourceKind.HF, "BertModel", {"n_layers": 10**6}),
    ],
    ids=lambda value: str(value).partition(" object at")[0][:60],
)
def test_what_no_network_needs_is_refused(kind: SourceKind, name: str, args: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="refused|expected the name of a network"):
        check_source(Source(kind, name, args))


def test_what_networks_need_is_taken() -> None:
    check_source(Source(SourceKind.TIMM, "vit_tiny_patch16_224.augreg_in21k", {"img_size": [64, 64], "num_classes": 7}))
    labels = {"id2label": {"0": "a/b"}, "backbone": None, "layer_types": ["full"], "rope": {"factor": 8.0}}
    check_source(Source(SourceKind.HF, "BertModel", labels))
