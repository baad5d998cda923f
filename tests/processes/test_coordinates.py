"""Where a process stands: flags before the environment, all three or none, and clusters that are recognised."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from pathlib import Path

import pytest

from jaxsteer.errors import UserError
from jaxsteer.processes import (
    Coordinates,
    _digest,
    _meet,
    as_first,
    coordinates_of,
    from_first,
    leave,
    preempted,
    several,
    to_host,
)
from tests.helpers.several import free_port

ELSEWHERE: dict[str, str] = {}
GIVEN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SLURM = {"SLURM_PROCID": "1", "SLURM_JOB_ID": "7"}


def test_flags_come_before_the_environment() -> None:
    assert coordinates_of(Coordinates(), ELSEWHERE) is None
    assert coordinates_of(Coordinates(), GIVEN) == Coordinates("10.0.0.1:1234", 4, 2)
    assert coordinates_of(Coordinates("host:99", 3, 0), GIVEN) == Coordinates("host:99", 3, 0)
    assert coordinates_of(Coordinates(process=3), GIVEN) == Coordinates("10.0.0.1:1234", 4, 3)
    assert coordinates_of(Coordinates("[::1]:99", 3, 0), ELSEWHERE) == Coordinates("[::1]:99", 3, 0)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "8"}, Coordinates()),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        (SLURM, None),  # the batch script itself, or a shell in an allocation
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, Coordinates()),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_clusters(environment: dict[str, str], found: Coordinates | None) -> None:
    assert coordinates_of(Coordinates(), environment) == found
    assert coordinates_of(Coordinates(processes=1), environment) is None, "one process stays alone if it is told to"


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (Coordinates(processes=2), ELSEWHERE, "belong together"),
        (Coordinates("host:99", 2), ELSEWHERE, "belong together"),
        (Coordinates("host:99", 2, 2), ELSEWHERE, "--process-id must be 0 to 1 of --num-processes 2, got 2"),
        (Coordinates("host", 2, 0), ELSEWHERE, "expects HOST:PORT of process 0, the port from 1 to 65535, got 'host'"),
        (Coordinates("host:65536", 2, 0), ELSEWHERE, "the port from 1 to 65535, got 'host:65536'"),
        (Coordinates("host:99999999999999999999", 2, 0), ELSEWHERE, "the port from 1 to 65535"),
        (Coordinates("host:0", 2, 0), ELSEWHERE, "the port from 1 to 65535"),
        (Coordinates(), {**GIVEN, "JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES must be an integer, got 'four'"),
    ],
)
def test_what_does_not_fit_is_refused(flags: Coordinates, environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        coordinates_of(flags, environment)


def meeting(*processes: tuple[int, int, str], seconds: float = 20.0) -> dict[int, str]:
    """What processes (number, how many there are, what they compare) are told when they meet: "" where all is well."""
    port, told = free_port(), {}

    def one(number: int, count: int, same: str) -> None:
        try:
            met = _meet(Coordinates(f"127.0.0.1:{port}", count, number), same, seconds)
            told[number] = ""
            for peer in met.values():
                peer.close()
        except UserError as error:
            told[number] = str(error)

    threads = [threading.Thread(target=one, args=process) for process in processes]
    for thread in threads:
        thread.start()
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as other:
        other.sendall(b"GET / HTTP/1.1\r\n\r\n")  # somebody else, who is not counted
    for thread in threads:
        thread.join()
    return told


def test_processes_that_meet() -> None:
    assert meeting((2, 3, "a"), (0, 3, "a"), (1, 3, "a")) == {0: "", 1: "", 2: ""}


@pytest.mark.parametrize(
    ("processes", "says"),
    [
        ([(0, 3, "a"), (1, 3, "b"), (2, 3, "a")], "processes 1 and process 0 were started with other options"),
        ([(0, 2, "a"), (1, 3, "a")], "processes 1 and process 0 were started with other options"),
        ([(0, 3, "a"), (1, 3, "a")], "of 3 processes these were not heard of within 1 s: 2. Start the same command"),
        ([(1, 2, "a")], "process 0 was not found at 127.0.0.1:[0-9]+ within 1 s"),
    ],
)
def test_processes_that_do_not_meet_are_all_told(processes: list[tuple[int, int, str]], says: str) -> None:
    told = meeting(*processes, seconds=1)
    assert told.keys() == {number for number, *_ in processes}
    for text in told.values():
        assert re.match(says, text) and "\n" not in text


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="Address already in use"):
        _meet(Coordinates(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0), "a", 1)


def test_options_and_files_are_compared(tmp_path: Path) -> None:
    path, digests = tmp_path / "config.yaml", []
    for text, options in (("a", ()), ("b", ()), ("b", ("--steps", "4"))):
        path.write_text(text)
        digests += [_digest(["search", "--config", str(path), *options]) for _ in range(2)]
    assert digests[::2] == digests[1::2] and len(set(digests)) == 3


def test_one_process_is_the_first_and_waits_for_nobody() -> None:
    assert not several() and not preempted()
    assert from_first(lambda: {"a": (1, 2)}) == {"a": (1, 2)} and as_first(3) == 3
    assert to_host({"a": [1.0, 2.0]})["a"][1] == 2.0
    leave(2)
