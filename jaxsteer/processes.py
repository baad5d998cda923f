"""Several processes that run one program: hosts of a TPU pod, tasks of a Slurm job, pods of a Kubernetes job.

All processes run the same command on the same inputs and take the same branches, because a compiled program whose
arrays are spread over all devices starts only when every process has started it. The first process alone writes files
and prints. What only one process can know (is there a finished run in this directory?) is asked of the first and told
to the others (``from_first``); values that lie on devices of several processes come to all of them by ``to_host``.

One process is the special case in which nothing here does anything.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsteer.errors import UserError, first_line

log = logging.getLogger(__name__)

PREEMPTED = 143
"""Exit status of processes that were told to end and can go on later, as a shell has it for SIGTERM."""
HEARTBEAT_S = 60
"""A process that was not heard of for so long is taken for dead, and all others end."""
_JOIN_S = 300
_GRACE_S = 5
_barriers, _looks = itertools.count(), itertools.count()


class Coordinates(NamedTuple):
    """Which of several processes this is, and how they meet. What is None, JAX is to find in the environment."""

    coordinator: str | None = None
    """HOST:PORT at which process 0 can be reached by all."""
    processes: int | None = None
    """How many."""
    process: int | None = None
    """The number of this one, from 0."""


def coordinates_of(flags: Coordinates, environment: Mapping[str, str] = os.environ) -> Coordinates | None:
    """The coordinates that flags, then ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` give.

    Without any of them: ``Coordinates()``, which JAX fills in, on a TPU VM, in a step of several Slurm tasks and in an
    indexed job of Kubernetes; and None elsewhere, which is one process. So is a number of 1. Raises ``UserError`` when
    only some of the three are given, or numbers that do not fit together.
    """
    number, process = (
        _integer(name, environment[name]) if given is None and name in environment else given
        for name, given in (("JAX_NUM_PROCESSES", flags.processes), ("JAX_PROCESS_ID", flags.process))
    )
    coordinates = Coordinates(flags.coordinator or environment.get("JAX_COORDINATOR_ADDRESS"), number, process)
    if number == 1 and process in (None, 0):
        return None
    if coordinates == Coordinates():
        return coordinates if _in_cluster(environment) else None
    if None in coordinates:
        raise UserError(
            "--coordinator HOST:PORT, --num-processes N and --process-id I (or JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID) belong together: give all three to every process, or none on a TPU "
            "pod, under Slurm and in an indexed job of Kubernetes, where they are found"
        )
    if not 0 <= process < number:  # type: ignore[operator]
        raise UserError(f"--process-id must be 0 to {number - 1} of --num-processes {number}, got {process}")  # type: ignore[operator]
    host, _, port = str(coordinates.coordinator).rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator expects HOST:PORT of process 0, got {coordinates.coordinator!r}")
    return coordinates


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} must be an integer, got {text!r}") from None


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this process was started as one of several by something whose variables JAX understands."""
    # JAX itself takes any shell inside a Slurm allocation for one of several processes.
    slurm = int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment
    kubernetes = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    tpu = "tpu" in (getattr(jax.config, "jax_platforms", None) or "")  # JAX sets it where it finds chips of a TPU VM
    return slurm or kubernetes or tpu


def join(coordinates: Coordinates | None, *, heartbeat_s: int = HEARTBEAT_S) -> None:
    """Find the other processes (``jax.distributed``). To be called before anything asks JAX for a device.

    Raises ``UserError`` when they cannot be found within five minutes.
    """
    if coordinates is None:
        return
    try:
        jax.distributed.initialize(
            *coordinates,
            initialization_timeout=_JOIN_S,
            heartbeat_timeout_seconds=heartbeat_s,
            shutdown_timeout_seconds=_JOIN_S,
        )
    except (RuntimeError, ValueError) as error:
        # On a TPU VM of which no cluster is known:
        if coordinates == Coordinates() and "should be defined" in str(error):
            log.warning("no other processes were found (%s): this one runs alone", error)
            return
        reason = first_line(error)
        host, count, number = coordinates
        where = f"process {number} of {count} at {host}" if host else "here"
        raise UserError(
            f"the processes could not find each other ({where}: {reason}). Start the same command on all hosts, let "
            "them reach process 0 at --coordinator HOST:PORT, or use --num-processes 1 to run alone"
        ) from error


def leave(status: int) -> None:
    """Leave for an error: returns if all processes leave, and else ends this one, as if it had died.

    JAX would have it wait minutes for the others, which wait for it.
    """
    try:
        wait_for_all("failed", seconds=_GRACE_S)
    except Exception:  # those that did not come
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def preempted() -> bool:
    """Whether all processes are to save what they have and end, because one of them was sent SIGTERM.

    While several processes are joined, the signal by itself ends none of them: preempted hosts get it some time before
    they are lost. All must call this equally often; it says True to all in the same call.
    """
    if not several():
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_looks))


def several() -> bool:
    """Whether this program runs in more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def to_host(tree: Any) -> Any:
    """NumPy arrays of the values of a tree, in every process, wherever in the cluster they lie. All must call it."""
    leaves, shape = jax.tree.flatten(tree)
    far = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not _is_near(leaf)]
    if far:
        gathered = _replicate(leaves[far[0]].sharding.mesh)([leaves[i] for i in far])
        leaves = [dict(zip(far, gathered, strict=True)).get(i, leaf) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(shape, [np.asarray(leaf) for leaf in leaves])


def _is_near(array: jax.Array) -> bool:
    return array.is_fully_addressable or array.is_fully_replicated


@functools.lru_cache(maxsize=8)
def _replicate(mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(lambda leaves: leaves, out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))


def from_first(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in the first process, which alone runs it, in all of them; must be JSON.

    The others wait, however long it takes. A ``UserError`` is raised in all. All must call it.
    """
    if not several():
        return work()
    from jax.experimental import multihost_utils

    told: dict[str, Any] = {}
    if is_first():
        try:
            told = {"value": work()}
        except UserError as error:
            told = {"error": str(error)}
    # Not in a collective of the devices, which may have limits of their own.
    wait_for_all()
    data = np.frombuffer(json.dumps(told).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    room = 1 << max(10, size.bit_length())  # few sizes: each is compiled
    padded = np.zeros(room, np.uint8)
    if is_first():
        padded[:size] = data
    told = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size]))
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]


def as_first(value: Any) -> Any:
    """The value that the first process has, in all of them: where a measurement of each decides what all do next."""
    return from_first(lambda: value)


def wait_for_all(what: str | None = None, *, seconds: int = 7 * 24 * 3600) -> None:
    """Go on when every process is here. Raises what JAX raises when that takes longer than ``seconds``."""
    if several():
        from orbax.checkpoint import multihost

        key = f"jaxsteer-{next(_barriers) if what is None else what}"
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=1000 * seconds)
