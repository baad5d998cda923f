"""Options of one run that concern the algorithm, its sizes, and where it begins."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxsteer.errors import UserError
from jaxsteer.prompt_search import ALGORITHMS, Search
from jaxsteer.prompt_search.algorithms.probe_sampling import ProbeSampling

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlgorithmOptions:
    """Which algorithm, how large, and where it begins. An option that the algorithm does not have is refused."""

    algorithm: Literal["epo", "gcg", "mutation", "pez", "gbda", "soft"] = "epo"
    """epo: evolution guided by gradients. gcg: greedy coordinate gradient. mutation: evolution without gradients. pez,
    gbda: descent on embeddings or token probabilities. soft: free embeddings, not text (docs/search.md)."""
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
    buffer: int | None = None
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
    """Of pez, gbda and soft: name of any Optax optimizer (default adamw, gbda adam)."""
    learning_rate: float | None = None
    """Of pez, gbda and soft; in units of the embedding table's root mean square entry but for gbda (default 0.1, gbda
    0.3)."""
    draft: str | None = None
    """Of epo and gcg: a small model of the same tokenizer that chooses which children are scored (probe sampling,
    arXiv 2403.01251)."""
    repetition: float | None = None
    """Weight of a penalty on tokens that stand more than once: sum over tokens of (count - 1)^1.5, per prompt token,
    is subtracted from the objective (default 0)."""
    init: str | None = None
    """A phrase to begin with, instead of random tokens: "Let's think critically". It sets the prompt's length.
    --fluency ultra_strict keeps close to it."""
    init_from: Path | None = None
    """Begin with the prompts of this earlier run's Pareto frontier."""
    allow: tuple[str, ...] = ()
    """Texts of the only tokens that a prompt may use, with or without a space before them, or files of one text per
    line. They take the place of --tokens."""
    ban: tuple[str, ...] = ()
    """Texts that no prompt may hold, in any case and however they are spelt in tokens."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What was given of the algorithm's hyperparameters, or filled in by the preset."""
        given = {name: getattr(self, name) for name in HYPERPARAMETERS}
        given["probe_sampling"] = None if self.draft is None else ProbeSampling()
        return {name: value for name, value in given.items() if value is not None}

    def sizes(self, preset: str) -> dict[str, Any]:
        """The preset's values of what was not given, ``steps`` among them where the algorithm wants its own.

        Raises ``UserError`` for options that the algorithm does not have.
        """
        known = {field.name for field in dataclasses.fields(ALGORITHMS[self.algorithm][0])}
        for name in self.hyperparameters:
            if name not in known:
                others = ", ".join(_flag(other) for other in HYPERPARAMETERS if other in known)
                name = "draft" if name == "probe_sampling" else name
                raise UserError(f"{_flag(name)} is no option of --algorithm {self.algorithm}; it has {others}")
        return SIZES[preset][self.algorithm]

    def make_search(self) -> tuple[Search, int]:
        """The search, and how many prompts its population has."""
        config, constructor = ALGORITHMS[self.algorithm]
        made = config(**self.hyperparameters)
        return constructor(made), made.population


HYPERPARAMETERS = tuple(
    field.name
    for field in dataclasses.fields(AlgorithmOptions)
    if field.name not in ("algorithm", "draft", "init", "init_from", "allow", "ban")
)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
