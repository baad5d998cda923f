"""Directions and personas from whatever describes them: what ``jaxsteer.direction`` and ``jaxsteer.persona`` are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.personas.datasets import load_persona
from jaxsteer.personas.directions import Direction, fit_direction
from jaxsteer.personas.pairs import Pairs, contrast_pairs, response_pairs, text_pairs
from jaxsteer.personas.persona import Persona, split
from jaxsteer.personas.replies import with_replies
from jaxsteer.prompts import Placement

EVERY = "blocks.*.hook_resid_post"


def persona(source: str | os.PathLike[str] | Persona | Iterable[Any], **fields: Any) -> Persona:
    """A persona by name, from a file, or from rows: (question, matching, not matching) or (matching, not matching).

    ``fields`` are those of ``Persona.from_pairs`` for rows (name, behaviour, pro_cues, counter_cues, goal ...), and of
    ``load_persona`` for names and files. Raises ``UserError`` as they do.
    """
    if isinstance(source, Persona):
        return source
    if isinstance(source, str | os.PathLike):
        return load_persona(source, **fields)
    if hasattr(source, "to_dict") and hasattr(source, "rename"):
        return Persona.from_frame(source, **fields)
    return Persona.from_pairs(source, **fields)


def direction(
    model: Model,
    source: str | os.PathLike[str] | Persona | Pairs | Iterable[Any] | None = None,
    *,
    good: Sequence[str] = (),
    bad: Sequence[str] = (),
    sites: str | Sequence[str] = EVERY,
    estimator: str = "mean difference",
    seed: int = 0,
    placement: Placement = Placement(),
) -> Direction:
    """The direction away from a behaviour, by site: the mean of states that do not show it minus that of those that do.

    Args:
        source: a persona by name, file or object, of which the train questions of ``seed``'s split are read: where the
            answer is decided if it has sentences for and against it, else in the mean over its answers. Rows of
            (question, matching, not matching) make a persona, all of which is read. ``Pairs`` are taken as they are.
        good: instead of ``source``, texts without the behaviour, and ``bad``: with it; each is said by the user of a
            conversation (or stands alone, with ``Placement(style="plain")``) and read where the reply would begin.
        sites: names or one with a wildcard; by default the stream after every block.
        estimator: of ``personas.fit_direction``.

    Returns:
        Vectors float32 (D,) by site in units of the stream, with diagnostics; ``.at(15, -0.3)`` steers by it.

    Raises:
        UserError: for texts together with a source, for neither, for one side alone, and as what reads the source.
    """
    if (source is None) == (not good and not bad):
        raise UserError("a direction is made of a persona, rows or pairs, or else of texts: good=[...], bad=[...]")
    pairs = _pairs(model, source, placement, seed) if source is not None else None
    pairs = text_pairs(model, bad, good, placement=placement) if pairs is None else pairs
    return fit_direction(model, pairs, sites, estimator)


def _pairs(model: Model, source: Any, placement: Placement, seed: int) -> Pairs:
    if isinstance(source, Pairs):
        return source
    rows = not isinstance(source, str | os.PathLike | Persona)
    made = persona(source)
    if not made.items:
        made = with_replies(model, made)
    items = made.items if rows else split(made, seed=seed).train
    noted = None if rows else seed
    if made.pro_cues and made.counter_cues:
        return contrast_pairs(model, made, items, "decision", placement=placement, split_seed=noted)
    return response_pairs(model, made, items, placement=placement)
