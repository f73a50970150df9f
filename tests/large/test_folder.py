"""compress_folder: what `compress` gives, from and to shards, whole or not at all."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

import intrafusion
from intrafusion.errors import FolderError, IntrafusionError, ModelError, RecipeError
from intrafusion.large import block as blocks
from intrafusion.large import folder as folders
from intrafusion.large.offload import make_skeleton
from intrafusion.network.sources import import_transformers

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("transformers", "accelerate")),
    reason="needs transformers and accelerate",
)

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
GATES = "model.layers.*.mlp.gate_proj"


def make_llama(**changes: Any) -> nn.Module:
    transformers = import_transformers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, **HEADS, "tie_word_embeddings": True, **changes})
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.dim() > 1 else 1
    return model


def draw_tokens(count: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(61, (count, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[: count // 2, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    make_llama().save_pretrained(tmp_path / "llama", max_shard_size="6KB")
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    return tmp_path / "llama"


def open_folder(folder: Path) -> Any:
    found, told = import_transformers().LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return found.eval()


def test_the_result_is_that_of_compress(llama: Path) -> None:
    assert len(list(llama.glob("*.safetensors"))) > 2
    out, data = llama.with_name("small"), draw_tokens()
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    done = intrafusion.compress_folder(llama, out, 0.5, inputs=data)
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before
    small = open_folder(out)
    assert small.config.intermediate_size == 12
    assert (out / "tokenizer.json").read_text() == "{}"
    assert len(list(out.glob("model-*-of-*.safetensors"))) == 3
    example = {name: tensor[:1] for name, tensor in data.items()} | {"use_cache": False}
    whole = intrafusion.compress(make_llama(), example, 0.5, uniform=True, include=GATES, inputs=data, restore="images")
    assert not whole.restored[0].undone
    assert all(report.error_after < report.error_before for report in done.blocks)  # type: ignore[operator]
    expected, found = whole.model.state_dict(), small.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert done.after == sum(p.numel() for p in whole.model.parameters())
    assert "errors measured on the 40 sequences that it was solved on" in str(done)


def test_errors_are_measured_on_sequences_kept_apart_where_there_are_enough(llama: Path) -> None:
    done = intrafusion.compress_folder(llama, llama.with_name("small"), 0.5, inputs=draw_tokens(50))
    assert "errors measured on 10 unseen sequences" in str(done)


def test_without_inputs_channels_are_selected_and_nothing_is_solved(llama: Path) -> None:
    out = llama.with_name("small")
    done = intrafusion.compress_folder(llama, out, 0.5)
    assert "no inputs were given: channels were selected by weights" in str(done)
    assert all(report.error_before is None for report in done.blocks)
    small, original = open_folder(out).state_dict(), make_llama().state_dict()
    assert torch.equal(
        small["model.layers.1.self_attn.o_proj.weight"], original["model.layers.1.self_attn.o_proj.weight"]
    )
    kept, rows = (s["model.layers.1.mlp.up_proj.weight"].tolist() for s in (small, original))
    assert all(row in rows for row in kept)


def test_half_precision_comes_back_as_it_came(tmp_path: Path) -> None:
    make_llama().to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    done = intrafusion.compress_folder(tmp_path / "llama", tmp_path / "small", 0.5, reducer="select", restore=None)
    assert [dict(report.sizes) for report in done.blocks] == [{"mlp.gate_proj": (24, 12)}] * 2
    for path in (tmp_path / "small").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    small, original = open_folder(tmp_path / "small").state_dict(), make_llama().to(torch.bfloat16).state_dict()
    kept, rows = (s["model.layers.1.mlp.up_proj.weight"].tolist() for s in (small, original))
    assert all(row in rows for row in kept), "selected rows are old ones, to the bit"


def test_an_interrupted_run_leaves_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, solve = llama.with_name("small"), blocks.solve_block_
    calls: list[object] = []

    def stop(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            assert any(llama.parent.rglob("model-00001-of-00003.safetensors")), "the first block was written"
            raise KeyboardInterrupt
        return solve(*args)

    monkeypatch.setattr("intrafusion.large.folder.solve_block_", stop)
    with pytest.raises(KeyboardInterrupt):
        intrafusion.compress_folder(llama, out, 0.5, inputs=draw_tokens(6))
    assert sorted(path.name for path in llama.parent.iterdir() if not path.name.startswith(".")) == ["llama"]
    assert not list(llama.parent.rglob("model-00001-of-00003.safetensors"))


def test_a_missing_shard_is_an_error_before_the_work(llama: Path) -> None:
    lost = sorted(llama.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FolderError, match=f"{lost.name} is not there"):
        intrafusion.compress_folder(llama, llama.with_name("small"), 0.5)
    assert not llama.with_name("small").exists()


def test_weights_that_are_no_numbers_are_an_error_wherever_they_lie(llama: Path) -> None:
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        path = next(p for p in llama.glob("*.safetensors") if name in safetensors.torch.load_file(p))
        whole = path.read_bytes()
        tensors = safetensors.torch.load_file(path)
        tensors[name][1, 2] = torch.nan
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ModelError, match="expected finite weights, got NaN or infinity"):
            intrafusion.compress_folder(llama, llama.with_name("small"), 0.5)
        assert not llama.with_name("small").exists()
        path.write_bytes(whole)


def test_a_configuration_of_another_network_is_an_error(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    for change, what in (
        ({"num_hidden_layers": 3}, "there are no weights of model.layers.2"),
        ({"num_hidden_layers": 1}, "there are weights without a place of model.layers.1"),
        ({"intermediate_size": 20}, "there are other shapes of model.layers..0.1..mlp.gate_proj"),
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantised"),
        ({"num_attention_heads": 0}, "its config.json cannot be read"),
        ({"num_attention_heads": 3}, "cannot be built from its config.json|its config.json cannot be read"),
        ({"hidden_size": "16"}, "its config.json cannot be read"),
        ({"hidden_act": "nope"}, "LlamaForCausalLM cannot be built from its config.json"),
    ):
        (llama / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(IntrafusionError, match=what):
            intrafusion.compress_folder(llama, llama.with_name("small"), 0.5)


def test_outputs_that_exist_or_lie_inside_are_refused(llama: Path) -> None:
    with pytest.raises(FolderError, match="is or lies in the folder of the original"):
        intrafusion.compress_folder(llama, llama / "small", 0.5)
    other = llama.with_name("other")
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(FolderError, match="holds files that intrafusion did not write"):
        intrafusion.compress_folder(llama, other, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {"params": 0.5}}, "target: not block by block: sizes for it are chosen over all layers"),
        ({"keep": 0.5, "order": "backward"}, "order: not block by block"),
        ({"keep": 0.5, "uniform": False}, "uniform: not block by block"),
        ({"keep": 0.5, "outputs": ["logits"]}, "outputs: not block by block"),
        ({"keep": 0.5, "importance": "taylor"}, "importance: not block by block"),
        ({"keep": 0.5, "restore": "synthetic"}, "restore: block by block expected 'auto'"),
    ],
)
def test_what_means_nothing_block_by_block_is_refused(llama: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        intrafusion.compress_folder(llama, llama.with_name("small"), **options)


def test_nothing_to_reduce_says_why(llama: Path) -> None:
    with pytest.raises(ModelError, match="no channel group to reduce in the blocks.*no number of the LlamaConfig"):
        intrafusion.compress_folder(llama, llama.with_name("small"), 0.5, exclude=GATES)


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    transformers = import_transformers()
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "vocab_size": 20}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    with pytest.raises(
        ModelError, match=r"expected one list of blocks of one class, got 2 \(encoder.block, decoder.block\)"
    ):
        intrafusion.compress_folder(tmp_path / "t5", tmp_path / "small", 0.5)


def test_a_keep_for_some_blocks_alone_says_why_nothing_becomes_smaller(llama: Path) -> None:
    message = r"mlp\.gate_proj: one number of the configuration sets them, to the largest size that keep asks for"
    with pytest.raises(ModelError, match=message):
        intrafusion.compress_folder(llama, llama.with_name("small"), {"model.layers.0*": 0.5, "*": 1.0})


SOME = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("GPTNeoXForCausalLM", {"vocab_size": 20}),  # another name for the head alone
        ("ViTModel", {"image_size": 8, "patch_size": 4}),  # for all layers
        ("MixtralForCausalLM", {"vocab_size": 20, "num_local_experts": 2, "num_key_value_heads": 2}),  # experts apart
    ],
)
def test_weights_that_lie_otherwise_in_the_files_are_refused(tmp_path: Path, kind: str, sizes: dict[str, int]) -> None:
    architecture: Any = getattr(import_transformers(), kind)
    architecture(architecture.config_class(**SOME, **sizes)).save_pretrained(tmp_path / "old")
    with pytest.raises(ModelError, match="its files hold weights otherwise than the network.*without --blockwise"):
        intrafusion.compress_folder(tmp_path / "old", tmp_path / "new", 0.5)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("named", [True, False])
def test_images_are_the_example_of_a_network_without_tokens(tmp_path: Path, named: bool) -> None:
    transformers = import_transformers()
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**SOME, image_size=8, patch_size=4)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "old")
    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"pixel_values": images, "labels": torch.zeros(40)} if named else images
    done = intrafusion.compress_folder(tmp_path / "old", tmp_path / "new", 0.5, inputs=given)
    assert done.measured_on == "40 images"
    assert transformers.CLIPVisionModel.from_pretrained(tmp_path / "new").config.intermediate_size == 12
    message = "no example is known for a network without tokens; give example_inputs or inputs"
    with pytest.raises(ModelError, match=message):
        intrafusion.compress_folder(tmp_path / "old", tmp_path / "other", 0.5)


def test_a_network_of_sentence_transformers_keeps_what_stands_behind_it(tmp_path: Path) -> None:
    transformers, old, new = import_transformers(), tmp_path / "old", tmp_path / "new"
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=20, **SOME)).save_pretrained(old)
    (old / "1_Pooling").mkdir()
    (old / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 16}')
    (old / "README.md").write_text("the old network")
    entries = [("Transformer", ""), ("Pooling", "1_Pooling")]
    (old / "modules.json").write_text(json.dumps([{"type": f"a.{kind}", "path": path} for kind, path in entries]))
    intrafusion.compress_folder(old, new, 0.5)
    assert transformers.BertModel.from_pretrained(new).config.intermediate_size == 12
    for name in ("modules.json", "1_Pooling/config.json"):
        assert (new / name).read_bytes() == (old / name).read_bytes()
    assert not (new / "README.md").exists()
    (old / "modules.json").write_text('[{"type": "a.Transformer", "path": "0_Transformer"}]')
    message = f"name the folder of the network in it, {old / '0_Transformer'}."
    with pytest.raises(FolderError, match=re.escape(message)):
        intrafusion.compress_folder(old, tmp_path / "other", 0.5)


def test_two_threads_at_once_leave_modules_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function in nn.Module makes parameters empty: the second thread out must not put back that of the first."""
    monkeypatch.setattr(nn.Module, "register_parameter", before := nn.Module.register_parameter)
    both = threading.Barrier(2)

    class Meeting(nn.Linear):
        def __init__(self, size: int) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)
            super().__init__(size, size)

        def tie_weights(self) -> None: ...

    threads = [threading.Thread(target=make_skeleton, args=(Meeting, 3)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nn.Module.register_parameter is before


def test_what_was_imported_for_the_network_is_passed_over_by_collections(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = list[bool]()

    def note(*args: Any) -> None:
        frozen.append(gc.get_freeze_count() > 0)
        raise KeyboardInterrupt

    for name in ("make_skeleton", "_make_calls"):  # the first thing before, and behind the start
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(folders, name, note)
            gc.unfreeze()
            try:
                intrafusion.compress_folder(llama, llama.with_name("small"), 0.5)
            finally:
                gc.freeze()
    assert frozen == [False, True]
