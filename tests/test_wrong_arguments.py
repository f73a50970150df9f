"""Whatever is handed to a public function by mistake: it is refused in words, or does something sensible."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion import Compressed, IntrafusionError, Recipe, Role
from intrafusion.factorize import spectra
from intrafusion.graph import Slice
from intrafusion.importance import Observation
from intrafusion.lab import zoo
from intrafusion.lab.bench import Record
from intrafusion.lab.experiments import EXPERIMENTS, Options, Subject
from intrafusion.measure.landscape import Plane, fold_tensors
from intrafusion.network.inputs import Inputs
from intrafusion.observe.observe import observe
from intrafusion.planning import fold_weights
from intrafusion.reduce import Moments, ReductionMap, ReductionProblem
from intrafusion.restore import Calibration, LeastSquares, calibrate
from intrafusion.selectors import outputs_of
from intrafusion.trace import rules
from intrafusion.train import Labels, Training


class Small(nn.Module):
    """Two convolutions with a norm between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.head = (
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 6, 3),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


def make() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small().eval()


X = torch.linspace(-1, 1, 36 * 6).sin().reshape(6, 1, 6, 6)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
DATA = zoo.Images(X, LABELS)
ROWS = torch.linspace(-1, 1, 40, dtype=torch.float64).sin().reshape(5, 8)
SCORES = torch.tensor([0.3, 0.1, 0.5, 0.2, 0.4], dtype=torch.float64)
MASS = torch.full((5,), 0.2, dtype=torch.float64)
MOMENTS = Moments(ROWS[None, :, 0], (ROWS @ ROWS.T)[None], ROWS @ ROWS.T)
PROBLEM = ReductionProblem(ROWS, SCORES, 3, 0, ROWS[:, :1], MOMENTS)
MAP = ReductionMap(torch.eye(5, dtype=torch.float64)[:3], torch.eye(5, dtype=torch.float64)[:, :3])

MODEL = make()
GRAPH = intrafusion.inspect(MODEL, X)
RECIPE = Recipe.of(keep=0.5, reducer="select", restore=None)
PLAN = intrafusion.decide(MODEL, GRAPH, RECIPE)
SMALL = intrafusion.apply(MODEL, PLAN, X, graph=GRAPH)
GROUP = GRAPH.reducible[0]
WEIGHTS = fold_weights(MODEL, GRAPH, GRAPH.reducible)
SEEN: Observation = observe(
    MODEL, GRAPH, [GROUP], X, ["tensors", "gradients", "activations", "feature_maps", "contributions"]
)[GROUP.name]
SPECTRA = spectra(MODEL)
MASKS = {"head.weight": torch.ones(3, 6, dtype=torch.bool)}
POINT = fold_tensors(MODEL, GRAPH)
SUBJECT = Subject("small", MODEL, Inputs.of(X), DATA, DATA)


def parts(thing: Any, **changes: Any) -> dict[str, Any]:
    """The arguments that make an object of a dataclass."""
    return {f.name: getattr(thing, f.name) for f in fields(thing) if f.init} | changes


def small() -> Compressed:
    return Compressed(**parts(SMALL, model=copy.deepcopy(SMALL.model)))


def small_model() -> nn.Module:
    return copy.deepcopy(SMALL.model)


def calibration() -> Calibration:
    return calibrate(MODEL, Inputs.of(X), "images", X)


FRONTIER = intrafusion.frontier(MODEL, X, X, (0.5,), of="channels", reducer="select", restore=None)
RESTORING = {"compressed": small, "reference": MODEL, "graph": GRAPH, "images": X}
SCORING = {"group": GROUP, "weights": WEIGHTS, "observations": SEEN}
CHECKING = {"model": MODEL, "example_inputs": X, "images": X, "seed": 0}

