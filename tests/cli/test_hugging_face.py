"""compress hf:FOLDER: a folder that from_pretrained opens, what is said before the work, and bad folders."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from click.testing import Result
from torch import nn

import intrafusion
from intrafusion.cli.hugging_face import find_folder
from intrafusion.network.sources import import_transformers

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")

Program = Callable[[str], Result]
IDS = torch.arange(3, 13)[None] % 40
CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel

open("ran.txt", "w").close()

class MineConfig(PreTrainedConfig):
    model_type = "mine"
    def __init__(self, wide=12, vocab_size=40, **kwargs):
        super().__init__(**kwargs)
        self.wide, self.vocab_size = wide, vocab_size

class MineModel(PreTrainedModel):
    config_class = MineConfig
    def __init__(self, config):
        super().__init__(config)
        self.words = torch.nn.Embedding(config.vocab_size, 8)
        self.up = torch.nn.Linear(8, config.wide)
        self.down = torch.nn.Linear(config.wide, 3)
        self.post_init()
    def forward(self, input_ids):
        return self.down(self.up(self.words(input_ids)).relu())
"""


def make_bert(**sizes: Any) -> nn.Module:
    transformers = import_transformers()
    torch.manual_seed(0)
    common = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertModel(transformers.BertConfig(**{"vocab_size": 40, **common, **sizes})).eval()


@pytest.fixture
def bert(user_folder: Path) -> Path:
    make_bert().save_pretrained("bert")
    (user_folder / "bert" / "vocab.txt").write_text("a\nb\n")
    return user_folder / "bert"


def change_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def change_weights(folder: Path, kind: torch.dtype, value: float = 1.0) -> None:
    """The first query layer in other numbers, of which one has this value."""
    path, name = folder / "model.safetensors", "encoder.layer.0.attention.self.query.weight"
    tensors = safetensors.torch.load_file(path)
    tensors[name][0, 0] = value
    safetensors.torch.save_file({**tensors, name: tensors[name].to(kind)}, path, metadata={"format": "pt"})


def cut_off(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])


def test_a_folder_becomes_a_smaller_folder(bert: Path, program: Program) -> None:
    result = program("compress hf:bert --keep 0.5 --uniform --restore none -o small")
    assert result.exit_code == 0, result.stderr
    assert "intrafusion.load will be needed" not in result.stderr
    *_, ours, theirs = result.stdout.splitlines()
    outputs = []
    for line in (ours, theirs.removeprefix("or: ")):
        scope: dict[str, Any] = {}
        exec(line, scope)
        outputs.append(scope["model"].eval()(IDS)[0])
    assert torch.equal(*outputs)
    assert scope["model"].config.intermediate_size == 12
    assert (bert.parent / "small" / "vocab.txt").read_text() == "a\nb\n"
    data = json.loads(program("compress hf:bert --keep 0.5 --uniform --restore none -o small --json").stdout)
    assert data["from_pretrained"] is True


def test_what_will_need_intrafusion_is_said_before_the_work(bert: Path, program: Program) -> None:
    result = program("compress hf:bert --keep 0.5 --restore none -o small")
    assert result.exit_code == 0
    said = result.stderr.splitlines()
    note = next(i for i, line in enumerate(said) if "intrafusion.load will be needed, not from_pretrained" in line)
    assert "no BertConfig gives these sizes: 16 -> 8" in said[note]
    assert "--uniform makes sizes" in said[note]
    assert note < next(i for i, line in enumerate(said) if "choosing channels" in line)
    assert not (bert.parent / "small" / "config.json").exists()
    assert "or: import transformers" not in result.stdout
    found = intrafusion.load("small")
    assert found.encoder.layer[0].attention.self.attention_head_size == 4


