"""Run a search: problems in waves, many steps per call on the devices, the host looking in now and then."""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxsteer.errors import UserError
from jaxsteer.models.params import Params
from jaxsteer.objectives import Objective, Standardised, as_pytree
from jaxsteer.processes import PREEMPTED, as_first, preempted, several
from jaxsteer.prompt_search.checking import check_objective, check_scores
from jaxsteer.prompt_search.compiling import GIB, WAVE, default_budget, plan_search
from jaxsteer.prompt_search.constraints import Valid
from jaxsteer.prompt_search.contexts import MEAN, Task
from jaxsteer.prompt_search.on_devices import OnDevices, TextCheck
from jaxsteer.prompt_search.population import Search, random_ids
from jaxsteer.prompt_search.problem import FIRST_DRAW, Problem
from jaxsteer.prompt_search.results import SearchResult, Wave, from_json, joined, to_json
from jaxsteer.prompt_search.resume import Store, digest
from jaxsteer.prompt_search.scoring import score

log = logging.getLogger(__name__)

STEPS_PER_CALL = 10
"""Steps between two checks of the prompts' text. Part of the result, and the same for all."""
CALL_S = 5.0
"""Seconds that a call should last at most: then the host looks in, and saves what there is if it is time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What the host learns after each call about the wave that is searched: arrays over its n problems and P slots."""

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
    mean = dataclasses.replace(task, combine=MEAN)
    f, _ = jax.jit(score)(params, mean, objective, ids)
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
    valid: Valid | None = None,
    callback: Callable[[Progress], None] | None = None,
    mesh: Mesh | None = None,
    steps_per_call: int = STEPS_PER_CALL,
    memory_gib: float | None = None,
    wave: int = WAVE,
    store: Store | None = None,
    keep: Callable[[Any], Any] | None = None,
    say: Callable[[str], None] = log.info,
) -> SearchResult:
    """Run ``steps`` steps of ``search`` on every problem.

    As many problems as fit in ``memory_gib`` per device (default: what the device has to offer), at most ``wave`` per
    device, are searched together, the others after them. ``valid`` says for prompts (n, S) whether their text
    re-tokenises in place; it is asked every ``steps_per_call`` steps, and what fails is taken out of populations and
    archives. With a ``mesh``, problems are spread over its axis "prompts". ``keep`` takes the last states of a wave and
    returns what of them is to be in the result. A problem's prompts depend neither on the problems beside it nor on the
    number of devices nor on memory.

    With a ``store``, what is found goes to disk as it says there; SIGTERM then saves the state and ends the process
    with status 143, and a store that resumes takes up where the last checkpoint was. KeyboardInterrupt ends the search
    and keeps what was found, except where several processes search. Raises ``UserError`` for problems that are not
    alike, when not even one fits in the budget, when the objective is not finite or scores rows by their company, and
    when the store cannot be written.
    """
    if not problems or steps < 1:
        raise UserError(f"a search needs problems and steps: got {len(problems)} and {steps}")
    check_objective(params, task, problems[0].objective)
    budget = as_first(default_budget(mesh)) if memory_gib is None else int(memory_gib * GIB)
    shards = 1 if mesh is None else mesh.shape["prompts"]
    same = {"problems": digest(problems, task.ids, task.after), "steps": steps, "steps_per_call": steps_per_call}
    if task.varies:
        same["least"] = task.least
    began = {} if store is None else store.open(same)
    if began:  # the same candidates at once, and the same waves
        task, wave = task.replace(batch=began["batch"]), -(-began["wave"] // shards)  # type: ignore[attr-defined]
    compiled = plan_search(params, task, problems[0], search, count=len(problems), budget=budget, mesh=mesh, wave=wave)
    if began and compiled.plan.problems < began["wave"]:
        raise UserError(
            f"the search began with {began['wave']} problems at a time, and only {compiled.plan.problems} fit in the "
            "memory budget now: raise --memory-gib, or leave out --resume to begin again"
        )
    say(f"Plan: {compiled.plan}")
    at_once = began.get("wave", min(compiled.plan.problems, len(problems)))
    if store is not None and not began:
        store.begin({"batch": compiled.plan.batch, "wave": at_once})
    on_host: list[Wave] = []
    kept = jax.tree.structure(jax.eval_shape(keep, compiled.start.out_info)) if keep else jax.tree.structure(None)
    clock, candidates, interrupted = _Clock(), 0, False
    for number, first in enumerate(range(0, len(problems), at_once)):
        mine = problems[first : first + at_once]
        arrays = None if store is None else store.finished(number)
        if arrays is not None:
            found = Wave.from_arrays(arrays, kept)
            clock.set(found.seconds)
        else:
            found, interrupted = _search_wave(
                OnDevices(params, compiled, mesh, mine),
                number,
                first,
                steps=steps,
                look=steps_per_call,
                check=None if valid is None else TextCheck(valid),
                callback=callback,
                store=store,
                keep=keep,
                clock=clock,
                before=candidates,
                per_step=len(mine) * search.candidates,
            )
        candidates += found.steps * len(mine) * search.candidates
        on_host.append(found)
        if interrupted:
            break
    every = joined(on_host)
    return SearchResult(
        archive=every.archive,
        rejected=every.rejected,
        kept=every.kept,
        plan=compiled.plan,
        steps=every.steps,
        candidates=candidates,
        compile_s=compiled.plan.compile_s,
        search_s=clock(),
        interrupted=interrupted,
    )


def _search_wave(
    wave: OnDevices,
    number: int,
    first: int,
    *,
    steps: int,
    look: int,
    check: TextCheck | None,
    callback: Callable[[Progress], None] | None,
    store: Store | None,
    keep: Callable[[Any], Any] | None,
    clock: _Clock,
    before: int,
    per_step: int,
) -> tuple[Wave, bool]:
    """Search one wave from its start or its last checkpoint; returns what it found, and whether it was interrupted.

    ``before`` candidates were scored for earlier waves, ``per_step`` are in each step of this one.
    """
    states, done, interrupted = wave.start(), 0, False
    check_scores(wave.host(states.f), first)
    restored = None if store is None else store.restore(number, wave.host(states))
    if restored is not None:
        states, notes = wave.put(restored[0]), restored[1]
        done = notes["step"]
        clock.set(notes["seconds"])
        if check is not None:
            check.rejected = from_json(notes["rejected"])

    def save(*, wait: bool) -> None:
        assert store is not None
        where = f"step {done} of problems {first} to {first + wave.count - 1}"
        rejected = to_json(check.rejected) if check is not None else []
        notes = {"wave": number, "step": done, "where": where, "rejected": rejected, "seconds": clock()}
        store.save(number * steps + done, wave.host(states), notes, wait=wait)

    pace = look
    try:
        with _told_to_end(store is not None) as told:
            while done < steps:
                until = min(steps, done + min(pace, look - done % look))
                called = time.perf_counter()
                new, summary = wave.advance(states, until)
                ended = not _ready(new.step, told)
                if not ended:
                    step_s = as_first((time.perf_counter() - called) / (until - done))
                    states, done, pace = new, until, max(1, min(look, int(CALL_S / max(step_s, 1e-9))))
                    if check is not None and (done % look == 0 or done == steps):
                        states = check(wave, states, first)
                    if callback is not None:
                        numbers = wave.host(summary)._asdict()
                        scored = before + per_step * done
                        callback(Progress(step=done, first=first, candidates=scored, seconds=clock(), **numbers))
                if store is not None and done < steps and (ended or told() or preempted()):
                    save(wait=True)
                    log.warning(
                        "SIGTERM: the search is saved at step %d of %d; the same command with --resume goes on",
                        done, steps,
                    )  # fmt: skip
                    raise SystemExit(PREEMPTED)
                if store is not None and done < steps and store.due():
                    save(wait=False)
    except KeyboardInterrupt:
        if several():  # they may have got it after different steps
            raise
        interrupted = True
    found = Wave(
        archive=wave.host(states.archive),
        rejected=tuple(check.rejected) if check is not None else (),
        kept=wave.host(keep(states)) if keep else None,
        steps=done,
        seconds=clock(),
    )
    if store is not None and not interrupted:
        store.finish(number, found.to_arrays())
    return found, interrupted


class _Clock:
    """Seconds of searching, also of those before a resumption."""

    def __init__(self) -> None:
        self.set(0.0)

    def set(self, seconds: float) -> None:
        self._zero = time.perf_counter() - seconds

    def __call__(self) -> float:
        return time.perf_counter() - self._zero


@contextmanager
def _told_to_end(listening: bool) -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM has come, which ends nothing meanwhile."""
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
    """Wait until the array is computed, or stop waiting when the process was told to end."""
    pause = 1e-4
    while not array.is_ready():
        if told():
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    jax.block_until_ready(array)  # raises what went wrong on the device
    return True
