"""One reduction and its accuracy: what most experiments measure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from intrafusion import importance
from intrafusion.compressed import Compressed
from intrafusion.lab.bench.records import ORIGINAL
from intrafusion.lab.experiments.experiment import Options
from intrafusion.lab.experiments.method import parse_method, spell_ours
from intrafusion.lab.experiments.subject import Subject
from intrafusion.recipe import Recipe


def original_setting(subject: Subject) -> dict[str, Any]:
    """The setting in which nothing is reduced."""
    return {**subject.setting, "group": "none", "keep": 1.0, "method": ORIGINAL}


def reduction_settings(
    subject: Subject, options: Options, groups: Iterable[str], *, data_free: bool = False
) -> Iterator[dict[str, Any]]:
    """The original, then every group x keep x criterion x seed x method.

    Args:
        data_free: solve the layers of our default on noise, also where there are images.
    """
    yield original_setting(subject)
    images = subject.train is not None and not data_free
    methods = list(dict.fromkeys(spell_ours(method, images=images) for method in options.method))
    for group in groups:
        for keep in options.keep:
            for criterion in options.criterion:
                for seed in range(options.seeds):
                    for method in methods:
                        yield {
                            **subject.setting,
                            "group": group,
                            "keep": keep,
                            "criterion": criterion,
                            "order": options.order,
                            "seed": seed,
                            "method": method,
                        }


def recipe_of(subject: Subject, setting: dict[str, Any]) -> Recipe:
    method = parse_method(setting["method"])
    return Recipe.of(
        keep=setting["keep"],
        reducer=method.reducer,
        restore=method.restore,
        importance=_make_criterion(setting["criterion"], setting["seed"]),
        order=setting["order"],
        seed=setting["seed"],
        **subject.scope(setting["group"]),
    )


def _make_criterion(name: str, seed: int) -> Any:
    """The criterion of this name; one that draws random numbers draws those of this seed.

    One of weights sees norms folded into them, as in the experiments of Theus et al. 2024.
    """
    found: Any = importance.get_importance(name)
    if not is_dataclass(found) or isinstance(found, type):
        return found
    own, known = {"seed": seed, "folded": True}, {f.name for f in fields(found)}
    return replace(found, **{key: own[key] for key in own if key in known})


def reduce_subject(subject: Subject, setting: dict[str, Any]) -> tuple[Compressed, dict[str, Any]]:
    """The smaller network, and what can be said of it without images."""
    recipe = recipe_of(subject, setting)
    start = time.perf_counter()
    small = subject.reduced(recipe)
    seconds = time.perf_counter() - start
    return small, {
        "params": small.after.params,
        "macs": small.after.macs,
        "params_before": small.before.params,
        "macs_before": small.before.macs,
        "sizes": {d.group: [d.n, d.m] for d in small.plan.decisions if d.reduced},
        "left_alone": {d.group: d.reason for d in small.plan.decisions if d.reason not in (None, "not included")},
        "compress_s": round(seconds, 3),
        "recipe": recipe.to_yaml(),
    }


def measure_reduction(subject: Subject, setting: dict[str, Any]) -> dict[str, Any]:
    """Accuracy and size."""
    if setting["method"] == ORIGINAL:
        size = subject.size
        return {"accuracy": subject.accuracy(subject.model), "params": size.params, "macs": size.macs}
    small, found = reduce_subject(subject, setting)
    return {"accuracy": subject.accuracy(small.model), **found}