def test_the_work_is_not_lost_where_from_pretrained_opens_another_network(
    bert: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intrafusion.io.pretrained.output_difference", lambda a, b: 0.5)
    result = program("compress hf:bert --keep 0.5 --uniform --restore none -o small")
    assert result.exit_code == 0, result.stderr
    assert "note: intrafusion.load is needed: BertModel: from_pretrained opens" in result.stderr
    assert not (bert.parent / "small" / "config.json").exists()
    assert intrafusion.load("small").config.intermediate_size == 12


def test_the_original_s_folder_is_no_place_for_the_result(bert: Path, program: Program) -> None:
    before = {p.name: p.read_bytes() for p in bert.iterdir()}
    for place in ("bert", "bert/small"):
        result = program(f"compress hf:bert --keep 0.5 --uniform -o {place}")
        assert result.exit_code == 2
        assert "bert" in result.stderr
    assert {p.name: p.read_bytes() for p in bert.iterdir()} == before


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_is_solved_in_single_and_written_as_it_came(bert: Path, program: Program, kind: str) -> None:
    dtype = getattr(torch, kind)
    make_bert().to(dtype).save_pretrained("bert")
    result = program("compress hf:bert --keep 0.5 --uniform --restore noise -o small")
    assert result.exit_code == 0, result.stderr
    assert f"solved in float32 and written in {kind}, as it came" in result.stdout
    found = make_bert().from_pretrained("small", dtype="auto")
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert torch.equal(found.eval()(IDS)[0], intrafusion.load("small")(IDS)[0].to(dtype))


def test_every_size_of_a_frontier_is_a_folder_like_the_original(bert: Path, program: Program) -> None:
    make_bert().to(torch.bfloat16).save_pretrained("bert")
    Path("scores.py").write_text("def dtype(model):\n    return next(model.parameters()).element_size()")
    line = "frontier hf:bert --size 0.9 --size 0.5 --of channels --uniform --restore none --evaluate scores.py:dtype"
    result = program(f"{line} -o several --json")
    assert result.exit_code == 0, result.stderr
    points = json.loads(result.stdout)["points"]
    assert [point["score"] for point in points] == [4, 4]  # measured in the precision that it is solved in
    for point, width in zip(points, (21, 12), strict=True):
        found = make_bert().from_pretrained(point["output"], dtype="auto")
        assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
        assert found.config.intermediate_size == width
        assert (Path(point["output"]) / "vocab.txt").read_text() == "a\nb\n"
    before = {p.name: p.read_bytes() for p in bert.iterdir()}
    refused = program(f"{line} -o bert/several")
    assert refused.exit_code == 2
    assert "is or lies in the folder of the original" in " ".join(refused.stderr.split())
    assert {p.name: p.read_bytes() for p in bert.iterdir()} == before


def test_a_folder_of_sentence_transformers_in_parts(bert: Path, program: Program) -> None:
    folder = bert.parent / "sentences"
    folder.mkdir()
    bert.rename(folder / "0_Transformer")
    (folder / "modules.json").write_text(
        '[{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}]'
    )
    result = program("compress hf:sentences --keep 0.5 --uniform --restore none -o small")
    assert result.exit_code == 0, result.stderr
    scope: dict[str, Any] = {}
    exec(result.stdout.splitlines()[-1].removeprefix("or: "), scope)
    assert scope["model"].config.intermediate_size == 12
    assert (bert.parent / "small" / "modules.json").is_file()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "hf:bert: expected a folder with a config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "hf:bert: expected a folder with a config.json"),
        (lambda folder: change_config(folder, num_hidden_layers=3), "there are no weights of encoder.layer.2."),
        (lambda folder: change_config(folder, num_hidden_layers=1), "there are weights of encoder.layer.1."),
        (lambda folder: change_config(folder, intermediate_size=20), "there are weights of other shapes, which the"),
        (lambda folder: change_config(folder, model_type="mine"), "hf:bert: expected a folder with a config.json"),
        (lambda folder: change_config(folder, architectures=["Mine"]), "unknown architecture 'Mine'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "hf:bert: BertModel cannot be built"),
        (
            lambda folder: change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
            "hf:bert: its weights are quantised, which cannot be solved anew",
        ),
        (
            lambda folder: change_weights(folder, torch.int8),
            "query.weight are quantised; compress those",
        ),
        (lambda folder: change_weights(folder, torch.float8_e4m3fn), "query.weight are quantised; compress those"),
        (lambda folder: change_weights(folder, torch.float32, torch.nan), "expected finite weights, got NaN"),
        (lambda folder: cut_off(folder, -100), "hf:bert: BertModel cannot be built"),
        (lambda folder: cut_off(folder, 20), "hf:bert: BertModel cannot be built"),
        (lambda folder: change_config(folder, num_attention_heads=3), "hf:bert: BertModel cannot be built"),
        (lambda folder: change_config(folder, num_attention_heads=0), "hf:bert: BertModel cannot be built"),
        (lambda folder: change_config(folder, hidden_act="nope"), "hf:bert: BertModel cannot be built"),
        (lambda folder: change_config(folder, hidden_size="16"), "hf:bert: expected a folder with a config.json"),
    ],
)
def test_folders_that_are_damaged(bert: Path, program: Program, damage: Callable[[Path], Any], message: str) -> None:
    make_bert(num_hidden_layers=2).save_pretrained("bert")
    damage(bert)
    result = program("compress hf:bert --keep 0.5 --uniform --restore none -o small")
    assert result.exit_code == 2, result.stdout
    assert message in result.stderr
    assert not (bert.parent / "small").exists()


