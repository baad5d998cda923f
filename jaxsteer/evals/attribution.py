"""Which tokens of a prompt carry its effect: each one left out, and each one replaced by random ones.

Both in behaviour: the mean log-odds of the persona's answer over questions in both choice orders. Leaving a token out
also shortens the text; replacing it keeps the length and averages over what stands there instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from jaxsteer.errors import UserError
from jaxsteer.evals.choice import ChoiceResult, choice_eval
from jaxsteer.files.records import Record
from jaxsteer.personas import Item
from jaxsteer.prompts import Placement, prompt_text

if TYPE_CHECKING:
    from jaxsteer.models.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attribution(Record):
    """The effect of every token of one prompt. Log-odds in nats; S tokens.

    An effect is the prompt's log-odds of the persona's answer minus those of the changed prompt: negative where the
    token drives the persona out, positive where it invites it.
    """

    tokens: tuple[str, ...]
    """(S,) texts of the tokens."""
    margin: float
    """Mean log-odds of the persona's answer with the prompt."""
    without_prompt: float
    """The same without it."""
    leave_one_out: tuple[float, ...]
    """(S,) effects of leaving a token out."""
    replacement: tuple[float, ...]
    """(S,) mean effects of replacing it."""
    replacement_sd: tuple[float, ...]
    """Standard deviation of the effect over replacements: how much it matters what stands there instead."""
    rows: int
    """Questions times choice orders."""


def attribute(
    model: Model,
    items: Sequence[Item],
    ids: Sequence[int],
    *,
    allowed: Bool[np.ndarray, " V"],
    replacements: int = 4,
    seed: int = 0,
    placement: Placement = Placement(),
    progress: Callable[[int, int], None] | None = None,
) -> Attribution:
    """Measure what each token of the prompt ``ids`` does on ``items``, from texts as a user's would be.

    ``replacements`` random tokens among ``allowed`` stand in for each token; the same ones at every place. Costs
    S * (1 + replacements) + 2 evaluations of ``items``. Raises ``UserError`` for an empty prompt or too few tokens.
    """
    ids = [int(i) for i in ids]
    choices = np.flatnonzero(allowed)
    if not ids or replacements < 1 or len(choices) < replacements:
        raise UserError(
            f"attribution needs a prompt and replacements for its tokens: got {len(ids)} tokens, {replacements} "
            f"replacements, {len(choices)} allowed tokens"
        )
    tokenizer, count = model.tokenizer, len(ids)
    drawn = np.random.default_rng([seed, 2]).choice(choices, replacements, replace=False)
    left_out = [ids[:j] + ids[j + 1 :] for j in range(count)]
    replaced = [[*ids[:j], int(new), *ids[j + 1 :]] for j in range(count) for new in drawn]
    texts = ["", *(prompt_text(tokenizer, row) if row else "" for row in (ids, *left_out, *replaced))]
    results = choice_eval(model, items, texts, placement=placement, progress=progress)
    empty, full, *changed = (_margin(result) for result in results)
    effects = full - np.asarray(changed)
    other = effects[count:].reshape(count, replacements)
    return Attribution(
        tokens=tuple(tokenizer.decode([i]) for i in ids),
        margin=full,
        without_prompt=empty,
        leave_one_out=tuple(effects[:count].tolist()),
        replacement=tuple(other.mean(1).tolist()),
        replacement_sd=tuple(other.std(1).tolist()),
        rows=len(results[0].persona_first),
    )


def _margin(result: ChoiceResult) -> float:
    return float(result.margin.mean())
