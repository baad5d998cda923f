"""The compiled programs of a search, and how many problems and candidates they take at once within a memory budget.

A step is compiled ahead of time and XLA's own account of its memory is read. What does not fit is made smaller and
compiled again before anything runs; nothing is ever tried until it fails.

A problem is always computed in the same shapes, one problem after the other, in loops whose length the compiler does
not know: it can neither unroll them nor merge problems into larger products, whose rounding would then depend on the
company. That is what makes the prompts of a problem the same bits beside any others and on any number of devices.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jaxsteer.errors import UserError
from jaxsteer.files.records import Record
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import GIB, free_memory, require_host_memory, size_text
from jaxsteer.processes import as_first
from jaxsteer.prompt_search.contexts import Task
from jaxsteer.prompt_search.population import Search, Summary
from jaxsteer.prompt_search.problem import Problem, abstract

WAVE = 64
_SHARE_OF_RAM, _SHARE_OF_DEVICE = 0.5, 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What a search may use of a machine."""

    mesh: Mesh | None = None
    """Problems are spread over its axis "prompts", weights over its axis "model"; ``None``: one device."""
    memory_gib: float | None = None
    """Per device (default: what ``default_budget`` finds)."""
    wave: int = WAVE
    """Problems per device that are searched together at most; others wait on the host."""

    @property
    def shards(self) -> int:
        """Parts that problems are divided into."""
        return 1 if self.mesh is None else self.mesh.shape["prompts"]

    def budget(self) -> int:
        """Bytes per device; the same in all processes, which must all call it."""
        return as_first(default_budget(self.mesh)) if self.memory_gib is None else int(self.memory_gib * GIB)


class Programs(NamedTuple):
    """The two jitted programs of a search, over R problems of one device or of a mesh.

    ``problems`` is what ``problem.stack`` makes. ``start(params, task, problems, counts) -> states`` makes the first
    states. ``advance(params, task, problems, states, counts, stop) -> (states, summary)`` does the steps that are
    missing to ``stop``. On every device of the mesh's axis "prompts", the first ``counts[device]`` of its R / devices
    problems are computed.
    """

    start: Any
    advance: Any


@functools.lru_cache(maxsize=32)
def programs(search: Search, mesh: Mesh | None) -> Programs:
    """The programs of ``search``; to be lowered with arrays or with ``jax.ShapeDtypeStruct``."""

    def start(params: Params, task: Task, problems: Problem, counts: Int[Array, " devices"]) -> Any:
        def init(problem: Problem) -> Any:
            return search.init(params, task, _with_key(problem))

        shapes = jax.eval_shape(init, jax.tree.map(lambda a: a[0], problems))
        rows = len(problems.fluency)
        empty = jax.tree.map(lambda s: jnp.zeros((rows, *s.shape), s.dtype), shapes)
        return _for_each(lambda problem, _: init(problem), problems, empty, counts[0])

    def advance(
        params: Params,
        task: Task,
        problems: Problem,
        states: Any,
        counts: Int[Array, " devices"],
        stop: Int[Array, ""],
    ) -> tuple[Any, Summary]:
        def one(problem: Problem, both: tuple[Any, Summary]) -> tuple[Any, Summary]:
            mine = _with_key(problem)
            return lax.while_loop(
                lambda both: both[0].step < stop, lambda both: search.step(params, task, mine, both[0]), both
            )

        rows, population = problems.fluency.shape
        none = Summary(jnp.zeros(rows), jnp.zeros((rows, population)), jnp.zeros((rows, population)))
        return _for_each(one, problems, (states, none), counts[0])

    if mesh is not None:
        # Manual over "prompts": a collective across problems cannot arise.
        shard = functools.partial(jax.shard_map, mesh=mesh, axis_names={"prompts"}, check_vma=False)
        rows = P("prompts")
        start = shard(start, in_specs=(P(), P(), rows, rows), out_specs=rows)
        advance = shard(advance, in_specs=(P(), P(), rows, rows, rows, P()), out_specs=rows)
    return Programs(jax.jit(start), jax.jit(advance))


def _with_key(problem: Problem) -> Problem:
    """The problem with a key in place of the key's data, which ``problem.stack`` leaves."""
    return dataclasses.replace(problem, key=jax.random.wrap_key_data(problem.key))


def _for_each(update: Callable[[Any, Any], Any], rows: Any, out: Any, count: Int[Array, ""]) -> Any:
    """``out`` with its first ``count`` rows replaced by what ``update`` makes of those of ``rows`` and ``out``."""

    def one(i: Array, out: Any) -> Any:
        mine = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), (rows, out))
        return jax.tree.map(lambda a, new: lax.dynamic_update_index_in_dim(a, new, i, 0), out, update(*mine))

    return lax.fori_loop(0, count, one, out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan(Record):
    """What a search computes at once, and what that costs on every device, in bytes."""

    problems: int
    """Problems on the devices at a time, all devices together."""
    batch: int
    """Candidates scored at once on a device."""
    given: int
    """Model, contexts and problems, as the programs get them."""
    made: int
    """States of the problems, as they come back."""
    temporary: int
    """Scratch of a step."""
    budget: int
    compile_s: float

    @property
    def total(self) -> int:
        """All that lies on a device while a step runs."""
        return self.given + self.made + self.temporary

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{self.problems} problem{'s' * (self.problems > 1)} and {self.batch} candidates at once; "
            f"{size_text(self.total)} of {size_text(self.budget)} per device "
            f"({size_text(self.given)} model and problems, {size_text(self.made)} states, "
            f"{size_text(self.temporary)} scratch)"
        )


class Compiled(NamedTuple):
    """A plan with its executables and the task that they take."""

    plan: MemoryPlan
    task: Task
    start: Any
    advance: Any


