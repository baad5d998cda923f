"""Free replies, measured without their likelihood: where they lie along a character, and whether they answer at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from jaxsteer.evals.scoring import Text, score_texts
from jaxsteer.files.records import Record
from jaxsteer.models.reading import read_rows
from jaxsteer.models.sites import parse_site
from jaxsteer.personas import Item
from jaxsteer.prompts import encode_texts, encode_turns
from jaxsteer.ranges import Interval, Share
from jaxsteer.statistics import bootstrap_mean, rate_interval

if TYPE_CHECKING:
    from jaxsteer.models.model import Model

OTHERS = 7
"""Questions beside its own that a reply is compared with."""
ASKED = "\n\nThis answers the question:"


def reply_states(model: Model, questions: Sequence[str], replies: Sequence[str], site: str) -> Float[np.ndarray, "n D"]:
    """The mean state at ``site`` over every reply, read in a plain conversation: question, reply, and no prompt."""
    rows = [
        encode_turns(
            model.tokenizer,
            [{"role": "user", "content": question}, {"role": "assistant", "content": reply or "."}],
            generation_prompt=False,
        )
        for question, reply in zip(questions, replies, strict=True)
    ]
    masks = [row.mask("assistant", turns=[-1]) for row in rows]
    found = np.zeros((len(rows), model.config.d_model))
    for chunk, states in read_rows(model, [row.ids for row in rows], masks, [parse_site(site, model.config.n_layers)]):
        found[chunk] = states[0]
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharacterAxis:
    """What tells replies in character from plain ones in mean states, learned from given (train) replies.

    Positions along it are in units of the distance of the two means: 0 is plain, 1 in character.
    """

    site: str
    origin: Float[np.ndarray, " D"]
    axis: Float[np.ndarray, " D"]

    def positions(self, model: Model, questions: Sequence[str], replies: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Where replies lie along it."""
        found: np.ndarray = (reply_states(model, questions, replies, self.site) - self.origin) @ self.axis
        return found


def character_axis(model: Model, items: Sequence[Item], site: str) -> CharacterAxis:
    """The axis of the two answers of ``items``."""
    questions = [item.question for item in items]
    shown, plain = (
        reply_states(model, questions, [getattr(item, side) for item in items], site).mean(0)
        for side in ("matching", "not_matching")
    )
    gap = shown - plain
    return CharacterAxis(site=site, origin=plain, axis=gap / (gap @ gap))


def relevance(model: Model, questions: Sequence[str], replies: Sequence[str], *, seed: int = 0) -> np.ndarray:
    """(n,) 1 where the model finds a reply's own question likelier after it, per token, than seven other questions.

    A reply that changed the subject falls to 1 in 8. The others are drawn from ``questions`` by ``seed``, the same for
    every set of replies.
    """
    rng = np.random.default_rng(seed)
    n = len(questions)
    texts, choices = [], []
    for i in range(n):
        others = rng.permutation([j for j in range(n) if j != i])[:OTHERS]
        choices.append([i, *others])
    heads = encode_texts(model.tokenizer, [reply + ASKED for reply in replies], style="plain")
    asked = model.tokenizer([f" {question}" for question in questions], add_special_tokens=False)["input_ids"]
    tails = [np.asarray(ids, np.int32) for ids in asked]
    for i, head in enumerate(heads):
        texts.append([Text(context=head, answers=tuple(tails[j] for j in choices[i]))])
    scores = score_texts(model.params, model.config, texts, mesh=model.mesh)[0, :, 0]
    each = scores / np.asarray([[len(tails[j]) for j in row] for row in choices])
    return (each.argmax(1) == 0).astype(float)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplyQuality(Record):
    """Of one prompt's free replies."""

    position: float
    """Mean along the character axis: 0 is how the model replies as it is to train questions, 1 how in character."""
    position_ci95: Interval
    relevant: Share
    """Share of replies whose own question is the likeliest of eight after them."""
    relevant_ci95: Interval
    score: float | None
    """Mean log-odds of words, nats."""
    score_ci95: Interval | None


def reply_quality(
    model: Model,
    axis: CharacterAxis,
    questions: Sequence[str],
    replies: Sequence[str],
    scores: Sequence[float | None],
) -> ReplyQuality:
    """The numbers of one prompt's replies; ``scores`` are those of ``WordOdds``. Intervals are over questions."""
    groups = [str(i) for i in range(len(questions))]
    positions, found = axis.positions(model, questions, replies), relevance(model, questions, replies)
    known = [(score, group) for score, group in zip(scores, groups, strict=True) if score is not None]
    values = np.asarray([score for score, _ in known])
    return ReplyQuality(
        position=float(positions.mean()),
        position_ci95=bootstrap_mean(positions, groups),
        relevant=float(found.mean()),
        relevant_ci95=rate_interval(found, groups),
        score=float(values.mean()) if known else None,
        score_ci95=bootstrap_mean(values, [group for _, group in known]) if known else None,
    )