CALLS: dict[str, dict[str, Any]] = {
    # ---- intrafusion
    "Alignment": {"cost": "distance", "sides": "both", "rounds": 2, "normalization": "function"},
    "ChannelGraph": parts(GRAPH),
    "ChannelGroup": parts(GROUP),
    "ChannelGroup.with_role": {"self": GROUP, "roles": Role.PRODUCES},
    "Compressed": parts(SMALL),
    "Compressed.save": {"self": SMALL, "folder": "saved"},
    "Compressed.export": {"self": SMALL, "path": "net.pt2", "overwrite": True},
    "export": {"model": MODEL, "example_inputs": X, "path": "net.pt2", "overwrite": True},
    "Decision": parts(PLAN.decisions[0]),
    "Fused": parts(SMALL) | {"alignments": ({"a": MAP},), "weights": (1.0,)},
    "Eliminate": {"strength": 1e-3, "unmerge": True},
    "Eliminate.__call__": {"self": intrafusion.Eliminate(), "problem": PROBLEM},
    "Fold": {"features": "rows", "bias": False, "n_init": 1, "raw": True, "balanced": False},
    "Fold.__call__": {"self": intrafusion.Fold(), "problem": PROBLEM},
    "IntraFusion": {
        "normalization": "source", "p": 1.0, "source_marginal": "uniform", "target_marginal": "uniform",
        "target": "most_important", "bias": True, "cost": "lp", "solver": "exact", "epsilon": 0.01, "n_init": 1,
        "raw": False, "balanced": False,
    },
    "IntraFusion.__call__": {"self": intrafusion.IntraFusion(), "problem": PROBLEM},
    "Member": parts(GROUP.members[0], within=Slice(0, 0, 2)),
    "Pivot": {"strength": 1e-3, "unmerge": True},
    "Pivot.__call__": {"self": intrafusion.Pivot(), "problem": PROBLEM},
    "Plan": parts(PLAN),
    "Plan.rolled_back": {"self": PLAN, "reasons": {}},
    "Plan.proved": {"self": PLAN, "maps": PLAN.maps, "proofs": {}},
    "Plan.check_fits": {"self": PLAN, "shapes": PLAN.shapes, "graph": GRAPH},
    "Plan.from_json": {"text": PLAN.to_json(), "maps": PLAN.maps},
    "Recipe": parts(RECIPE),
    "Recipe.of": parts(RECIPE),
    "Recipe.from_yaml": {"text": RECIPE.to_yaml()},
    "Select.__call__": {"self": intrafusion.Select(), "problem": PROBLEM},
    "apply": {
        "model": make, "plan": PLAN, "example_inputs": X, "graph": GRAPH, "inplace": False, "progress": lambda *_: None,
    },
    "compress": {
        "model": make, "example_inputs": X, "keep": 0.5, "reducer": "select", "importance": "l1",
        "restore": "images", "images": X, "round_to": None, "min_channels": 1, "include": None, "exclude": None,
        "order": "joint", "seed": 0, "inplace": False, "progress": lambda *_: None, "target": None, "memory": "1GB",
    },
    "compress_folder": {
        "folder": "nowhere", "output": "new", "keep": 0.5, "inputs": X, "example_inputs": X, "architecture": "Llama",
        "tokenizer": None, "progress": lambda *_: None,
    },
    "compress_in_steps": {
        "model": MODEL, "example_inputs": X, "keep": 0.5, "steps": 2, "train": lambda model: None, "images": X,
        "reducer": "select", "restore": "images", "progress": lambda *_: None,
    },
    "decide": {
        "model": MODEL, "graph": GRAPH, "recipe": RECIPE, "example_inputs": X, "calibration": calibration, "images": X,
        "progress": lambda *_: None,
    },
    "frontier": {
        "model": MODEL, "example_inputs": X, "sizes": (0.5,), "evaluate": None, "of": "channels", "images": X,
        "reducer": "select", "restore": None, "progress": lambda *_: None,
    },
    "Frontier.carry_out": {"self": FRONTIER, "progress": lambda *_: None},
    "Frontier.draw": {"self": FRONTIER, "path": "picture.png"},
    "Frontier.find_smallest": {"self": FRONTIER, "passes": lambda point: True},
    "fuse": {
        "models": [MODEL, MODEL], "example_inputs": X, "using": "activations", "images": X, "weights": [0.5, 0.5],
        "anchor": 0, "keep": 0.5, "alignment": intrafusion.Alignment(rounds=1), "rescale": True, "restore": None,
        "seed": 0, "progress": lambda *_: None,
    },
    "inputs_of": {"match": "first"},
    "outputs_of": {"match": "first"},
    "inspect": {"model": MODEL, "example_inputs": X, "progress": lambda *_: None},
    "load": {"folder": "compressed", "model": Small},
    # ---- its rooms
    "budget.uniform_sizes": {"groups": GRAPH.reducible, "keep": 0.5, "graph": GRAPH, "round_to": 2, "min_channels": 1},
    "checks.check_importance": {"importance": "l1", **CHECKING},
    "checks.check_reducer": {"reducer": intrafusion.Select(), "seed": 0},
    "checks.check_restorer": {"restorer": LeastSquares(rows=20, steps=1), **CHECKING},
    "factorize.Energy": {"threshold": 0.9},
    "factorize.Energy.__call__": {"self": intrafusion.factorize.Energy(), "layers": SPECTRA},
    "factorize.Global": {"fraction": 0.9},
    "factorize.Global.__call__": {"self": intrafusion.factorize.Global(0.9), "layers": SPECTRA},
    "factorize.Share": {"fraction": 0.9},
    "factorize.Share.__call__": {"self": intrafusion.factorize.Share(), "layers": SPECTRA},
    "factorize.Smooth": {"nuclear": 1.0, "first": 1.0, "second": 1.0},
    "factorize.Smooth.__call__": {"self": intrafusion.factorize.Smooth(1.0), "model": MODEL},
    "factorize.Smooth.of": {"self": intrafusion.factorize.Smooth(1.0), "rows": ROWS},
    "factorize.Factorized": parts(SMALL) | {"ranks": {"head": (1, 3)}},
    "factorize.Spectrum": parts(SPECTRA[0]),
    "factorize.Spectrum.cost": {"self": SPECTRA[0], "rank": 1},
    "factorize.factorize": {
        "model": MODEL, "example_inputs": X, "ranks": {"second": 1}, "include": None, "exclude": None,
    },
    "factorize.spectra": {"model": MODEL, "include": None, "exclude": None},
    "factorize.spectrum": {"name": "head", "layer": MODEL.head},
    "importance.Activations": parts(SEEN.activations),
    "importance.Observation": parts(SEEN),
    "importance.CHIP": {"normalizer": "mean"},
    "importance.CHIP.__call__": {"self": intrafusion.importance.CHIP(), **SCORING},
    "importance.FPGM": {
        "p": 2.0, "reduction": "mean", "normalizer": "mean", "member_normalizer": None, "folded": True,
    },
    "importance.FPGM.__call__": {"self": intrafusion.importance.FPGM(), **SCORING},
    "importance.LAMP": {"p": 2.0, "reduction": "mean", "bias": False, "member_normalizer": None, "folded": True},
    "importance.LAMP.__call__": {"self": intrafusion.importance.LAMP(), **SCORING},
    "importance.BNScale": {"reduction": "mean", "normalizer": "mean", "member_normalizer": None},
    "importance.BNScale.__call__": {"self": intrafusion.importance.BNScale(), **SCORING},
    "importance.Magnitude": {
        "p": 1.0, "reduction": "mean", "normalizer": "mean", "bias": False, "member_normalizer": None, "folded": True,
    },
    "importance.Magnitude.__call__": {"self": intrafusion.importance.Magnitude(), **SCORING},
    "importance.Random": {"seed": 0},
    "importance.Random.__call__": {"self": intrafusion.importance.Random(), **SCORING},
    "importance.RelativeContribution": {"reduction": "sum", "normalizer": "mean", "member_normalizer": None},
    "importance.RelativeContribution.__call__": {"self": intrafusion.importance.RelativeContribution(), **SCORING},
    "importance.Taylor": {
        "multivariable": False, "reduction": "mean", "normalizer": "mean", "bias": False, "member_normalizer": None,
    },
    "importance.Taylor.__call__": {"self": intrafusion.importance.Taylor(), **SCORING},
    "importance.get_importance": {"importance": "l1"},
    "importance.needs_of": {"importance": intrafusion.importance.CHIP()},
    "reduce.Auto": {"candidates": ("pivot", "fold")},
    "reduce.Auto.__call__": {"self": intrafusion.reduce.Auto(), "problem": PROBLEM},
    "reduce.Moments": parts(MOMENTS),
    "reduce.ReductionMap": parts(MAP),
    "reduce.ReductionProblem": parts(PROBLEM),
    "reduce.Flap.__call__": {"self": intrafusion.reduce.Flap(), "problem": PROBLEM},
    "reduce.VarianceBased.__call__": {"self": intrafusion.reduce.VarianceBased(), "problem": PROBLEM},
    "reduce.cluster_map": {"labels": torch.tensor([0, 1, 0, 2])},
    "reduce.get_reducer": {"reducer": "fold"},
    "reduce.intrafusion_map": {
        "features": ROWS, "targets": ROWS[:3], "a": MASS, "b": MASS[:3] / 0.6, "own": None,
        "normalization": "source", "p": 1.0, "cost": "lp", "solver": "exact", "epsilon": 0.01,
    },
    "reduce.most_important": {"importance": SCORES, "m": 2},
    "reduce.selecting_form": {"reducer": intrafusion.Pivot()},
    "reduce.selection_map": {"kept": torch.tensor([0, 2]), "n": 4},
    "restore.ActivationRepair": {"batch": 4},
    "restore.ActivationRepair.__call__": {"self": intrafusion.restore.ActivationRepair(), **RESTORING},
    "restore.Calibration": parts(calibration(), _moments={}),
    "restore.Calibration.moments_of": {"self": calibration, "graph": GRAPH},
    "restore.ClosedForm": {"reach": 1.0, "floor": 1e-3},
    "restore.ClosedForm.__call__": {"self": intrafusion.restore.ClosedForm(), **RESTORING},
    "restore.Grail": {"strength": 1e-3, "batch": 4},
    "restore.Grail.__call__": {"self": intrafusion.restore.Grail(), **RESTORING},
    "restore.LeaveBeforeYouLeave": {"strength": 0.1, "shift": 1.0},
    "restore.LeaveBeforeYouLeave.__call__": {"self": intrafusion.restore.LeaveBeforeYouLeave(), **RESTORING},
    "restore.Distill": {
        "steps": 1, "seconds": 1.0, "batch": 2, "lr": 1e-3, "blocks": 1.0, "views": False, "folder": None, "seed": 0,
    },
    "restore.Distill.__call__": {
        "self": intrafusion.restore.Distill(steps=1, lr=1e-3, views=False), **RESTORING,
    },
    "restore.LeastSquares": {"strength": 1e-3, "scarcity": 0.2, "steps": 1, "rows": 20, "drift": True, "seed": 0},
    "restore.LeastSquares.__call__": {"self": LeastSquares(rows=20, steps=1), **RESTORING},
    "restore.Noise": {
        "strength": 1e-3, "scarcity": 2.0, "steps": 1, "rows": 20, "drift": True, "seed": 0, "images": 4, "slope": 1.5,
    },
    "restore.Noise.__call__": {"self": intrafusion.restore.Noise(images=4, rows=20, steps=1), **RESTORING},
    "restore.Noise.make": {"self": intrafusion.restore.Noise(images=4), "example_inputs": X, "model": MODEL},
    "restore.Reestimate": {"batch": 4},
    "restore.Reestimate.__call__": {"self": intrafusion.restore.Reestimate(), **RESTORING},
    "restore.Synthesis": {
        "images": 2, "mirrored": True, "steps": 1, "lr": 0.1, "statistics": 1.0, "smoothness": 0.1, "roll": 1,
        "seconds": None, "seed": 0,
    },
    "restore.Synthesis.__call__": {
        "self": intrafusion.restore.Synthesis(images=2, steps=1), "model": MODEL, "example_inputs": X,
        "progress": lambda *_: None,
    },
    "restore.add_shifts_": {"small": small_model, "reference": MODEL, "graph": GRAPH, "maps": PLAN.maps},
    "restore.calibrate": {
        "model": MODEL, "inputs": Inputs.of(X), "level": "noise", "images": X, "seed": 0, "progress": None,
        "synthesis": intrafusion.restore.Synthesis(images=2, steps=1), "noise": intrafusion.restore.Noise(images=4),
        "affordable": 20.0,
    },
    "restore.get_restorer": {"restorer": "closed_form"},
    "restore.load_images": {"path": "images.safetensors"},
    "restore.read_batches": {"images": X},
    "restore.save_images": {"images": X, "path": "new.safetensors", "synthesis": intrafusion.restore.Synthesis()},
    "trace.register_rule": {"operation": "mine::thing", "rule": lambda ledger, call: None, "replace": True},
    "trace.trace": {"model": MODEL, "example_inputs": X, "calls": None},
    "train.Block": {"reference": MODEL, "name": "second", "merge": None},
    "train.Block.__call__": {
        "self": intrafusion.train.Block(MODEL, "second"), "model": MODEL, "images": X, "labels": None,
    },
    "train.Distillation": {"teacher": MODEL, "temperature": 2.0},
    "train.Distillation.__call__": {
        "self": intrafusion.train.Distillation(MODEL), "model": MODEL, "images": X, "labels": None,
    },
    "train.Labels": {"smoothing": 0.0},
    "train.Labels.__call__": {"self": Labels(), "model": MODEL, "images": X, "labels": LABELS},
    "train.Training": parts(Training()),
    "train.Training.build_optimizer": {"self": Training(), "parameters": [nn.Parameter(X.clone())]},
    "train.Training.find_rate": {"self": Training(), "step": 0, "total": 10, "per_epoch": 5},
    "train.adapt": {
        "model": make, "trainable": "lora", "rank": 1, "alpha": 1.0, "masks": MASKS, "within": "", "seed": 0,
    },
    "train.apply_masks_": {"model": make, "masks": MASKS},
    "train.load_masks": {"path": "masks.safetensors"},
    "train.masks_of": {
        "model": MODEL, "sparsity": 0.5, "criterion": "wanda", "images": X, "rows": 10, "seed": 0,
    },
    "train.merges_of": {"graph": GRAPH, "plan": PLAN, "blocks": ["first"]},
    "train.reconstruct_": {
        "model": make, "reference": MODEL, "images": X, "blocks": ["second"], "how": Training(epochs=1), "merges": None,
    },
    "train.save_masks": {"masks": MASKS, "path": "new.safetensors"},
    "train.train_": {
        "model": make, "data": DATA, "how": Training(epochs=1), "objective": Labels(), "validation": DATA,
        "masks": MASKS, "penalty": lambda model: torch.zeros(()), "augment": lambda images, generator: images,
        "within": "", "folder": None, "on_epoch": lambda index, epoch: None,
    },
    "transport.cosine_cost": {"x": ROWS, "y": ROWS[:3]},
    "transport.direction_cost": {"x": ROWS, "y": ROWS[:3], "p": 1.0},
    "transport.entropic_coupling": {
        "cost": ROWS[:, :5].abs(), "a": MASS, "b": MASS, "epsilon": 0.1, "max_iterations": 100, "tolerance": 1e-3,
    },
    "transport.marginal": {"name": "radical", "importance": SCORES, "kept": torch.tensor([0, 2])},
    "transport.optimal_coupling": {"cost": ROWS[:, :5].abs(), "a": MASS, "b": MASS, "max_iterations": 1000},
    "transport.unit_rows": {"x": ROWS},
    "measure.accuracy.accuracy": {"model": MODEL, "images": X, "labels": LABELS, "batch_size": 4},
    "measure.accuracy.class_scores": {"output": ROWS, "count": 5},
    "measure.accuracy.as_parameters": {"model": MODEL, "batch": X},
    "measure.drift.output_rows": {"model": MODEL, "images": X, "batch_size": 4},
    "measure.drift.drift": {"model": MODEL, "reference": MODEL, "images": X},
    "measure.drift.histogram": {"values": SCORES, "edges": [0.0, 0.2]},
    "measure.drift.output_error": {"found": [ROWS], "expected": [ROWS]},
    "measure.landscape.fold_tensors": {"model": MODEL, "graph": GRAPH},
    "measure.landscape.match_places": {"maps": {"a": MAP}, "alike": {"a": MAP}},
    "measure.landscape.copy_with_tensors": {"model": MODEL, "weights": POINT},
    "measure.landscape.embed_network": {
        "model": MODEL, "small": SMALL.model, "graph": GRAPH, "example_inputs": X,
        "where": {name: np.arange(len(m.merge)) for name, m in PLAN.maps.items()},
    },
    "measure.landscape.Plane": {"origin": {"a": X}, "right": {"a": X}, "up": {"a": X}, "corners": ((0.0, 0.0),) * 3},
    "measure.landscape.Plane.through": {"origin": {"a": SCORES}, "first": {"a": MASS}, "second": {"a": SCORES**2}},
    "measure.landscape.Plane.at": {"self": Plane({"a": X}, {"a": X}, {"a": X}, ((0.0, 0.0),) * 3), "x": 0.5, "y": 0.5},
    "measure.landscape.Plane.axes": {
        "self": Plane({"a": X}, {"a": X}, {"a": X}, ((0.0, 0.0),) * 3), "points": 3, "margin": 0.25,
    },
    "measure.latency.latency_ms": {"model": MODEL, "example_inputs": X, "repeats": 1, "warmup": 0},
    "measure.latency.latencies_ms": {"models": [MODEL], "example_inputs": X, "repeats": 1, "warmup": 0},
    "measure.significance.kruskal_wallis": {"samples": [[1.0, 2.0], [3.0, 4.0]]},
    "measure.size.Size": {"params": 1, "macs": 1},
    "measure.size.size_of": {"model": MODEL, "example_inputs": X},
    "measure.size.params_of": {"model": MODEL},
    "measure.size.factors_of_products": {"model": MODEL, "example_inputs": X},
    "measure.size.macs_by_weight": {"model": MODEL, "example_inputs": X},
    "observe.observe.observe": {
        "model": MODEL, "graph": GRAPH, "groups": [GROUP], "images": X, "needs": ["activations"], "seed": 0,
    },
    "observe.observe.observe_for": {
        "importance": intrafusion.importance.Taylor(), "model": MODEL, "graph": GRAPH, "groups": [GROUP], "images": X,
        "seed": 0,
    },
    "io.folder.load_plan": {"folder": "plan"},
    "io.folder.save_plan": {"plan": PLAN, "folder": "new"},
    "io.weights.load_into": {"model": make, "state": MODEL.state_dict()},
    "io.weights.read_state": {"path": "images.safetensors"},
    "network.inputs.Inputs": {"args": (X,), "kwargs": None, "source": "it", "labels": None},
    "network.inputs.Inputs.of": {"example": X},
    "selectors.Selector": {"match": "first", "side": "outputs"},
    "selectors.Selector.layers": {"self": outputs_of("first"), "model": MODEL},
    # ---- the laboratory
    "lab.bench.Cluster": {"address": "local", "cores": 1, "retries": 1, "by_value": ()},
    "lab.bench.Record": {"experiment": "e", "setting": {}, "result": {}, "environment": {}},
    "lab.bench.append_record": {"path": Path("records.jsonl"), "record": Record("e", {}, {}, {})},
    "lab.bench.finished_keys": {"records": [Record("e", {}, {}, {})]},
    "lab.bench.read_records": {"path": Path("records.jsonl")},
    "lab.bench.sweep": {
        "experiment": "e", "settings": [{"a": 1}], "run": lambda setting: {}, "path": Path("sweep.jsonl"),
        "cluster": None, "provenance": {}, "progress": lambda *_: None,
    },
    "lab.experiments.Options": parts(Options()),
    "lab.experiments.Subject": parts(SUBJECT),
    "lab.experiments.get_experiment": {"name": "data-free"},
    "lab.experiments.run_experiment": {
        "name": "data-free", "experiment": EXPERIMENTS["data-free"], "subjects": [], "options": Options(),
        "path": Path("run.jsonl"), "cluster": None, "provenance": {}, "progress": lambda *_: None,
    },
    "lab.zoo.Images": {"images": X, "labels": LABELS},
    "lab.zoo.Images.batches": {"self": DATA, "size": 4},
    "lab.zoo.Normalisation": {"mean": (0.5,), "std": (0.5,), "white": 255.0},
    "lab.zoo.Normalisation.__call__": {"self": zoo.Normalisation((0.5,), (0.5,)), "pixels": np.zeros((2, 3, 3))},
    "lab.zoo.build": {"name": "mnist_mlp_a", "pretrained": False, "seed": 0},
    "lab.zoo.entry": {"name": "resnet18"},
    "lab.zoo.example_input": {"name": "resnet18", "batch": 1, "seed": 0},
    "lab.zoo.load_cifar": {
        "name": "cifar10", "path": Path("nowhere"), "split": "test", "normalisation": zoo.Normalisation((0.5,), (0.5,)),
        "start": 0, "limit": 1,
    },
    "lab.zoo.load_data": {"name": "digits", "split": "test", "limit": 2, "start": 0},
    "lab.zoo.names": {"trained": False},
    "lab.zoo.open_folder": {
        "root": Path("nowhere"), "normalisation": zoo.Normalisation((0.5,), (0.5,)), "resize": 8, "crop": 4,
    },
}  # fmt: skip
"""The arguments of one valid call of every door."""

