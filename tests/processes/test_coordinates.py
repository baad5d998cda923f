"""Where a process stands: flags before the environment, all three or none, and clusters that are recognised."""

from __future__ import annotations

import pytest

from jaxsteer.errors import UserError
from jaxsteer.processes import Coordinates, as_first, coordinates_of, from_first, leave, preempted, several, to_host

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
        (Coordinates("host", 2, 0), ELSEWHERE, "expects HOST:PORT of process 0, got 'host'"),
        (Coordinates(), {**GIVEN, "JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES must be an integer, got 'four'"),
    ],
)
def test_what_does_not_fit_is_refused(flags: Coordinates, environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        coordinates_of(flags, environment)


def test_one_process_is_the_first_and_waits_for_nobody() -> None:
    assert not several() and not preempted()
    assert from_first(lambda: {"a": (1, 2)}) == {"a": (1, 2)} and as_first(3) == 3
    assert to_host({"a": [1.0, 2.0]})["a"][1] == 2.0
    leave(2)
