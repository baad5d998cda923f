"""The algorithms by name: what ``--algorithm`` may say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.prompt_search.algorithms.epo import EpoConfig, epo
from jaxsteer.prompt_search.algorithms.gbda import GbdaConfig, gbda
from jaxsteer.prompt_search.algorithms.gcg import GcgConfig, gcg
from jaxsteer.prompt_search.algorithms.mutation import MutationConfig, mutation
from jaxsteer.prompt_search.algorithms.pez import PezConfig, pez
from jaxsteer.prompt_search.algorithms.soft import SoftConfig, soft
from jaxsteer.prompt_search.population import Search

ALGORITHMS: dict[str, tuple[type, Callable[[Any], Search]]] = {
    "epo": (EpoConfig, epo),
    "gcg": (GcgConfig, gcg),
    "mutation": (MutationConfig, mutation),
    "pez": (PezConfig, pez),
    "gbda": (GbdaConfig, gbda),
    "soft": (SoftConfig, soft),
}
"""Name -> its hyperparameters (a frozen dataclass) and the constructor of its ``Search`` from them."""


def make_search(algorithm: str, given: Mapping[str, Any]) -> Search:
    """The search of ``algorithm`` with the hyperparameters ``given``; those that are ``None`` keep their defaults.

    Raises ``UserError`` for an unknown algorithm and for a hyperparameter that it does not have.
    """
    if algorithm not in ALGORITHMS:
        raise UserError(f"unknown algorithm {algorithm!r}: choose one of {', '.join(ALGORITHMS)}")
    config, constructor = ALGORITHMS[algorithm]
    known = {field.name for field in dataclasses.fields(config)}
    chosen = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(chosen.keys() - known):
        raise UserError(f"{algorithm} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return constructor(config(**chosen))