def test_a_missing_shard(bert: Path, program: Program) -> None:
    (bert / "model.safetensors").unlink()
    make_bert().save_pretrained("bert", max_shard_size="8KB")
    shards = sorted(bert.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert program("compress hf:bert --keep 0.5 --uniform --restore none -o whole").exit_code == 0
    shards[-1].unlink()
    result = program("compress hf:bert --keep 0.5 --uniform --restore none -o small")
    assert result.exit_code == 2
    assert "hf:bert: BertModel cannot be built" in result.stderr
    assert shards[-1].name in result.stderr


def test_code_of_a_folder_runs_only_if_the_user_says_so(
    user_folder: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(user_folder / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(user_folder / "modules"))
    folder = user_folder / "mine"
    folder.mkdir()
    (folder / "modeling_mine.py").write_text(CODE)
    code = {"AutoConfig": "modeling_mine.MineConfig", "AutoModel": "modeling_mine.MineModel"}
    config = {"model_type": "mine", "architectures": ["MineModel"], "auto_map": code, "wide": 12}
    (folder / "config.json").write_text(json.dumps(config))
    refused = program("compress hf:mine --keep 0.5 --uniform --restore none -o small --arg pretrained=false")
    assert refused.exit_code == 2
    assert not (user_folder / "ran.txt").exists()
    line = "compress hf:mine --keep 0.5 --uniform --restore none -o small --arg trust_remote_code=true"
    result = program(f"{line} --arg pretrained=false --input input_ids=1,10:int64")
    assert result.exit_code == 0, result.stderr
    assert (user_folder / "ran.txt").exists()
    transformers = import_transformers()
    found = transformers.AutoModel.from_pretrained("small", trust_remote_code=True)
    assert found.config.wide == 6
    assert tuple(found.up.weight.shape) == (6, 8)


def test_a_name_on_the_hub_without_a_network(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = program("compress hf:nobody/nothing --keep 0.5 -o small")
    assert result.exit_code == 2
    assert (
        "hf:nobody/nothing: expected a folder with a config.json, or the name of a model in the cache" in result.stderr
    )
    with pytest.raises(intrafusion.errors.ModelError, match="hf:nobody/nothing: cannot be fetched"):
        find_folder("nobody/nothing")


def test_parts_that_are_not_in_the_folder_are_told(bert: Path) -> None:
    from intrafusion.cli.models import resolve
    from intrafusion.errors import IntrafusionWarning

    with pytest.warns(IntrafusionWarning, match=r"hf:bert:BertForMaskedLM has no weights of cls\..*these are random"):
        resolve("hf:bert:BertForMaskedLM").build()


def test_targets_that_uniform_sizes_miss_say_so(bert: Path, program: Program) -> None:
    """Only the MLP can be said: a tenth of the parameters cannot be reached with it."""
    result = program("compress hf:bert --target params=0.1 --uniform --restore none -o small")
    assert result.exit_code == 0, result.stderr
    assert "with the groups and sizes that are allowed, nothing comes closer" in " ".join(result.stdout.split())
    assert "no number of the BertConfig sets these" in " ".join(result.stdout.split())
    assert make_bert().from_pretrained("small").config.intermediate_size == 1


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="needs accelerate")
def test_blockwise_writes_a_folder_that_opens(program: Program, user_folder: Path) -> None:
    transformers = import_transformers()
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes)).save_pretrained("llama")
    done = program("compress hf:llama --blockwise --keep 0.5 -o small")
    assert done.exit_code == 0, done.output
    assert "12 -> 6" in done.stdout
    opening = f"import transformers; model = transformers.LlamaForCausalLM.from_pretrained('{Path('small').resolve()}')"
    assert opening in done.stdout
    assert transformers.LlamaForCausalLM.from_pretrained("small").config.intermediate_size == 6


