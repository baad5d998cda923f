"""``jaxsteer.compare``: prompts, vectors, caps and latents side by side on one persona's questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.taps import edits_of
from jaxsteer.personas import Dataset, Persona
from jaxsteer.steer.vectors import RANDOMISED, Vectors, random_controls
from jaxsteer.study.bench import measured
from jaxsteer.study.measure import bench_of
from jaxsteer.study.measurement import Measured, Measurement
from jaxsteer.study.questions import MeasureOptions, Questions
from jaxsteer.study.results import Prompt, SearchRun


def compare(
    model: str | Model,
    persona: str | Persona | Dataset | Questions,
    variants: Mapping[str, Any],
    *,
    controls: int = 1,
    seed: int = 0,
    options: MeasureOptions | None = None,
    **changed: Any,
) -> Measurement:
    """Measure ``variants`` by name on a persona's questions, paired with the model as it is, question by question.

    A variant is a prompt (a text, one of a search, the search itself for its best), vectors or caps with a strength
    (``direction.at(15, -0.3)``, ``steer.Vectors``), edits (``steer.add``, latents by ``sae.steering``), a prompt with
    one of these as (prompt, vectors), or "" for nothing. Beside every vector that is added or ablated stand
    ``controls`` random ones of its size, drawn by ``seed``. The model as it is always comes first, and is named as the
    variant is that does nothing, if there is one. ``options`` and ``changed`` are those of ``jaxsteer.measure``; free
    answers and side effects are measured unless they say ``generate=False``, ``side_effects=False``.

    Returns:
        Rates (n: questions) with 95 % intervals, paired changes, free answers and side effects; ``table()``,
        ``to_frame()`` and ``plot()`` show them.

    Raises:
        UserError: for no variants, for one that is none of these, and as ``jaxsteer.measure``.
    """
    if not variants:
        raise UserError('nothing to compare: give variants by name, {"polite": "Be polite.", "steer": vectors}')
    usual = {} if options is not None else {"generate": True, "side_effects": True}
    baseline, rows = Measured(prompt="", steered=False, label="as it is"), []
    for name, variant in variants.items():
        text, vectors = _parts(name, variant)
        edit = None if vectors is None else edits_of(vectors)
        if not text and edit is None:
            baseline = dataclasses.replace(baseline, label=name)
            continue
        rows.append((Measured(prompt=text, steered=edit is not None, label=name), edit))
        if isinstance(vectors, Vectors) and vectors.operation in RANDOMISED and vectors.coefficient:
            rows += [
                (Measured(prompt=text, steered=True, control=f"random {i + 1} for {name}"), one.edits())
                for i, one in enumerate(random_controls(vectors, controls, seed) if controls else ())
            ]
    bench = bench_of(model, persona, [(baseline, None), *rows], options, usual | changed)
    return measured(bench, lambda part: None, None)


def _parts(name: str, variant: Any) -> tuple[str, Any]:
    """(prompt, what steers) of a variant; "" and None where there is none."""
    if isinstance(variant, SearchRun):
        if variant.best is None:
            raise UserError(f"{name}: the search found no prompt whose text gives its tokens back")
        variant = variant.best
    if variant is None or isinstance(variant, str):
        return variant or "", None
    if isinstance(variant, Prompt):
        return variant.text, None
    if isinstance(variant, tuple):
        if len(variant) != 2:
            raise UserError(f"{name}: a pair is (prompt, vectors), got {len(variant)} parts")
        return _parts(name, variant[0])[0], variant[1]
    if isinstance(variant, Path):
        raise UserError(f"{name}: read the file first, jaxsteer.steer.load_vectors({str(variant)!r}, model=model)")
    try:
        edits_of(variant)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return "", variant