FRESH = (make, small, small_model, calibration)
"""Called anew for each call of a door."""


class Empty:
    """An object of nobody."""


def broken() -> Iterator[Any]:
    raise OSError("a generator that fails")
    yield


def looped_dict() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["a"] = found
    return found


def nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


def looped_list() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "text": lambda: "x",
    "no text": lambda: "",
    "a NUL": lambda: "a\0b",
    "a long name": lambda: "a" * 10**5,
    "bytes": lambda: b"x",
    "0": lambda: 0,
    "-1": lambda: -1,
    "1": lambda: 1,
    "huge": lambda: 10**5000,
    "2**64": lambda: 2**64,
    "1e30": lambda: 1e30,
    "1e-300": lambda: 1e-300,
    "half": lambda: 0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "complex": lambda: 1j,
    "True": lambda: True,
    "list": list,
    "tuple": tuple,
    "dict": dict,
    "set": set,
    "list of None": lambda: [None],
    "list of text": lambda: ["x"],
    "dict of None": lambda: {"a": None},
    "dict by numbers": lambda: {1: 2},
    "dict by tuples": lambda: {(1, 2): 0.5},
    "dict in itself": looped_dict,
    "list in itself": looped_list,
    "deep list": lambda: nested(2000),
    "deep dict": lambda: {"keep": nested(2000)},
    "an object": Empty,
    "a class": lambda: Empty,
    "network": lambda: nn.Linear(2, 2),
    "class of networks": lambda: nn.Linear,
    "one number": lambda: torch.tensor(0.5),
    "vector": lambda: torch.zeros(3),
    "matrix": lambda: torch.ones(2, 2),
    "empty": lambda: torch.zeros(0),
    "empty batch": lambda: X[:0],
    "whole numbers": lambda: torch.tensor([7, -1, 100]),
    "booleans": lambda: torch.tensor([True, False]),
    "NaN": lambda: torch.full((6, 1, 6, 6), float("nan")),
    "infinities": lambda: torch.full((5, 8), float("inf"), dtype=torch.float64),
    "complex numbers": lambda: torch.ones(6, 1, 6, 6, dtype=torch.complex64),
    "half precision": lambda: X.half(),
    "sparse": lambda: torch.eye(5).to_sparse(),
    "meta": lambda: torch.zeros(6, 1, 6, 6, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.quint8),
    "array": lambda: np.zeros((2, 2)),
    "array of objects": lambda: np.array([None], object),
    "missing file": lambda: Path("missing"),
    "missing folder": lambda: Path("missing/deep/er"),
    "folder": lambda: Path("folder"),
    "file": lambda: Path("file.txt"),
    "below a file": lambda: Path("file.txt/x"),
    "exhausted": lambda: iter(()),
    "broken generator": broken,
    "function of nothing": lambda: lambda: None,
    "function of anything": lambda: lambda *a, **k: None,
    "graph": lambda: intrafusion.ChannelGraph(()),
    "recipe": lambda: Recipe.of(keep=0.5),
}  # fmt: skip
"""Made anew for each call."""

