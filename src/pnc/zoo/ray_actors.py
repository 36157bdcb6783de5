"""Workers as actors of Ray, on this machine or on a cluster; requires the extra `ray`."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from pnc.foundation.errors import InputError
from pnc.zoo.model_zoo import Zoo
from pnc.zoo.question import Question
from pnc.zoo.units import Unit, WorkerLost

LOCAL = "local"
"""The address that starts Ray on this machine for one ranking."""
_SETTINGS = {
    "RAY_raylet_start_wait_time_s": "200",  # a busy machine takes longer than Ray's own limit
    "RAY_AUTH_MODE": "disabled",  # nobody else can reach a Ray of this machine
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""For a Ray that is started here, unless they are set."""


@contextmanager
def connected(address: str) -> Iterator[int]:
    """Connect to Ray within the block; gives the number of cores that it has.

    Args:
        address: Of a cluster, such as "auto" or "ray://host:10001"; `LOCAL` starts Ray on this machine, which takes
            about a minute.
    Raises:
        InputError: Ray is not installed, or there is none at this address.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError('ray_address: Ray is not installed; pip install "pnc[ray]", or leave it out') from error
    if ray.is_initialized():
        raise InputError("ray_address: this process is connected to Ray already; call ray.shutdown() first")
    before = {name: os.environ.get(name) for name in _SETTINGS}
    try:
        if address == LOCAL:
            os.environ.update({name: value for name, value in _SETTINGS.items() if before[name] is None})
        try:
            ray.init(
                address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if address != LOCAL else False,
            )
        except (ConnectionError, ValueError) as error:
            raise InputError(f"ray_address: {address!r} cannot be used ({str(error).splitlines()[0]})") from error
        resources: Mapping[str, float] = ray.cluster_resources()
        yield int(resources.get("CPU", 1))
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


class RayWorker:
    """An actor that looks at sources, with one core.

    Args:
        question: A reference to the tensors and the facts of the question, from `shared`.
        zoo: Where the sources are; every machine must have this folder at the same path.
    """

    def __init__(self, question: Any, zoo: Zoo) -> None:
        import ray

        actor = ray.remote(num_cpus=1, max_restarts=0)(RayLooker)
        self._actor: Any = actor.remote(question, str(zoo.folder.resolve()), zoo.allow_code)

    @property
    def pid(self) -> int:
        """Its process id, on its machine."""
        import ray

        return int(ray.get(self._actor.pid.remote()))

    def look(self, unit: Unit) -> dict[str, Any]:
        """Ask the actor for a look."""
        import ray

        try:
            found: dict[str, Any] = ray.get(self._actor.look.remote(unit))
        except ray.exceptions.RayActorError as error:
            raise WorkerLost(str(error).splitlines()[0]) from error
        return found

    def close(self) -> None:
        """Stop the actor."""
        import ray

        ray.kill(self._actor)


def shared(question: Question) -> Any:
    """Put a question into Ray's store, once for all actors of a machine."""
    import ray

    return ray.put(({name: tensor.numpy() for name, tensor in question.tensors().items()}, question.facts()))


class RayLooker:
    """The side of an actor."""

    def __init__(self, question: tuple[Mapping[str, Any], Mapping[str, Any]], folder: str, allow_code: bool) -> None:
        import torch

        from pnc.zoo.looker import Looker
        from pnc.zoo.question import question_from

        torch.set_num_threads(1)
        tensors: dict[str, Tensor] = {name: torch.tensor(array) for name, array in question[0].items()}
        self._looker = Looker(Zoo(folder, allow_code=allow_code), question_from(tensors, question[1]))

    def pid(self) -> int:
        """Its process id."""
        return os.getpid()

    def look(self, unit: Unit) -> dict[str, Any]:
        """As `Looker.look`."""
        return self._looker.look(unit)
