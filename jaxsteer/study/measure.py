"""``measure``: what prompts and an edit do to a model's answers, and to everything else.

The baseline, neither prompted nor steered, is always measured on the same questions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsteer.checkpoints.loading import cache_dir
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention
from jaxsteer.personas import (
    Dataset,
    Persona,
)
from jaxsteer.processes import is_first
from jaxsteer.ranges import as_tuple, must_be
from jaxsteer.runs.bars import load
from jaxsteer.runs.files import JUDGED, write_json
from jaxsteer.runs.folder import opened
from jaxsteer.runs.result import Unfinished
from jaxsteer.study.bench import Bench, measured
from jaxsteer.study.measurement import Measured, Measurement
from jaxsteer.study.questions import MeasureOptions, Questions, questions_of
from jaxsteer.writers.endpoint import Endpoint
from jaxsteer.writers.judge import Rubric
from jaxsteer.writers.writer import Writer

UNFINISHED = "unfinished.json"
"""File of a measurement's directory: what is measured until the last stage is done."""


def measure(
    model: str | Model,
    persona: str | Persona | Dataset | Questions,
    prompts: str | Sequence[str] = (),
    *,
    edits: Intervention | None = None,
    controls: Mapping[str, Intervention] | None = None,
    transfer: str | Model | Sequence[str | Model] = (),
    options: MeasureOptions | None = None,
    out: str | Path | None = None,
    **changed: Any,
) -> Measurement:
    """Measure prompt texts, an edit, or both together on a persona's questions.

    Every prompt is measured with the edit, if there is one, and the edit alone too. ``controls`` are edits by name that
    are measured beside it, without prompts, as random vectors of equal norm are (``steer.random_controls``); those of
    the edit's form run in its program. ``transfer`` names further models
    on which the same texts are measured; one prompt, or one model, may stand for a list of one. ``changed`` are fields
    of ``options``. ``out`` is a directory for the result (metrics.json) and, until then, for what is measured and the
    judge's replies as they come: the same measurement, cut off, goes on there. Without it those of an ``Endpoint`` are
    kept in the cache until the measurement is done. Many parameters: what is measured, on what, and where it is kept.
    Raises ``UserError`` before a model is loaded where there is nothing to measure or options do not go together, and
    ``Unfinished`` when the judge gives no answer.
    """
    prompts, transfer = as_tuple(prompts), as_tuple(transfer)
    refuse_unknown(changed, [field.name for field in dataclasses.fields(MeasureOptions)], "option of jaxsteer.measure")
    chosen = dataclasses.replace(options or MeasureOptions(), **changed)
    if not prompts and edits is None and not chosen.generate and chosen.judge is None:
        raise UserError("nothing to measure: give prompts, edits, generate=True or a judge")
    for one in (model, *transfer):
        must_be(one, (str, Model), "a model of jaxsteer.measure")
    must_be(persona, (str, Persona, Dataset, Questions), "persona")
    must_be(chosen, MeasureOptions, "options")
    must_be(controls, (Mapping, type(None)), "controls, edits by name,")
    beside = dict(controls or {})
    for edit in (edits, *beside.values()):
        must_be(edit, (Intervention, type(None)), "an edit (Vectors.edits, steer.add ...)")
    for text in prompts:
        must_be(text, str, "a prompt")
    if beside and edits is None:
        raise UserError("controls stand beside an edit: give edits with them")
    if "" in beside:
        raise UserError("a control has no name: name each of them")
    if transfer and edits is not None:
        raise UserError("transfer measures prompt texts on other models; an edit belongs to one")
    asked = persona if isinstance(persona, Questions) else questions_of(persona, chosen)
    config = _config((model, *transfer), asked, prompts, edits, chosen)
    if beside:
        config["controls"] = {name: edits_hash(edit) for name, edit in beside.items()}
    kept = None if out is None else Path(out)
    if out is None and isinstance(chosen.judge, Endpoint):
        kept = cache_dir() / "measurements" / hashlib.sha256(json.dumps(config).encode()).hexdigest()[:32]
    done: list[Measurement] = []
    rows = _rows(prompts, edits, beside)

    def whole(part: Measurement) -> Measurement:
        return dataclasses.replace((*done, part)[0], transfer=(*done, part)[1:])

    with contextlib.nullcontext() if kept is None else opened(kept, config, lambda _: None) as folder:
        if folder is not None:
            folder.begin()

        def keep(part: Measurement) -> None:
            if folder is not None:
                write_json(folder.path / UNFINISHED, whole(part).to_json())

        for one in (model, *transfer):
            ready = load(one, dtype=chosen.dtype) if isinstance(one, str) else one
            try:
                bench = Bench(model=ready, asked=asked, rows=rows, options=chosen)
                part = measured(bench, keep, None if kept is None else kept / JUDGED)
            except Unfinished as error:
                where = f"What was measured and judged is kept in {kept}: the same command goes on."
                assert isinstance(error.result, Measurement)
                raise Unfinished(str(error), whole(error.result), "" if kept is None else where) from error
            done.append(part)
        found = dataclasses.replace(done[0], transfer=tuple(done[1:]))
        if folder is not None:
            folder.finish(found)
            if is_first():
                (folder.path / UNFINISHED).unlink(missing_ok=True)
    if out is None and kept is not None and is_first():
        shutil.rmtree(kept, ignore_errors=True)
    return found