OF_NO_USE = ("an object", "a class")
"""Values that no argument takes, but for those of `TAKES`."""

TAKES = {
    "include": "a class",
    "exclude": "a class",
    "match": "a class",
    "evaluate": "a class",  # is called when a size is looked at
    "observations": "an object, a class",  # of criteria that look at weights alone
    "importance.needs_of": "an object, a class",  # whatever says nothing of itself needs nothing
    "observe.observe.observe_for": "an object, a class",
}
"""By the name of an argument, or by the door."""

CALLED = (
    "progress",
    "train",
    "evaluate",
    "passes",
    "ranks",
    "objective",
    "penalty",
    "augment",
    "on_epoch",
    "run",
    "rule",
    "importance",
)
"""Functions of the caller: what they raise passes through."""

SLOW = (
    "compress", "compress_in_steps", "frontier", "fuse", "apply", "load", "factorize.factorize",
    "checks.check_importance", "checks.check_restorer",
)  # fmt: skip
FEW = (
    "None", "text", "a NUL", "-1", "huge", "half", "nan", "True", "list", "list of None", "dict", "dict of None",
    "dict by tuples", "dict in itself", "deep list", "an object", "a class", "network", "one number", "NaN", "meta",
    "array of objects", "file", "broken generator", "function of nothing",
)  # fmt: skip
"""Doors that take a tenth of a second, and what they are given."""


