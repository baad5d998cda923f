"""What differs between the problems of one program: the objective's arrays, the key, the fluency weights, the start.

A problem is data and never shapes code, so that any number of them share one compilation: restarts, directions,
fluency presets and seeds of the same contexts, site and prompt length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key

from jaxsteer.errors import UserError
from jaxsteer.objectives import Objective, as_pytree

FIRST_DRAW = 2**31
"""Folded into a problem's key for its initial prompts; steps fold in their number, which stays below."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fluency:
    """Fluency weights of a population: log-spaced from ``low`` to ``high``, and the restart's draw.

    At a restart all members become the one that is best under a weight drawn uniformly from
    [``restart`` / ``spread``, ``restart`` * ``spread``].
    """

    low: float
    high: float
    restart: float
    spread: float

    def weights(self, population: int) -> np.ndarray:
        """(P,) float32 weights, smallest first: member 0 cares most about the objective."""
        return np.geomspace(self.low, self.high, population).astype(np.float32)

    def draw(self) -> np.ndarray:
        """(2,) float32, the least and the greatest weight of a restart."""
        return np.asarray([self.restart / self.spread, self.restart * self.spread], np.float32)


FLUENCY: dict[str, Fluency] = {
    "ultra_strict": Fluency(low=100.0, high=1000.0, restart=50.0, spread=1.5),
    "strict": Fluency(low=2.0, high=12.0, restart=3.0, spread=1.5),
    "medium": Fluency(low=0.5, high=4.0, restart=1.5, spread=2.0),
    "loose": Fluency(low=0.05, high=0.5, restart=0.5, spread=2.0),
}
"""The published presets of RESGA (arXiv 2601.02896, released code)."""


@struct.dataclass
class Problem:
    """One search, as data. Inside a program its arrays gain a leading axis over problems."""

    objective: Objective
    """A pytree; larger is better."""
    key: Key[Array, ""]
    """All randomness of the problem: ``fold_in(key, step)``, and ``fold_in(key, FIRST_DRAW)`` for its start."""
    fluency: Float[Array, " P"]
    """Weight of cross-entropy against the objective, member by member."""
    restart: Float[Array, " 2"]
    """Range of the weight that is drawn at a restart."""
    ids: Int[Array, "P S"] | None = None
    """The first population; ``None`` draws it."""


def make_problem(
    objective: Objective,
    population: int,
    *,
    fluency: Fluency = FLUENCY["medium"],
    seed: int = 0,
    restart: int = 0,
    ids: Int[np.ndarray, "P S"] | None = None,
) -> Problem:
    """The problem of raising ``objective`` with ``population`` prompts.

    Its key depends on ``seed`` and ``restart`` (the number of an independent repetition) and on nothing else, so that
    its result does not depend on its company.
    """
    if ids is not None and len(ids) != population:
        raise UserError(f"{len(ids)} initial prompts were given for a population of {population}: give one per member")
    return Problem(
        objective=as_pytree(objective),
        key=jax.random.fold_in(jax.random.key(seed), restart),
        fluency=fluency.weights(population),  # type: ignore[arg-type]
        restart=fluency.draw(),  # type: ignore[arg-type]
        ids=None if ids is None else jnp.asarray(ids, jnp.int32),
    )


def stack(problems: Sequence[Problem]) -> Problem:
    """Problems of one program as one pytree of NumPy arrays with a leading axis; ``key`` becomes its data.

    Raises ``UserError`` when they are not alike: another kind of objective, another site, shape or dtype.
    """
    rows = [jax.tree.map(np.asarray, _with_key_data(problem)) for problem in problems]
    kind: Any = jax.tree.structure(rows[0])
    shapes = _shapes(rows[0])
    for number, row in enumerate(rows):
        if jax.tree.structure(row) != kind or _shapes(row) != shapes:
            raise UserError(
                f"problem {number} differs from problem 0 in more than its numbers (objective, site, population or "
                f"initial prompts; {_shapes(row)} against {shapes}): search it in a program of its own"
            )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def abstract(problem: Problem, rows: int) -> Problem:
    """What ``stack`` makes of so many problems like this one, as shapes and dtypes."""
    data = jax.eval_shape(_with_key_data, problem)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape), leaf.dtype), data)


def _with_key_data(problem: Problem) -> Problem:
    return dataclasses.replace(problem, key=jax.random.key_data(problem.key))


def _shapes(problem: Problem) -> list[tuple[tuple[int, ...], str]]:
    return [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(problem)]