def assert_refused(program: Program, options: str, message: str) -> None:
    done = program(f"compress {options}")
    assert done.exit_code != 0
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("zoo:mlp --blockwise -o small", "expected a local folder as hf:FOLDER, got zoo:mlp"),
        ("hf:bert --blockwise", "expected a folder to write to"),
        ("hf:bert --blockwise -o small --json --program", "does not go with --program, --json"),
        ("hf:bert --blockwise -o small --ranks both", "--blockwise: does not go with --ranks"),
    ],
)
def test_blockwise_says_what_it_takes(program: Program, bert: Path, options: str, message: str) -> None:
    assert_refused(program, options, message)


# ---- merged heads ---------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(user_folder: Path) -> Path:
    """Eight query heads on four key/value heads."""
    transformers = import_transformers()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    return user_folder / "llama"


def test_merged_heads_are_a_folder_that_opens_and_a_recipe_to_follow(llama: Path, program: Program) -> None:
    result = program("compress hf:llama --merge-heads 2 --outputs logits -o small")
    assert result.exit_code == 0, result.stderr
    assert "4 -> 2 blocks" in result.stdout
    opened = import_transformers().LlamaForCausalLM.from_pretrained("small").eval()
    assert opened.config.num_key_value_heads == 2
    assert opened.model.layers[0].self_attn.k_proj.weight.shape == (8, 32)
    loaded = intrafusion.load("small")
    assert torch.equal(loaded(IDS).logits, opened(IDS).logits)
    assert yaml.safe_load((llama.parent / "small" / "recipe.yaml").read_text())["merge_heads"] == 2
    again = program("compress hf:llama --recipe small/recipe.yaml -o again")
    assert again.exit_code == 0, again.stderr
    same = import_transformers().LlamaForCausalLM.from_pretrained("again").eval()
    assert torch.equal(same(IDS).logits, opened(IDS).logits)


def test_a_folder_with_merged_heads_is_compressed_further(llama: Path, program: Program) -> None:
    assert program("compress hf:llama --merge-heads 2 --outputs logits -o merged").exit_code == 0
    result = program("compress hf:merged --keep 0.5 --uniform --restore none -o small")
    assert result.exit_code == 0, result.stderr
    config = import_transformers().LlamaForCausalLM.from_pretrained("small").config
    assert (config.num_key_value_heads, config.intermediate_size) == (2, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("hf:llama --merge-heads 2 --keep 0.5", "merge_heads: goes without keep; merge first"),
        ("hf:llama --merge-heads 2 --target params=0.5", "merge_heads: goes without target; merge first"),
        ("hf:llama --merge-heads 2 --reducer fold", "merge_heads: goes without reducer; merge first"),
        ("hf:llama --merge-heads 2 --blockwise -o small", "--blockwise: does not go with --merge-heads"),
        ("hf:llama --merge-heads 3 --outputs logits", "has 4; expected one of 4, 2, 1, got 3"),
        ("hf:llama --merge-heads 2", "could share. model.layers.0.self_attn.q_proj#0: output of the network (past_key"),
    ],
)
def test_merging_heads_says_what_it_takes(llama: Path, program: Program, options: str, message: str) -> None:
    assert_refused(program, options, message)


# ---- texts ----------------------------------------------------------------------------------------------------------

WORDS = ["the", "cat", "dog", "house", "river", "stone", "green", "walks", "sleeps", "over", "under", "bridge"]
SENTENCES = ["the cat sleeps", "green house over the river stone", "dog walks", "the dog sleeps under the bridge"]
LINES = SENTENCES * 15


