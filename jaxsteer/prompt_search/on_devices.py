"""A wave: the problems that are on the devices together, and the transfer of their arrays between host and devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Int

from jaxsteer.models.params import Params
from jaxsteer.models.sharding import put
from jaxsteer.processes import to_host
from jaxsteer.prompt_search.compiling import Compiled
from jaxsteer.prompt_search.constraints import Valid
from jaxsteer.prompt_search.population import Summary, evict
from jaxsteer.prompt_search.problem import Problem, stack
from jaxsteer.prompt_search.results import ScoredPrompt, prompt_at


class Wave:
    """Problems on the devices of a compiled search, spread evenly over the mesh's axis "prompts".

    On the host their arrays have one row per problem, whatever the devices; on the devices they have as many rows as
    the program was compiled for.
    """

    def __init__(
        self, params: Params, compiled: Compiled, mesh: Mesh | None, problems: Sequence[Problem], *, first: int = 0
    ) -> None:
        """Send ``problems`` there, of which the first has the number ``first``."""
        shards = 1 if mesh is None else mesh.shape["prompts"]
        self._params, self._compiled, self._mesh = params, compiled, mesh
        self._size = compiled.plan.problems
        self.first, self.count = first, len(problems)
        each = self._size // shards
        share, rest = divmod(self.count, shards)
        counts = np.asarray([share + (device < rest) for device in range(shards)], np.int32)
        self._rows = np.concatenate([np.arange(k) + each * device for device, k in enumerate(counts)])
        self._counts = self._put(counts, P("prompts"))
        self._task = compiled.task if mesh is None else self._put(compiled.task, P())
        self._problems = self.put(stack(problems))

    def start(self) -> Any:
        """First states, on the devices."""
        return self._compiled.start(self._params, self._task, self._problems, self._counts)

    def advance(self, states: Any, stop: int) -> tuple[Any, Summary]:
        """States after step ``stop``, and what that step reported; both may still be being computed."""
        last = self._put(np.int32(stop), P())
        return self._compiled.advance(self._params, self._task, self._problems, states, self._counts, last)

    def host(self, tree: Any) -> Any:
        """NumPy arrays with one row per problem, of arrays on the devices."""
        return jax.tree.map(lambda a: a[self._rows], to_host(tree))

    def put(self, tree: Any) -> Any:
        """The reverse of ``host``."""

        def spread(leaf: np.ndarray) -> np.ndarray:
            out = np.broadcast_to(leaf[:1], (self._size, *leaf.shape[1:])).copy()
            out[self._rows] = leaf
            return out

        return self._put(jax.tree.map(spread, tree), P("prompts"))

    def _put(self, tree: Any, spec: P) -> Any:
        if self._mesh is None:
            return jax.device_put(tree)
        sharding = NamedSharding(self._mesh, spec)
        return jax.tree.map(lambda leaf: put(leaf, sharding), tree)


def drop_broken(wave: Wave, states: Any, valid: Valid) -> tuple[Any, list[ScoredPrompt]]:
    """Take prompts whose text does not re-tokenise out of populations and archives.

    Returns the states without them, and those that were in an archive.
    """
    ids, archive = wave.host((states.ids, states.archive))
    alive = np.isfinite(archive.f)
    bad = ~_ask(valid, ids, np.ones(ids.shape[:2], bool))
    bad_archive = ~_ask(valid, archive.ids, alive) & alive
    rejected = [
        prompt_at(archive, problem, row, number=wave.first + int(problem), retokenises=False)
        for problem, row in zip(*np.nonzero(bad_archive), strict=True)
    ]
    return _evict(states, *wave.put((bad, bad_archive))), rejected


def _ask(valid: Valid, ids: Int[np.ndarray, "n P S"], which: Bool[np.ndarray, "n P"]) -> Bool[np.ndarray, "n P"]:
    """What ``valid`` says of the prompts ``which``; True for the others."""
    answers = np.ones(which.shape, bool)
    if which.any():
        answers[which] = valid(ids[which])
    return answers


@jax.jit
def _evict(states: Any, bad: Bool[jnp.ndarray, "R P"], bad_archive: Bool[jnp.ndarray, "R A"]) -> Any:
    return jax.vmap(evict)(states, bad, bad_archive)
