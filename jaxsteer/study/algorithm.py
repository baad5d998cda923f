"""Options of one search that concern the algorithm, its sizes, and the units in which fluency is weighed."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxsteer.errors import UserError
from jaxsteer.prompt_search import ALGORITHMS, Search
from jaxsteer.prompt_search.algorithms.probe_sampling import ProbeSampling
from jaxsteer.ranges import CountFrom0, Seed

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {
        "epo": {"population": 8, "children": 16, "top_k": 128, "restart_every": 25},
        "gcg": {"search_width": 128, "top_k": 128},
        "mutation": {"population": 8, "children": 16, "restart_every": 25},
        "pez": {"population": 8, "steps": 500},
        "gbda": {"population": 4, "samples": 8, "steps": 200},
        "soft": {"population": 1, "steps": 200},
    },
    "paper": {
        "epo": {"population": 16, "children": 32, "top_k": 512, "restart_every": 50},
        "gcg": {"search_width": 512, "top_k": 256},
        "mutation": {"population": 16, "children": 32, "restart_every": 50},
        "pez": {"population": 16, "steps": 3000},
        "gbda": {"population": 4, "samples": 10, "steps": 100},
        "soft": {"population": 1, "steps": 3000},
    },
}
"""Preset -> algorithm -> what its options are when they are not given. The rest are the algorithm's own defaults."""


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlgorithmOptions:
    """Which algorithm searches, and how hard. An option that the algorithm does not have is refused."""

    preset: Literal["default", "paper"] = "default"
    """Values of all options below that are not given. paper: as published, in raw units, many more candidates."""
    algorithm: Literal["epo", "gcg", "mutation", "pez", "gbda", "soft"] = "epo"
    """epo: evolution guided by gradients. gcg: greedy coordinate gradient. mutation: evolution without gradients. pez,
    gbda: descent on embeddings or token probabilities. soft: free embeddings, not text (docs/prompt-search.md)."""
    steps: int | None = None
    """Steps of the search (default 60, paper 300; pez, gbda and soft, whose steps are small: 500, 200, 200)."""
    fluency: Literal["ultra_strict", "strict", "medium", "loose"] = "medium"
    """Weight of cross-entropy against the objective: 100 to 1000 (for --init), 2 to 12, 0.5 to 4, or 0.05 to 0.5 nats
    per unit."""
    raw_units: bool | None = None
    """Objective in the stream's own units, not in standard deviations over random prompts (default no, paper yes)."""
    restarts: int = 1
    """Independent populations, searched side by side."""
    seed: Seed = 0
    """Seed of the search."""
    population: int | None = None
    """Prompts per population, one fluency weight each (epo and mutation: default 8, paper 16)."""
    children: int | None = None
    """Of epo and mutation: mutations per prompt and step (default 16, paper 32)."""
    top_k: int | None = None
    """Of epo and gcg: tokens per position that the gradient proposes (default 128, paper 512, gcg 256)."""
    restart_every: int | None = None
    """Of epo and mutation: steps between restarts from the best member (default 25, paper 50)."""
    search_width: int | None = None
    """Of gcg: children per step (default 128, paper 512)."""
    buffer: CountFrom0 | None = None
    """Of gcg: prompts kept; with 0 the best child goes on even if it is worse (default 0)."""
    replace: int | None = None
    """Of gcg and mutation: tokens replaced in every child (default 1)."""
    samples: int | None = None
    """Of gbda: prompts drawn per member and step (default 8, paper 10)."""
    temperature: float | None = None
    """Of gbda: of the Gumbel softmax at the start (default 1)."""
    final_temperature: float | None = None
    """Of gbda: the temperature after --anneal-steps, reached geometrically (default 1)."""
    anneal_steps: int | None = None
    """Of gbda: steps over which the temperature falls (default 100)."""
    optimizer: str | None = None
    """Of pez, gbda and soft: name of an Optax optimizer (default adamw, gbda adam)."""
    learning_rate: float | None = None
    """Of pez, gbda and soft; in units of the embedding table's root mean square entry but for gbda (default 0.1, gbda
    0.3)."""
    draft: str | None = None
    """Of epo and gcg: a small model of the same tokenizer that chooses which children are scored (probe sampling,
    arXiv 2403.01251)."""
    repetition: float | None = None
    """Weight of a penalty on tokens that stand more than once: sum over tokens of (count - 1)^1.5, per prompt token,
    is subtracted from the objective (default 0)."""

    @property
    def given(self) -> dict[str, Any]:
        """The algorithm's hyperparameters that were given, or filled in by the preset."""
        given = {name: getattr(self, name) for name in HYPERPARAMETERS}
        given["probe_sampling"] = None if self.draft is None else ProbeSampling()
        return {name: value for name, value in given.items() if value is not None}

    @property
    def config(self) -> Any:
        """The algorithm's own configuration, whose ``population`` is the number of prompts.

        Raises ``UserError`` for options that it does not have, and for values that make no search.
        """
        known = _fields(ALGORITHMS[self.algorithm][0])
        if unknown := [name for name in self.given if name not in known]:
            name = "draft" if unknown[0] == "probe_sampling" else unknown[0]
            others = ", ".join(flag(other) for other in HYPERPARAMETERS if other in known)
            raise UserError(f"{flag(name)} is no option of --algorithm {self.algorithm}; it has {others}")
        return ALGORITHMS[self.algorithm][0](**self.given)

    def make_search(self) -> Search:
        """The algorithm. Raises ``UserError`` as ``config``."""
        return ALGORITHMS[self.algorithm][1](self.config)


def _fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


HYPERPARAMETERS = tuple(
    field.name
    for field in dataclasses.fields(AlgorithmOptions)
    if any(field.name in _fields(config) for config, _ in ALGORITHMS.values())
)
