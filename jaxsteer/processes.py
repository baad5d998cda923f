"""Several processes that run one program: hosts of a TPU pod, tasks of a Slurm job, pods of a Kubernetes job.

All processes run the same command on the same inputs and take the same branches, because a compiled program whose
arrays are spread over all devices starts only when every process has started it. The first process alone writes files
and prints. What only one process can know (is there a finished run in this directory?) is asked of the first and told
to the others (``from_first``); values that lie on devices of several processes come to all of them by ``to_host``.

One process is the special case in which nothing here does anything.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsteer.errors import UserError, first_line

log = logging.getLogger(__name__)

PREEMPTED = 143
"""Exit status of processes that were told to end and can go on later, as a shell has it for SIGTERM."""
HEARTBEAT_S = 25
"""A process that was not heard of for so long is taken for dead, and all others end."""
JOIN_S = 300
"""Processes that have not found each other after so long end."""
LOST = 70
"""Exit status of processes that end because another one has."""
_GRACE_S = 5
_HELLO_S = 10
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
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port[:9]) < 1 << 16):
        raise UserError(
            f"--coordinator expects HOST:PORT of process 0, the port from 1 to 65535, got {coordinates.coordinator!r}"
        )
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


def join(coordinates: Coordinates | None, arguments: Sequence[str] = (), *, seconds: float = JOIN_S) -> None:
    """Find the other processes (``jax.distributed``). To be called before anything asks JAX for a device.

    ``arguments`` are those of the command, which must be the same in all processes, with equal contents of the files
    that they name. From here on a process that ends without the others ends them too: where process 0 has an address,
    at once and with one line, otherwise when JAX misses its heartbeat. Raises ``UserError`` in all processes when they
    differ, and when they cannot be found within ``seconds``.
    """
    if coordinates is None:
        return
    same = _digest(arguments)
    peers = {} if coordinates == Coordinates() else _meet(coordinates, same, seconds)
    try:
        jax.distributed.initialize(
            *coordinates,
            initialization_timeout=JOIN_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=JOIN_S,
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
    if peers:
        _end_with(peers)
    else:
        try:
            wait_for_all(f"same-{same}", seconds=HEARTBEAT_S)
        except Exception as error:
            raise UserError(_DIFFERENT.format(which="the processes")) from error


_DIFFERENT = "{which} were started with other options, files or versions: start the same command on all hosts"


def _digest(arguments: Sequence[str]) -> str:
    """A hash of what must be the same in all processes: options, contents of small files among them, versions."""
    from jaxsteer import __version__

    known: list[Any] = [__version__, jax.__version__]
    for argument in arguments:
        known.append(argument)
        with contextlib.suppress(OSError, ValueError):  # most are no files
            path = Path(argument.rpartition("=")[2])
            if path.is_file() and path.stat().st_size < 1 << 20:
                known.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


# Processes that meet at the address of process 0 before JAX does, whose own waiting ends in a crash of the process


def _meet(coordinates: Coordinates, same: str, seconds: float) -> dict[int, socket.socket]:
    """Connections to the others: of process 0 to all, of all to process 0. Raises ``UserError``."""
    address, count, number = coordinates
    assert address is not None and count is not None and number is not None
    host, _, port = address.rpartition(":")
    until = time.monotonic() + seconds
    if number:
        return {0: _greet(host.strip("[]"), int(port), {"process": number, "of": count, "same": same}, until, seconds)}
    peers: dict[int, socket.socket] = {}
    try:
        _gather(int(port), count, same, peers, until, seconds)
        verdict = ""
    except UserError as error:
        verdict = str(error)
    for peer in peers.values():
        with contextlib.suppress(OSError):
            peer.sendall(json.dumps({"error": verdict}).encode() + b"\n")
    if verdict:
        raise UserError(verdict)
    return peers


def _gather(port: int, count: int, same: str, peers: dict[int, socket.socket], until: float, seconds: float) -> None:
    """Wait in process 0 for all others, which are added to ``peers``."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=min(count, 1024))
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {port} ({error.strerror}): give all processes another --coordinator "
            "HOST:PORT, with a port that no other program of this host uses"
        ) from None
    different: set[int] = set()
    with server:
        while missing := sorted(set(range(1, count)) - set(peers)):
            server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                peer, _ = server.accept()
                peer.settimeout(_HELLO_S)
                hello = json.loads(peer.makefile("rb").readline(1 << 10))
                number = int(hello["process"])
            except TimeoutError:
                if time.monotonic() > until:
                    raise UserError(
                        f"of {count} processes these were not heard of within {seconds:g} s: "
                        f"{', '.join(map(str, missing[:8]))}. Start the same command on all hosts, with the same "
                        "--coordinator, or use --num-processes 1 to run alone"
                    ) from None
                continue
            except (OSError, ValueError, LookupError, TypeError):  # somebody else
                continue
            if number in missing:
                peers[number] = peer
            if number not in missing or hello.get("same") != same or hello.get("of") != count:
                different.add(number)
    if different:
        which = f"processes {', '.join(map(str, sorted(different)))} and process 0"
        raise UserError(_DIFFERENT.format(which=which))


def _greet(host: str, port: int, hello: dict[str, Any], until: float, seconds: float) -> socket.socket:
    """The connection to process 0, which has heard of everybody."""
    reason = "no answer"
    while (left := until - time.monotonic()) > 0:
        try:
            peer = socket.create_connection((host, port), timeout=min(left, _HELLO_S))
            peer.sendall(json.dumps(hello).encode() + b"\n")
            peer.settimeout(max(until + _HELLO_S - time.monotonic(), 1))  # process 0 may have begun later
            answer = json.loads(peer.makefile("rb").readline(1 << 16))
            if answer["error"]:
                raise UserError(answer["error"])
            return peer
        except UserError:
            raise
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = str(error) or type(error).__name__
            time.sleep(0.2)
    raise UserError(
        f"process 0 was not found at {host}:{port} within {seconds:g} s ({reason}). Start the same command on all "
        "hosts, let them reach process 0 at --coordinator HOST:PORT, or use --num-processes 1 to run alone"
    )


def _end_with(peers: Mapping[int, socket.socket]) -> None:
    """End this process when the connection to another one breaks before that says that it ends well."""
    for peer in peers.values():
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):  # a host may be lost
            if hasattr(socket, name):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def watch() -> None:
        left = dict(peers)
        while left:
            ready = select.select(list(left.values()), [], [])[0]
            for number in [number for number, peer in left.items() if peer in ready]:
                word = b""
                with contextlib.suppress(OSError):
                    word = left[number].recv(8)
                if word != _WELL:
                    text = f"jaxsteer: error: process {number} has ended, and this one with it: start the same command"
                    print(f"{text} again on all hosts", file=sys.stderr, flush=True)
                    os._exit(LOST)
                del left[number]

    def say_well() -> None:
        for peer in peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(_WELL)

    threading.Thread(target=watch, daemon=True).start()
    atexit.register(say_well)


_WELL = b"well"


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
