"""A sweep: measure every setting once, here or on Ray, and lose nothing to a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from intrafusion.arguments import checked
from intrafusion.errors import ArgumentError, IntrafusionError
from intrafusion.lab.bench.claims import Claims, claims
from intrafusion.lab.bench.cluster import Cluster
from intrafusion.lab.bench.records import Record, append_record, environment, key_of, read_records
from intrafusion.progress import ShowProgress, report, show_progress, shows_progress

Setting = Mapping[str, Any]
"""What was varied, of values that JSON has: it identifies a measurement."""

SweepOutcome = Mapping[str, Any]
"""What was measured, of values that JSON has."""

RunSetting = Callable[[Setting], SweepOutcome]


@checked
@shows_progress("sweep")
def sweep(
    experiment: str,
    settings: Iterable[Setting],
    run: RunSetting,
    path: Path,
    *,
    cluster: Cluster | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: ShowProgress = None,
) -> list[Record]:
    """Measure the settings that the file has no record of, and return the records of all of them, in their order.

    Each result is appended to the file as soon as it is there, in one write: a kill at any point loses at most what was
    being measured, and the next call goes on from there. A setting that fails does not stop the others; it is not
    recorded, so the next call tries it again. Several sweeps on one file, also in other processes, share the work: each
    claims a setting before it measures it, and takes up what another one died on.

    Args:
        run: setting -> result; with a cluster it travels to the workers, so it must pickle.
        cluster: where to run; None for this process, one setting after another.
        provenance: more to note in the `environment` of each record, such as the command.
    Raises:
        IntrafusionError: settings failed; names the first ones, with their errors.
        FolderError: the file cannot be read or written.
        ArgumentError: a setting stands twice, or has values that JSON does not have.
    """
    wanted = _index_by_key(experiment, settings)
    failed: dict[str, Exception] = {}
    with claims(path) as own:
        own.look()
        todo = [key for key in wanted if key not in own.finished]
        report(experiment, 0, len(todo))
        while not all(key in own.finished or key in failed for key in todo):
            for key, error in _measure(experiment, run, _take(own, wanted, failed), path, cluster, provenance or {}):
                failed |= {} if error is None else {key: error}
                own.release(key, measured=error is None)
                report(experiment, sum(key in own.finished or key in failed for key in todo), len(todo))
            own.wait()  # for others, who measure the rest; what they give up, or die on, is ours
    if failed:
        message = _describe_failure([(wanted[key], error) for key, error in failed.items()], len(wanted), path)
        raise IntrafusionError(message) from next(iter(failed.values()))
    measured = {record.key: record for record in read_records(path)}
    return [measured[key] for key in wanted]


def _take(own: Claims, wanted: Mapping[str, Setting], failed: Mapping[str, Exception]) -> Iterator[Setting]:
    """Claim one setting after another, as they are asked for, until there is none left."""
    while (key := own.claim(key for key in wanted if key not in failed)) is not None:
        yield wanted[key]


def _measure(
    experiment: str,
    run: RunSetting,
    settings: Iterable[Setting],
    path: Path,
    cluster: Cluster | None,
    provenance: Mapping[str, Any],
) -> Iterator[tuple[str, Exception | None]]:
    """Key of every setting, once it is recorded, or the error that it ended with."""
    for setting, outcome, where in _outcomes(run, settings, cluster):
        yield key_of(experiment, setting), _record(path, experiment, setting, outcome, {**where, **provenance})


def _record(
    path: Path, experiment: str, setting: Setting, outcome: SweepOutcome | Exception, where: Mapping[str, Any]
) -> Exception | None:
    """Append a result; the error, if it is one or cannot be written down."""
    if isinstance(outcome, Exception):
        return outcome
    if not isinstance(outcome, Mapping):
        return ValueError(f"expected a result by name, got a {type(outcome).__name__}")
    try:
        append_record(path, Record(experiment, setting, outcome, where))
    except ValueError as error:
        return error
    return None


def _index_by_key(experiment: str, settings: Iterable[Setting]) -> dict[str, Setting]:
    wanted: dict[str, Setting] = {}
    for setting in settings:
        key = key_of(experiment, setting)
        if key in wanted:
            raise ArgumentError(f"{experiment}: the setting {dict(setting)} stands twice; leave one of them out.")
        wanted[key] = setting
    return wanted


def _outcomes(
    run: RunSetting, settings: Iterable[Setting], cluster: Cluster | None
) -> Iterator[tuple[Setting, SweepOutcome | Exception, Mapping[str, Any]]]:
    """(setting, result or error, environment it was measured in), in the order in which they are finished."""
    settings = iter(settings)
    if cluster is not None:
        for first in settings:  # a cluster is joined only if there is something to do
            yield from cluster.outcomes(run, chain([first], settings))
        return
    for setting in settings:
        yield setting, _attempt(run, setting), environment()


def _attempt(run: RunSetting, setting: Setting) -> SweepOutcome | Exception:
    try:
        with show_progress(False, ""):  # a setting is one step
            return run(setting)
    except Exception as error:
        return error


def _describe_failure(failed: Sequence[tuple[Setting, Exception]], total: int, path: Path, shown: int = 3) -> str:
    first = "; ".join(f"{dict(setting)}: {type(error).__name__}: {error}" for setting, error in failed[:shown])
    more = f"; and {len(failed) - shown} more" if len(failed) > shown else ""
    return f"{len(failed)} of {total} settings failed, the others are in {path}. {first}{more}"