def door_of(path: str) -> Callable[..., Any]:
    found: Any = intrafusion
    for name in path.split("."):
        found = (
            importlib.import_module(f"{found.__name__}.{name}") if not hasattr(found, name) else getattr(found, name)
        )
    return found


def call(path: str, arguments: dict[str, Any]) -> Any:
    arguments = {name: value() if any(value is f for f in FRESH) else value for name, value in arguments.items()}
    door = door_of(path)
    own = [arguments.pop("self")] if "self" in arguments else []
    several = [arguments.pop("roles")] if path == "ChannelGroup.with_role" else []
    found = door(*own, *several, **arguments)
    if hasattr(found, "__enter__"):
        with found:
            pass
    return list(found) if isinstance(found, Iterator) else found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the calls read."""
    path = tmp_path_factory.mktemp("wrong")
    (path / "folder").mkdir()
    (path / "file.txt").write_text("nothing of ours")
    SMALL.save(path / "compressed")
    door_of("io.folder.save_plan")(PLAN, path / "plan")
    door_of("restore.save_images")(X, path / "images.safetensors")
    door_of("train.save_masks")(MASKS, path / "masks.safetensors")
    door_of("lab.bench.append_record")(path / "records.jsonl", Record("e", {}, {}, {}))
    return path


@pytest.fixture(autouse=True)
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that are registered by mistake end with the test."""
    monkeypatch.setattr(rules, "_BY_OPERATION", dict(rules._BY_OPERATION))


