"""How likely a prompt is as text where it stands: the perplexity that is reported beside every prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxsteer.evals.scoring import Text, score_texts
from jaxsteer.prompts import Placement, Turns, build_slots, encode_texts, question_conversation
from jaxsteer.ranges import as_tuple

if TYPE_CHECKING:
    from jaxsteer.models.model import Model


def prompt_perplexity(
    model: Model, prompts: str | Sequence[str], questions: Sequence[str | Turns], *, placement: Placement = Placement()
) -> list[float | None]:
    """Exp of the mean negative log-probability per token of each prompt in its slot, averaged over questions.

    Every token is conditioned on all that stands before it, the question included; ``None`` for an empty prompt.
    Prompts are encoded in place, as text. Compare with the perplexity of ordinary sentences, measured alike.
    """
    prompts = as_tuple(prompts)
    slots = build_slots(model.tokenizer, [question_conversation(q, placement) for q in questions], 1)
    said = [prompt for prompt in prompts if prompt.strip()]
    if not said:
        return [None] * len(prompts)
    groups = []
    for around, before, closing in zip(slots.surroundings, slots.before, slots.closing, strict=True):
        rows = encode_texts(model.tokenizer, [around.full(prompt) for prompt in said], style=placement.style)
        groups.append([_split(row, len(before), len(closing)) for row in rows])
    scores = score_texts(model.params, model.config, groups, mesh=model.mesh)[0, :, :, 0]
    tokens = np.asarray([[len(text.answers[0]) for text in group] for group in groups])
    found = dict(zip(said, np.exp(np.mean(-scores.astype(np.float64) / tokens, axis=0)), strict=True))
    return [float(found[prompt]) if prompt in found else None for prompt in prompts]


def _split(row: np.ndarray, before: int, closing: int) -> Text:
    """The prompt's tokens as an answer to what stands before them; at least one token stays on either side."""
    start = max(1, min(before, len(row) - 1))
    return Text(context=row[:start], answers=(row[start : max(start + 1, len(row) - closing)],))