def plan_search(
    params: Params, task: Task, problem: Problem, search: Search, *, count: int, resources: Resources
) -> Compiled:
    """Compile the search of ``count`` problems like ``problem`` so that it fits in the memory of a device.

    ``task.batch`` candidates are scored at once; only if not even one problem fits with that, the largest of its halves
    that does. Raises ``UserError`` with what is needed when nothing fits.
    """
    shards, budget, started = resources.shards, resources.budget(), time.perf_counter()

    def attempt(rows: int, batch: int) -> Compiled:
        smaller = dataclasses.replace(task, batch=batch)
        arguments = _abstract_arguments((params, smaller, abstract(problem, rows * shards)))
        start, advance = _compile(search, resources.mesh, *arguments)
        given, made, temporary = (max(pair) for pair in zip(_bytes(start), _bytes(advance), strict=True))
        plan = MemoryPlan(
            problems=rows * shards,
            batch=batch,
            given=given,
            made=made,
            temporary=temporary,
            budget=budget,
            compile_s=time.perf_counter() - started,
        )
        return Compiled(plan, smaller, start, advance)

    # 1. As many problems as are wanted.
    most = rows = max(1, min(resources.wave, -(-count // shards)))
    found = attempt(rows, task.batch)
    # 2. Fewer of them: each takes so many bytes.
    each = _problem_bytes(params, task, problem, search)
    while found.plan.total > budget and (fewer := rows - -(-(found.plan.total - budget) // each)) >= 1:
        rows = fewer
        found = attempt(rows, task.batch)
    if found.plan.total <= budget:
        return found
    # 3. One problem and a smaller batch: what is too large is its scratch, which grows at most in proportion to it.
    fixed = found.plan.given + found.plan.made - (rows - 1) * each
    fitting = int(task.batch * max(0, budget - fixed) / found.plan.temporary)
    batch = 1 << (max(1, min(task.batch // 2, fitting)).bit_length() - 1) if task.batch > 1 else 0
    while found.plan.total > budget and batch >= 1:
        found, batch = attempt(1, batch), batch // 2
    if found.plan.total > budget:
        raise UserError(
            f"a search of this model in {task.contexts} contexts needs {size_text(found.plan.total)} on every device "
            f"even with one problem and one candidate at a time, and the budget is {size_text(budget)}: raise "
            "--memory-gib, or use fewer or shorter contexts, a smaller population, bfloat16 weights, or more devices"
        )
    # 4. As many problems as fit beside that batch.
    wider = attempt(min(most, 1 + (budget - found.plan.total) // each), found.plan.batch)
    return wider if wider.plan.total <= budget else found


def default_budget(mesh: Mesh | None = None) -> int:
    """Bytes per device that a search may use: nine tenths of an accelerator's memory; on CPU devices, which share it,
    half of the memory that is free."""
    devices = jax.local_devices() if mesh is None else list(mesh.local_devices)
    limits = [int((device.memory_stats() or {}).get("bytes_limit", 0)) for device in devices]
    if all(limits):
        return int(_SHARE_OF_DEVICE * min(limits))
    return int(_SHARE_OF_RAM * free_memory() / len(devices if mesh is not None else devices[:1]))


def _problem_bytes(params: Params, task: Task, problem: Problem, search: Search) -> int:
    """Bytes that one more problem takes while a step runs: itself, its state before and its state after."""
    state = jax.eval_shape(search.init, params, task, problem)
    leaves = jax.tree.leaves((abstract(problem, 1), state, state))
    return max(1, sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


_PROMPT_BYTES = 512
"""What a prompt that was found takes on the host, as an object with its ids and numbers."""


def require_problems(count: int, params: Params, task: Task, problem: Problem, search: Search) -> None:
    """Raise ``UserError`` unless ``count`` problems like this one, and what is found of them, fit on this machine."""
    found = jax.eval_shape(search.init, params, task, problem).archive.f.size
    each = _problem_bytes(params, task, problem, search) + found * _PROMPT_BYTES
    advice = "choose fewer --restarts, or fewer in --vary or --problems."
    require_host_memory(f"A run of {count:,} searches", count * each, advice)


def _abstract_arguments(arguments: Any) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """Their structure and shapes, as ``_compile`` takes them: hashable."""
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple(
        leaf
        if isinstance(leaf, jax.ShapeDtypeStruct)
        else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if leaf.committed else None)
        for leaf in leaves
    )


@functools.lru_cache(maxsize=32)
def _compile(
    search: Search, mesh: Mesh | None, structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]
) -> tuple[Any, Any]:
    """Both programs for arguments of these shapes; kept, so that a later search of the same shapes compiles nothing."""

    def put(tree: Any, spec: P) -> Any:
        sharding = None if mesh is None else NamedSharding(mesh, spec)
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)

    params, task, problems = jax.tree.unflatten(structure, leaves)
    if mesh is not None:
        problems = put(problems, P("prompts"))
    shards = 1 if mesh is None else mesh.shape["prompts"]
    counts = put(jax.ShapeDtypeStruct((shards,), jnp.int32), P("prompts"))
    stop = put(jax.ShapeDtypeStruct((), jnp.int32), P())
    start, advance = programs(search, mesh)
    first = start.lower(params, task, problems, counts)
    states = put(first.out_info, P("prompts"))
    return first.compile(), advance.lower(params, task, problems, states, counts, stop).compile()


def _bytes(compiled: Any) -> tuple[int, int, int]:
    """Of arguments, of results, and of scratch."""
    memory = compiled.memory_analysis()
    code = memory.generated_code_size_in_bytes
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + code, made, memory.temp_size_in_bytes