def save_tokenizer(folder: Path, words: Iterable[str] = WORDS, *, padding: bool = True) -> Any:
    """Words by their number; the first two stand for padding, or the end, and what is unknown."""
    tokenizers, transformers = importlib.import_module("tokenizers"), import_transformers()
    first = "[PAD]" if padding else "[END]"
    numbers = {word: i for i, word in enumerate([first, "[UNK]", *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": first} if padding else {"eos_token": first}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **special)
    found.save_pretrained(folder)
    return found


def test_texts_are_read_from_a_file_with_the_tokenizer_in_the_folder(bert: Path, program: Program) -> None:
    (bert / "vocab.txt").unlink()
    tokenizer = save_tokenizer(bert)
    Path("texts.txt").write_text("\n".join(LINES) + "\n\n  \n", encoding="utf-8")
    data = json.loads(program("compress hf:bert --keep 0.5 --uniform --texts texts.txt -o small --json").stdout)
    assert data["restored"][0]["on"] == "48 sequences"
    assert data["comparison"]["held_out"]["on"] == "12 sequences"
    again = intrafusion.compress(
        make_bert(), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, 0.5, inputs=LINES, tokenizer=tokenizer,
        uniform=True,
    )  # fmt: skip
    given = tokenizer(LINES[:4], padding=True, return_tensors="pt")
    torch.testing.assert_close(intrafusion.load("small")(**given)[0], again.model(**given)[0])
    result = program("compress small --keep 0.9 --texts texts.txt")
    assert result.exit_code == 0, result.stderr
    assert "on 48 sequences" in result.stdout


def test_a_tokenizer_that_has_no_padding_pads_with_the_end_of_texts(bert: Path, program: Program) -> None:
    (bert / "vocab.txt").unlink()
    save_tokenizer(bert, padding=False)
    Path("texts.txt").write_text("\n".join(LINES), encoding="utf-8")
    result = program("compress hf:bert --keep 0.5 --uniform --texts texts.txt")
    assert result.exit_code == 0, result.stderr
    assert "restored: LeastSquares on 48 sequences" in result.stdout


@pytest.mark.filterwarnings("default::intrafusion.IntrafusionWarning")
def test_the_decoder_of_an_encoder_decoder_reads_the_texts_too(user_folder: Path, program: Program) -> None:
    transformers = import_transformers()
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(config).save_pretrained("t5")
    save_tokenizer(user_folder / "t5")
    Path("texts.txt").write_text("\n".join(LINES), encoding="utf-8")
    result = program("compress hf:t5 --keep 0.5 --uniform --texts texts.txt")
    assert result.exit_code == 0, result.stderr
    assert "LeastSquares on 48 sequences" in result.stdout
    assert "note: inputs: the decoder reads the texts too" in result.stdout
    assert "could not be told" not in result.stdout


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="needs accelerate")
def test_blockwise_reads_texts(bert: Path, program: Program) -> None:
    make_bert(num_hidden_layers=2).save_pretrained("bert")
    save_tokenizer(bert)
    Path("texts.txt").write_text("\n".join(LINES), encoding="utf-8")
    result = program("compress hf:bert --blockwise --keep 0.5 --texts texts.txt -o small")
    assert result.exit_code == 0, result.stderr
    assert "errors measured on 12 unseen sequences" in " ".join(result.output.split()), result.output
    assert make_bert().from_pretrained("small").config.intermediate_size == 12


def test_without_texts_sentences_are_made_of_the_words_of_the_tokenizer(bert: Path, program: Program) -> None:
    (bert / "vocab.txt").unlink()
    save_tokenizer(bert)
    assert "on 256 sentences of dictionary words" in program("compress hf:bert --keep 0.5 --uniform").stdout
    save_tokenizer(bert, [a + b + "x" for a in "abcdefg" for b in "abcdefg"])  # more words than the network has rows
    assert "sequences of random tokens" in program("compress hf:bert --keep 0.5 --uniform").stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--texts none.txt", "--texts none.txt: expected a file with a text in each line; there is no such file."),
        ("--texts empty.txt", "--texts empty.txt: expected a text in each line, got a file without any"),
        ("--texts bert/model.safetensors", "--texts bert/model.safetensors: expected a file with a text in each line"),
        ("--texts lines.txt --images a.npy", "--texts lines.txt: goes without --images a.npy"),
        ("--texts lines.txt --keep-images a.safetensors", "goes without --keep-images a.safetensors"),
        ("--texts lines.txt", "--texts: the tokenizer in bert cannot be read"),
    ],
)
def test_texts_that_cannot_be_read(bert: Path, program: Program, line: str, message: str) -> None:
    Path("empty.txt").write_text(" \n\n")
    Path("lines.txt").write_text("the cat\n")
    (bert / "tokenizer.json").write_text("{")
    result = program(f"compress hf:bert --keep 0.5 --uniform {line}")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_texts_without_a_tokenizer_in_the_folder(bert: Path, program: Program) -> None:
    (bert / "vocab.txt").unlink()
    Path("lines.txt").write_text("the cat\n")
    for name in ("hf:bert", "nets.py:Net --input 2,4"):
        result = program(f"compress {name} --keep 0.5 --texts lines.txt")
        assert result.exit_code == 2
        assert "--texts: expected a tokenizer beside the network, got none in" in result.stderr
