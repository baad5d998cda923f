"""The pushes of a study of circuits: vectors, or a prompt, beside random ones; each ready to be run."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxsteer.circuits.rows import Rows
from jaxsteer.circuits.study_options import CircuitOptions
from jaxsteer.circuits.study_questions import Questions
from jaxsteer.circuits.study_setting import Push, Task, answer_rows, contexts_of, token_rows
from jaxsteer.circuits.study_stages import Bench, Source
from jaxsteer.circuits.value_vectors import first_block
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.sites import parse_site
from jaxsteer.models.taps import Intervention
from jaxsteer.personas import Item
from jaxsteer.steer.vectors import Vectors, check_vectors, random_controls

STREAM = ("hook_resid_pre", "hook_resid_post", "hook_embed")
"""Where a vector may act: between blocks."""


def vector_push(model: Model, vectors: Vectors, name: str, options: CircuitOptions) -> Push:
    """The push of a vector. Raises ``UserError`` for one that is not added to the stream at one site of this model."""
    check_vectors(vectors, model, any_weights=options.any_weights)
    if len(vectors.arrays) != 1 or vectors.operation != "add" or vectors.gate is not None:
        raise UserError(
            f"{name}: a circuit is drawn from where one vector is added to the stream, and this file has "
            f"{vectors.operation} at {', '.join(vectors.sites[:4])}. Choose one site of it (--steer-site)"
        )
    site = vectors.sites[0]
    start = first_block(model, site)
    if start >= model.config.n_layers:
        raise UserError(f"{name}: {site} is behind the last block: nothing reads the vector")
    if parse_site(site, model.config.n_layers).kind not in ("hook_resid_pre", "hook_resid_post", "hook_embed"):
        raise UserError(f"{name}: {site} lies inside of a block: add the vector before or behind one")
    amount = vectors.coefficient if options.coefficient is None else options.coefficient
    array = vectors.arrays[site].astype(np.float64)
    if not array.any() or not amount:
        raise UserError(f"{name}: the vector or its coefficient is zero: there is no push to explain")
    if vectors.coefficient_units == "mean_resid_norm":
        array = array / np.linalg.norm(array) * vectors.stream_norm(site)
    plain = dataclasses.replace(
        vectors, arrays={site: (amount * array).astype(np.float32)}, coefficient=1.0, coefficient_units="vector",
        positions=options.positions or vectors.positions,
    )  # fmt: skip
    label = f"{amount:g} x {name} at {site}, norm {np.linalg.norm(plain.arrays[site]):.3g}"
    controls = tuple(random_controls(plain, options.controls, options.seed))
    return Push(name=name, label=label, vectors=plain, controls=controls, start=start)


def prompt_push(model: Model, questions: Questions, options: CircuitOptions) -> Push:
    """The push of the prompt, whose ids and controls the questions hold."""
    label = f"{len(questions.tokens[1])} tokens of prompt against as many times {questions.filler_text!r}"
    return Push(name="prompt", label=label, vectors=None, tokens=questions.tokens)


def make_bench(model: Model, push: Push, questions: Questions, options: CircuitOptions) -> Bench:
    """Rows, metric and sources of a push. Raises ``UserError`` where metric "tokens" finds no different token."""
    contexts = [_contexts(model, push, questions.test, which, options) for which in (0, 1, 2)]
    task, source, controls = _runs(model, push, questions.test, options)
    held = None if push.vectors is None else _runs(model, push, questions.held, options)[:2]
    return Bench(
        model=model, options=options, push=push, task=task, source=source, controls=controls,
        contexts=tuple(tuple(some) for some in contexts), held=held,
    )  # fmt: skip


def _runs(
    model: Model, push: Push, items: tuple[Item, ...], options: CircuitOptions
) -> tuple[Task, Source, tuple[Source, ...]]:
    count = 2 + options.controls if push.vectors is None else 2
    contexts = [_contexts(model, push, items, which, options) for which in range(count)]
    edits: list[Intervention] = [one.edits() for one in ((push.vectors, *push.controls) if push.vectors else ())]
    if options.metric == "tokens":
        task, rows = token_rows(model, contexts, items, edits[0] if edits else None, options)
    else:
        _, answers = contexts_of(model, items, options.prompt, options.slot)
        tasks = [answer_rows(model, some, answers, items) for some in contexts]
        task, rows = tasks[0], [one.rows for one in tasks[1:]]
    sources: list[Intervention] | list[Rows] = edits or rows
    return task, sources[0], tuple(sources[1:])


def _contexts(
    model: Model, push: Push, items: tuple[Item, ...], which: int, options: CircuitOptions
) -> list[np.ndarray]:
    """Questions as token ids in the base run (0), the pushed one (1) and those under random pushes."""
    return contexts_of(model, items, options.prompt, options.slot, push.tokens[which] if push.tokens else None)[0]
