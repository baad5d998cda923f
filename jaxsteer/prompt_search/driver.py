"""Run a search: problems in waves, many steps per call on the devices, the host at work between two calls."""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsteer.errors import UserError
from jaxsteer.models.params import Params
from jaxsteer.objectives import Objective, Standardised, as_pytree
from jaxsteer.processes import PREEMPTED, as_first, preempted, several
from jaxsteer.prompt_search.checking import check_objective, check_scores
from jaxsteer.prompt_search.compiling import Compiled, Resources, plan_search
from jaxsteer.prompt_search.constraints import Valid
from jaxsteer.prompt_search.contexts import MEAN, Task
from jaxsteer.prompt_search.on_devices import Wave, drop_broken
from jaxsteer.prompt_search.population import Search, Summary, random_ids
from jaxsteer.prompt_search.problem import FIRST_DRAW, Problem
from jaxsteer.prompt_search.results import ScoredPrompt, SearchResult, WaveResult, from_json, joined, to_json
from jaxsteer.prompt_search.resume import Notes, Sizes, Store, digest
from jaxsteer.prompt_search.scoring import score

log = logging.getLogger(__name__)

STEPS_PER_CALL = 10
"""Steps between two checks of the prompts' text. Part of the result, and the same for all."""
CALL_S = 5.0
"""Seconds that a call should last at most: then the host saves what there is, if it is time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What the host learns after a call about the wave that is searched: arrays over its n problems and P members."""

    step: int
    """Steps that each of them has done."""
    first: int
    """Number of the first of them."""
    best_target: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, "n P"]
    cross_entropy: Float[np.ndarray, "n P"]
    candidates: int
    """Of the whole search so far, as ``seconds``."""
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the host does before, between and after the calls to the devices."""

    valid: Valid | None = None
    """Says for prompts (n, S) whether their text re-tokenises in place. What fails is taken out of populations and
    archives."""
    steps_per_call: int = STEPS_PER_CALL
    """Steps between two questions to ``valid``."""
    callback: Callable[[Progress], None] | None = None
    """Called after each call to the devices."""
    keep: Callable[[Any], Any] | None = None
    """Takes the last states of a wave and returns what of them is to be in the result."""
    say: Callable[[str], None] = log.info
    """Gets one line that tells the plan."""


def standardise(
    params: Params, task: Task, objective: Objective, *, seed: int = 0, samples: int = 256
) -> tuple[Standardised, dict[str, float]]:
    """``objective`` in standard deviations over ``samples`` random allowed prompts, and the two numbers used: those of
    its mean over contexts, whatever the task combines them to.

    Raises ``UserError`` when the objective does not vary over random prompts or is not finite there.
    """
    objective = as_pytree(objective)
    key = jax.random.fold_in(jax.random.key(seed), FIRST_DRAW)
    ids = random_ids(key, task, samples)
    f, _ = jax.jit(score)(params, dataclasses.replace(task, combine=MEAN), objective, ids)
    offset, scale = float(jnp.mean(f)), float(jnp.std(f))
    if not np.isfinite(offset) or not scale > 0:
        raise UserError(
            f"over {samples} random prompts the objective has mean {offset} and standard deviation {scale}: it must "
            "be finite and must depend on the prompt; look at the direction (all zeros?) and at where it is read"
        )
    standardised = Standardised(objective=objective, offset=jnp.float32(offset), scale=jnp.float32(scale))
    return standardised, {"offset": offset, "scale": scale, "samples": samples}


def run_search(
    params: Params,
    task: Task,
    problems: Sequence[Problem],
    search: Search,
    *,
    steps: int,
    hooks: Hooks = Hooks(),
    resources: Resources = Resources(),
    store: Store | None = None,
) -> SearchResult:
    """Run ``steps`` steps of ``search`` on every problem, as many problems together as the devices hold.

    A problem's prompts depend neither on the problems beside it nor on the number of devices nor on memory.
    KeyboardInterrupt ends the search, saves it, and keeps what was found, except where several processes search.

    Args:
        params: The model's parameters.
        task: What candidates are scored against.
        problems: Alike in everything but their numbers (``problem.stack``).
        search: The algorithm.
        steps: Of every problem.
        hooks: What the host does between two calls to the devices.
        resources: Devices, memory, and how many problems are searched together; the others wait on the host.
        store: Where the search is kept on disk, so that it can go on after any end. SIGTERM then saves the state and
            ends the process with status 143, and a store that resumes goes on from the last checkpoint.

    Raises:
        UserError: the problems are not alike, not even one fits in memory, the objective is not finite or scores rows
            by their company, or the store cannot be written.
    """
    if not problems or steps < 1:
        raise UserError(f"a search needs problems and steps: got {len(problems)} and {steps}")
    check_objective(params, task, problems[0].objective)
    begun = None if store is None else store.open(_identity(task, problems, steps, hooks))
    compiled, together = _plan(params, task, problems, search, resources, begun)
    hooks.say(f"Plan: {compiled.plan}")
    if store is not None and begun is None:
        store.begin(Sizes(batch=compiled.plan.batch, wave=together))
    job = _Job(steps, search.candidates, hooks, store, _Clock())
    results: list[WaveResult] = []
    for number, first in enumerate(range(0, len(problems), together)):
        result = _finished(job, number, compiled)
        if result is None:
            wave = Wave(params, compiled, resources.mesh, problems[first : first + together], first=first)
            result = _search_wave(job, number, wave)
        results.append(result)
        if result.interrupted:
            break
    every = joined(results)
    return SearchResult(
        archive=every.archive,
        rejected=every.rejected,
        kept=every.kept,
        plan=compiled.plan,
        steps=every.steps,
        candidates=search.candidates * sum(result.steps * len(result.archive.f) for result in results),
        compile_s=compiled.plan.compile_s,
        search_s=job.clock(),
        interrupted=every.interrupted,
    )


def _identity(task: Task, problems: Sequence[Problem], steps: int, hooks: Hooks) -> dict[str, Any]:
    """By what a search on disk is recognised."""
    numbers = {"steps": steps, "steps_per_call": hooks.steps_per_call, **({"least": task.least} if task.varies else {})}
    return {"problems": digest(problems, task.ids, task.after), **numbers}


def _plan(
    params: Params,
    task: Task,
    problems: Sequence[Problem],
    search: Search,
    resources: Resources,
    begun: Sizes | None,
) -> tuple[Compiled, int]:
    """The compiled search, and how many problems it takes together. One that was ``begun`` keeps its sizes."""
    if begun is not None:
        task = dataclasses.replace(task, batch=begun.batch)
        resources = dataclasses.replace(resources, wave=-(-begun.wave // resources.shards))
    compiled = plan_search(params, task, problems[0], search, count=len(problems), resources=resources)
    if begun is None:
        return compiled, min(compiled.plan.problems, len(problems))
    if compiled.plan.problems < begun.wave:
        raise UserError(
            f"the search began with {begun.wave} problems at a time, and only {compiled.plan.problems} fit in the "
            "memory budget now: raise --memory-gib, or leave out --resume to begin again"
        )
    return compiled, begun.wave


class _Job(NamedTuple):
    """What is the same for all waves of a search."""

    steps: int
    candidates: int
    """Per problem and step."""
    hooks: Hooks
    store: Store | None
    clock: _Clock


@dataclasses.dataclass(frozen=True)
class _Point:
    """How far a wave has come."""

    step: int
    states: Any
    """On the devices."""
    rejected: tuple[ScoredPrompt, ...]
    """Prompts that were taken out of archives."""


def _finished(job: _Job, number: int, compiled: Compiled) -> WaveResult | None:
    """What the store has of a wave that was finished before."""
    arrays = None if job.store is None else job.store.finished(number)
    if arrays is None:
        return None
    keep = job.hooks.keep
    kept = jax.eval_shape(keep, compiled.start.out_info) if keep else None
    result = WaveResult.from_arrays(arrays, jax.tree.structure(kept))
    job.clock.set(result.seconds)
    return result


def _search_wave(job: _Job, number: int, wave: Wave) -> WaveResult:
    """Search one wave from its beginning or its last checkpoint."""
    point = _begin(job, number, wave)
    pace, interrupted = _Pace(job.steps, job.hooks.steps_per_call), False
    try:
        with _noting_sigterm(job.store is not None) as told:
            while point.step < job.steps:
                stop, called = pace.stop(point.step), time.perf_counter()
                states, summary = wave.advance(point.states, stop)
                if _ready(states.step, told):
                    pace.adapt(as_first((time.perf_counter() - called) / (stop - point.step)))
                    point = _check_texts(job, wave, dataclasses.replace(point, step=stop, states=states))
                    _report(job, wave, point, summary)
                if point.step < job.steps:
                    _save(job, number, wave, point, told)
    except KeyboardInterrupt:
        if several():  # they may have got it after different steps
            raise
        interrupted = True
        _keep(job, number, wave, point, wait=True)
    keep = job.hooks.keep
    result = WaveResult(
        archive=wave.host(point.states.archive),
        rejected=point.rejected,
        kept=wave.host(keep(point.states)) if keep else None,
        steps=point.step,
        seconds=job.clock(),
        interrupted=interrupted,
    )
    if job.store is not None and not interrupted:
        job.store.finish(number, result.to_arrays())
    return result


def _begin(job: _Job, number: int, wave: Wave) -> _Point:
    """The first states of a wave, or those of its last checkpoint."""
    states = wave.start()
    check_scores(wave.host(states.f), wave.first)
    restored = None if job.store is None else job.store.restore(number, wave.host(states))
    if restored is None:
        return _Point(0, states, ())
    saved, notes = restored
    job.clock.set(notes.seconds)
    return _Point(notes.step, wave.put(saved), tuple(from_json(notes.rejected)))


def _check_texts(job: _Job, wave: Wave, point: _Point) -> _Point:
    """Take prompts out whose text does not re-tokenise, where it is time to ask."""
    if job.hooks.valid is None or (point.step % job.hooks.steps_per_call and point.step < job.steps):
        return point
    states, rejected = drop_broken(wave, point.states, job.hooks.valid)
    return dataclasses.replace(point, states=states, rejected=(*point.rejected, *rejected))


def _report(job: _Job, wave: Wave, point: _Point, summary: Summary) -> None:
    if job.hooks.callback is not None:
        candidates = job.candidates * (wave.first * job.steps + wave.count * point.step)
        numbers = wave.host(summary)._asdict()
        job.hooks.callback(
            Progress(step=point.step, first=wave.first, candidates=candidates, seconds=job.clock(), **numbers)
        )


def _save(job: _Job, number: int, wave: Wave, point: _Point, told: Callable[[], bool]) -> None:
    """Write a checkpoint if it is time. Ends the process after it if it was ``told`` to end."""
    if job.store is None:
        return
    ending = told() or preempted()
    if ending or job.store.due():
        _keep(job, number, wave, point, wait=ending)
    if ending:
        message = "Told to end: the search is saved at step %d of %d; the same command with --resume goes on"
        log.warning(message, point.step, job.steps)
        raise SystemExit(PREEMPTED)


def _keep(job: _Job, number: int, wave: Wave, point: _Point, *, wait: bool) -> None:
    """Write a checkpoint, if there is a store."""
    if job.store is None:
        return
    notes = Notes(
        wave=number,
        step=point.step,
        where=f"step {point.step} of problems {wave.first} to {wave.first + wave.count - 1}",
        rejected=to_json(point.rejected),
        seconds=job.clock(),
    )
    job.store.save(number * job.steps + point.step, wave.host(point.states), notes, wait=wait)


class _Pace:
    """Up to which step the devices run before the host looks in: not past a check of texts, and for ``CALL_S``."""

    def __init__(self, steps: int, steps_per_call: int) -> None:
        self._steps, self._most = steps, steps_per_call
        self._at_once = steps_per_call

    def stop(self, step: int) -> int:
        """Where the call that begins after ``step`` ends."""
        return min(self._steps, step + min(self._at_once, self._most - step % self._most))

    def adapt(self, step_s: float) -> None:
        """Take as many steps as fit in a call when one lasts so many seconds."""
        self._at_once = max(1, min(self._most, int(CALL_S / max(step_s, 1e-9))))


class _Clock:
    """Seconds of searching, also of those before a resumption."""

    def __init__(self) -> None:
        self.set(0.0)

    def set(self, seconds: float) -> None:
        self._zero = time.perf_counter() - seconds

    def __call__(self) -> float:
        return time.perf_counter() - self._zero


@contextmanager
def _noting_sigterm(listening: bool) -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM has come; meanwhile the signal ends nothing."""
    told = threading.Event()
    if not listening or several() or threading.current_thread() is not threading.main_thread():
        yield told.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _ready(array: Any, told: Callable[[], bool]) -> bool:
    """Wait until the array is computed; False where the process was told to end before."""
    pause = 1e-4
    while not array.is_ready():
        if told():
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    jax.block_until_ready(array)  # raises what went wrong on the device
    return True