def bench_of(
    model: str | Model,
    persona: str | Persona | Dataset | Questions,
    rows: Sequence[tuple[Measured, Intervention | None]],
    options: MeasureOptions | None,
    changed: Mapping[str, Any],
) -> Bench:
    """The bench of rows of one's own, with ``options`` of which some are ``changed``. Raises ``UserError``."""
    refuse_unknown(changed, [field.name for field in dataclasses.fields(MeasureOptions)], "option of jaxsteer.compare")
    must_be(model, (str, Model), "a model")
    must_be(persona, (str, Persona, Dataset, Questions), "persona")
    chosen = dataclasses.replace(options or MeasureOptions(), **changed)
    asked = persona if isinstance(persona, Questions) else questions_of(persona, chosen)
    ready = load(model, dtype=chosen.dtype) if isinstance(model, str) else model
    return Bench(model=ready, asked=asked, rows=tuple(rows), options=chosen)


def _rows(
    prompts: Sequence[str], edits: Intervention | None, controls: Mapping[str, Intervention]
) -> tuple[tuple[Measured, Intervention | None], ...]:
    """The rows of a measurement, each with its edit: the baseline, the texts with the edit, the controls."""
    texts = tuple(prompts) if edits is None else ("", *prompts)
    return (
        (Measured(prompt="", steered=False), None),
        *((Measured(prompt=text, steered=edits is not None), edits) for text in texts),
        *((Measured(prompt="", steered=True, control=name), edit) for name, edit in controls.items()),
    )


def _config(
    models: Sequence[str | Model],
    asked: Questions,
    prompts: Sequence[str],
    edits: Intervention | None,
    options: MeasureOptions,
) -> dict[str, Any]:
    """What decides a measurement, for config.json."""
    return {
        "kind": "measurement",
        "models": [one if isinstance(one, str) else [one.name, one.fingerprint] for one in models],
        "persona": asked.name,
        "questions": hashlib.sha256(repr(asked).encode()).hexdigest(),
        "prompts": list(prompts),
        "edits": None if edits is None else edits_hash(edits),
        "placement": dataclasses.asdict(options.placement),
        **{name: getattr(options, name) for name in ("per_token", "generate", "side_effects")},
        **judge_config(options.judge, options.rubric),
    }


def judge_config(judge: Writer | None, rubric: Rubric) -> dict[str, Any]:
    """Who judges, and by what, for config.json."""
    named = [judge.url, judge.model] if isinstance(judge, Endpoint) else judge and type(judge).__name__
    return {"judge": named, "rubric": rubric.template_hash}


def edits_hash(edits: Intervention) -> str:
    """sha256 over an edit's structure and arrays."""
    leaves, shape = jax.tree.flatten(edits)
    digest = hashlib.sha256(str(shape).encode())
    for leaf in leaves:
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
