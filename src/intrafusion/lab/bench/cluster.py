"""Ray: the settings of a sweep as tasks on the cores of this machine, or on a cluster. The only import of Ray."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any

from intrafusion.arguments import checked
from intrafusion.errors import IntrafusionError

_LOCAL = "local"


@checked
@dataclass(frozen=True)
class Cluster:
    """Where settings run as Ray tasks. A task whose worker dies is tried again on another one.

    Attributes:
        address: "local" for processes of this machine, started and stopped with the sweep; else of a running cluster,
            as `ray.init` takes it.
        cores: of this machine to use, None for all. Each task takes one.
        retries: how often a task is tried again after its worker died.
        by_value: modules to send along because the workers cannot import them.
    """

    address: str = _LOCAL
    cores: int | None = None
    retries: int = 3
    by_value: tuple[ModuleType, ...] = ()

    @checked
    def outcomes(
        self, run: Callable[[Any], Any], settings: Iterable[Any]
    ) -> Iterator[tuple[Any, Any, Mapping[str, Any]]]:
        """(setting, result or error, environment of the worker), in the order in which they are finished.

        Settings are asked for when there will soon be a core for them: two for each core are under way at most.

        Raises:
            IntrafusionError: Ray is not installed, or the cluster cannot be reached.
        """
        with connect(self) as ray:
            packed = _pack_with(ray.cloudpickle, run, self.by_value)
            shared = ray.put(packed)
            task = ray.remote(num_cpus=1, max_retries=self.retries)(_run_remotely)
            upcoming, most = iter(settings), 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
            waiting: dict[Any, Any] = {}
            while True:
                for setting in islice(upcoming, most - len(waiting)):
                    waiting[task.remote([shared], shared.hex(), setting)] = setting
                if not waiting:
                    return
                for finished in ray.wait(list(waiting), num_returns=1)[0]:
                    setting = waiting.pop(finished)
                    try:
                        outcome, where = ray.get(finished)
                    except ray.exceptions.RayError as error:
                        outcome, where = IntrafusionError(f"the worker was lost: {error}"), {}
                    yield setting, outcome, where


@contextlib.contextmanager
def connect(cluster: Cluster) -> Iterator[Any]:
    """Ray, started or joined here and left again at the end; one that the program has started already is used as is."""
    ray = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    local = {"num_cpus": cluster.cores, "include_dashboard": False} if cluster.address == _LOCAL else {}
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", **local)
    except Exception as error:  # Ray promises no narrower class
        raise IntrafusionError(
            f"Ray ({cluster.address}) cannot be started or reached: {error} Its logs are below /tmp/ray/session_latest."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tell nobody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # tasks without a GPU see what the program sees
    try:
        import ray
        import ray.cloudpickle
        import ray.exceptions
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise IntrafusionError("ray is not installed; run: pip install 'intrafusion[ray]'") from error
    return ray


def _pack_with(cloudpickle: Any, run: Callable[[Any], Any], by_value: Sequence[ModuleType]) -> bytes:
    for module in by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(run)
    finally:
        for module in by_value:
            cloudpickle.unregister_pickle_by_value(module)


# ---- on the workers -------------------------------------------------------------------------------------------------

_UNPACKED: dict[str, Callable[[Any], Any]] = {}  # the last function of this worker, by the name of its object


def _run_remotely(shared: Sequence[Any], name: str, setting: Any) -> tuple[Any, Mapping[str, Any]]:
    """Run one setting on one thread; an error of the run is a result, so that it is not mistaken for a lost worker."""
    import torch

    from intrafusion.lab.bench.records import environment

    torch.set_num_threads(1)
    try:
        outcome = _unpack(shared, name)(setting)
    except Exception as error:
        outcome = _make_sendable(error)
    return outcome, environment()


def _unpack(shared: Sequence[Any], name: str) -> Callable[[Any], Any]:
    if name not in _UNPACKED:
        packed = _import_ray().get(shared[0])
        _UNPACKED.clear()
        _UNPACKED[name] = pickle.loads(packed)
    return _UNPACKED[name]


def _make_sendable(error: Exception) -> Exception:
    """The error, or its text where it cannot travel."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return IntrafusionError(f"{type(error).__name__}: {error}")
    return error