WANTING = {
    "compress_folder": "expected a folder with a config.json, got none",
    "lab.zoo.load_cifar": "nowhere",
    "lab.zoo.open_folder": "nowhere",
    "lab.experiments.run_experiment": "two or more networks",
}
"""Calls that lack what would take long, and are refused for that reason alone."""

ARGUMENTS = [(path, name) for path, arguments in CALLS.items() for name in arguments if name != "self"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", CALLS)
def test_the_calls_are_valid(path: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(IntrafusionError, match=WANTING[path]) if path in WANTING else contextlib.nullcontext():
        call(path, CALLS[path])


ROOMS = (
    "", "budget", "checks", "factorize", "fusion", "importance", "reduce", "restore", "trace", "train", "transport",
    "measure.accuracy", "measure.drift", "measure.landscape", "measure.latency", "measure.significance", "measure.size",
    "observe.observe", "lab.bench", "lab.experiments", "lab.zoo",
)  # fmt: skip
"""Modules whose public names are for everybody; of `io`, `network` and `selectors` some are, see `CALLS`."""

UNASKED = {
    "ObservationError": "an error", "LawError": "an error",
    "Role": "an enumeration, which checks itself",
    "Importance": "a protocol", "RankRule": "a protocol", "Reducer": "a protocol", "Restorer": "a protocol",
    "Reduced": "a protocol", "Labelled": "a protocol", "Objective": "a protocol", "Rule": "a type",
    "ImportanceTraits": "is read off methods", "ReducerTraits": "is read off methods", "RestorerTraits": "likewise",
    "Call": "is handed to rules", "LabelledTensor": "is made by rules", "Ledger": "is handed to rules",
    "Weight": "is made by rules", "refuse": "is called by rules",
    "TorchPruning": "needs Torch-Pruning, see its own tests",
    "Entry": "a row of the zoo", "ImageFolder": "is made by open_folder", "Experiment": "a row of the experiments",
    "time_turns": "is called by latencies_ms, which checks",
    "download": "reaches for the network", "fetch_cifar": "reaches for the network", "train_digits": "trains",
    "environment": "takes nothing", "answer": "is called by measurements",
    "OutputError": "is added up by measurements",
    "Point": "is made by frontier", "Exported": "is made by export",
    "Epoch": "is made by trainings", "History": "is made by trainings",
}  # fmt: skip
"""Public names that are not called here, and why."""


@pytest.mark.parametrize("room", ROOMS)
def test_no_door_is_forgotten(room: str) -> None:
    module = importlib.import_module(f"intrafusion.{room}".rstrip("."))
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
        value = getattr(module, name)
        is_error = isinstance(value, type) and issubclass(value, Exception | Warning)
        if not callable(value) or is_error or name in UNASKED:
            continue
        paths = [path for path in CALLS if path.rpartition(".")[2] == name or f"{name}." in path]
        assert paths, f"intrafusion.{room}.{name}: give it a call in CALLS, or a reason in UNASKED"


def fault_of(path: str, name: str, what: str) -> str | None:
    """What is wrong with the answer to a wrong value."""
    try:
        call(path, {**CALLS[path], name: WRONG[what]()})
    except IntrafusionError as error:
        text = str(error)
        is_told = len(text) < 5000 and any(word in text for word in ("expected", "unknown", "cannot", ":", ";", "'"))
        return None if is_told else f"{what}: a message that does not say enough: {text:.300}"
    except Exception as error:
        is_theirs = "a generator that fails" in str(error) or (what in CALLABLE and name in CALLED)
        return None if is_theirs else f"{what}: {type(error).__name__}: {error}"
    taken = what in OF_NO_USE and what not in TAKES.get(name, "") + TAKES.get(path, "")
    return f"{what}: was taken" if taken else None


CALLABLE = ("network", "class of networks")
"""What can be called with as many arguments, and fails when it is."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("path", "name"), ARGUMENTS, ids=lambda value: value)
def test_a_wrong_argument_is_refused_in_words(
    path: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    values = [*(FEW if path in SLOW else WRONG)]
    if "INTRAFUSION_FUZZ" not in os.environ:  # another half of them for each argument
        values = values[crc32(f"{path} {name}".encode()) % 2 :: 2]
    faults = [fault_of(path, name, what) for what in values]
    assert not any(faults), "\n".join(filter(None, faults))
