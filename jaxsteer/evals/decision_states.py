"""What a prompt does to a model's states at the decision token: how far they move, layer by layer, and where to.

The decision token is the last one before the answers part; with and without a prompt it is the same token after the
same question, so that every difference is what the prompt sends there through attention. Letters: M prompts, L sites,
n rows (questions in both choice orders), D width, F latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.reading import direction_sites, read_rows
from jaxsteer.personas import Item, search_conversations
from jaxsteer.prompts import Placement, encode
from jaxsteer.sae import SAE
from jaxsteer.sae import encode as sae_encode

if TYPE_CHECKING:
    from jaxsteer.models.model import Model


def decision_states(
    model: Model,
    items: Sequence[Item],
    texts: Sequence[str],
    sites: Sequence[str],
    *,
    placement: Placement = Placement(),
) -> Float[np.ndarray, "M L n D"]:
    """States at ``sites`` at the decision token of every item (both choice orders) with each text as prompt, float32.

    "" stands for no prompt. Texts are tokenised in place, as a user's would be. Raises ``UserError`` for no texts or
    items, sites that are not of width D, and rows longer than the model's positions.
    """
    if not items or not texts:
        raise UserError(f"states need questions and prompts: got {len(items)} questions, {len(texts)} prompts")
    parsed = direction_sites(model, sites)
    conversations = [c for c, _ in search_conversations(items, "decision", placement=placement)]
    rows = [encode(model.tokenizer, conversation, text) for text in texts for conversation in conversations]
    reads = np.asarray([len(row) - 1 for row in rows])
    found = np.zeros((len(rows), len(parsed), model.config.d_model), np.float32)
    for numbers, states in read_rows(model, rows, reads, parsed):
        found[numbers] = states.swapaxes(0, 1)
    return found.reshape(len(texts), len(conversations), len(parsed), -1).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """How far states with a prompt are from those without, site by site; means over rows."""

    cosine: Float[np.ndarray, " L"]
    """Of the state with the prompt and the state without."""
    relative_norm: Float[np.ndarray, " L"]
    """Norm of their difference over the norm of the state without."""

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {"cosine": self.cosine.tolist(), "relative_norm": self.relative_norm.tolist()}


def divergence(with_prompt: Float[np.ndarray, "L n D"], without: Float[np.ndarray, "L n D"]) -> Divergence:
    """Compare the same rows with and without a prompt, in float64. Raises ``ValueError`` for states that are zero."""
    a, b = np.asarray(with_prompt, np.float64), np.asarray(without, np.float64)
    norm_a, norm_b = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    if not norm_a.all() or not norm_b.all():
        raise ValueError("a state is zero and has no direction")
    return Divergence(
        cosine=((a * b).sum(-1) / (norm_a * norm_b)).mean(-1),
        relative_norm=(np.linalg.norm(a - b, axis=-1) / norm_b).mean(-1),
    )


def share_of_way(
    states: Float[np.ndarray, "n D"], start: Float[np.ndarray, "a D"], end: Float[np.ndarray, "b D"]
) -> float:
    """How far the mean of ``states`` is on the straight way from the mean of ``start`` (0) to that of ``end`` (1).

    With ``start`` under sentences that invite a persona and ``end`` under sentences against it, it tells how much of
    that contrast a prompt makes. What is beside the way does not count. Raises ``ValueError`` where both ends are one.
    """
    here, begin, goal = (np.asarray(x, np.float64).mean(0) for x in (states, start, end))
    way = goal - begin
    if not way.any():
        raise ValueError("start and end are the same: there is no way between them")
    return float((here - begin) @ way / (way @ way))


def active_latents(
    sae: SAE, states: Float[np.ndarray, "n D"], *, share: float = 0.5, batch: int = 256
) -> Bool[np.ndarray, " F"]:
    """The latents that are not zero in at least ``share`` of the states. Raises ``UserError`` for another width."""
    count = np.zeros(sae.n_latents)
    for start in range(0, len(states), batch):
        chunk = np.asarray(states[start : start + batch], np.float32)
        padded = np.pad(chunk, ((0, min(batch, len(states)) - len(chunk)), (0, 0)))  # one shape, one program
        count += (np.asarray(sae_encode(sae, padded))[: len(chunk)] != 0).sum(0)
    active: np.ndarray = count >= share * len(states)
    return active


def jaccard(a: Sequence[int] | Int[np.ndarray, " n"], b: Sequence[int] | Int[np.ndarray, " m"]) -> float | None:
    """Shared members of two sets over members of either; ``None`` for two empty sets, which share nothing to count."""
    first, second = ({int(i) for i in members} for members in (a, b))
    return len(first & second) / len(first | second) if first | second else None
