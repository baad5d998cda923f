"""``tune_gate``: the site, side and threshold at which a gate tells two kinds of prompts apart."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.reading import direction_sites, read_rows
from jaxsteer.models.roles import Rendered, stack_rendered
from jaxsteer.models.taps import make_where
from jaxsteer.prompts.generate import Prompt, encode_prompts
from jaxsteer.ranges import as_tuple
from jaxsteer.statistics import wilson
from jaxsteer.steer.gates import Gate
from jaxsteer.steer.selectors import select

log = logging.getLogger(__name__)

FEWEST = 6
"""Prompts of each kind that a gate is tuned on at least: two for each of its three steps."""


def tune_gate(
    model: Model,
    wanted: Sequence[Prompt],
    other: Sequence[Prompt],
    sites: str | Sequence[str],
    *,
    positions: str = "prompt",
    seed: int = 0,
) -> Gate:
    """The gate that opens for prompts like ``wanted`` and stays closed for prompts like ``other``.

    Prompts are what ``generate`` takes. They are divided by ``seed`` into three parts. The first makes the condition
    vector of every site of the stream, the difference of the two kinds' means; the second chooses site, side and
    threshold by balanced accuracy (the widest gap settles equal ones); the third, which chooses nothing, gives
    ``Gate.accuracy`` and its interval. Raises ``UserError`` for fewer than six prompts of a kind, a prompt on both
    sides or without a token at ``positions``, and kinds that no site tells apart.
    """
    parsed = direction_sites(model, sites)
    kinds = [encode_prompts(model, as_tuple(prompts), roles=True) for prompts in (wanted, other)]
    rows = [row for kind in kinds for row in kind]
    states = np.zeros((len(parsed), len(rows), model.config.d_model))
    masks = [_mask(i, row, positions) for i, row in enumerate(rows)]
    different = [len({row.ids.tobytes() for row in kind}) for kind in kinds]
    if min(different) < FEWEST:
        raise UserError(
            f"a gate is tuned on at least {FEWEST} different prompts of each kind, got {different[0]} wanted and "
            f"{different[1]} other ones"
        )
    if both := {row.ids.tobytes() for row in kinds[0]} & {row.ids.tobytes() for row in kinds[1]}:
        raise UserError(
            f"{len(both)} prompts stand on both sides of the gate, wanted and other: a gate cannot be open and closed "
            "for the same prompt. Leave them out of one"
        )
    for chunk, found in read_rows(model, [row.ids for row in rows], masks, parsed):
        states[:, chunk] = found
    rng = np.random.default_rng(seed)
    starts = (0, len(kinds[0]))
    parts = [np.array_split(start + rng.permutation(len(kind)), 3) for start, kind in zip(starts, kinds, strict=True)]
    (fit, tune, held), (fit_other, tune_other, held_other) = parts
    vectors = (states[:, fit].mean(1) - states[:, fit_other].mean(1)).astype(np.float32)
    norms = np.linalg.norm(states, axis=-1) * np.linalg.norm(vectors, axis=-1)[:, None]
    cosines = np.einsum("snd,sd->sn", states, vectors) / np.maximum(norms, 1e-30)
    choices = [best_threshold(row[tune], row[tune_other]) for row in cosines]
    best = max(range(len(parsed)), key=lambda s: choices[s][:2])
    share, _, threshold, sign = choices[best]
    if share <= 0.5 or not vectors[best].any():
        raise UserError(
            f"no threshold at {', '.join(site.name for site in parsed)} tells the two kinds of prompts apart: give "
            f"other sites or positions, or more prompts"
        )
    open = sign * (cosines[best] - threshold) > 0
    accuracy, interval = balanced_accuracy(
        (int(open[held].sum()), int((~open[held_other]).sum())), (len(held), len(held_other))
    )
    if accuracy <= 0.5:
        raise UserError(
            f"the best gate, at {parsed[best].name}, is right for {accuracy:.0%} of the {len(held) + len(held_other)} "
            f"prompts that it was not tuned on (balanced): it tells nothing apart. Give other sites or positions, or "
            f"more prompts"
        )
    if interval[0] <= 0.5:
        log.warning(
            "the gate at %s is right for %.0f%% (%.0f to %.0f) of %d prompts that it was not tuned on: too few to tell "
            "it from chance",
            parsed[best].name, *(100 * share for share in (accuracy, *interval)), len(held) + len(held_other),
        )  # fmt: skip
    return Gate(
        site=parsed[best].name, vector=vectors[best], threshold=threshold, sign=sign, positions=positions,
        accuracy=accuracy, interval=interval, n=len(held) + len(held_other),
    )  # fmt: skip


def _mask(number: int, row: Rendered, positions: str) -> Bool[np.ndarray, " T"]:
    tokens, mask, roles = jax.tree.map(jnp.asarray, stack_rendered([row]))
    where = make_where(tokens, jnp.arange(len(row.ids))[None], mask, jnp.asarray([len(row.ids)]), roles)
    read = np.asarray(select(positions).touched(where))[0]
    if not read.any():
        raise UserError(f"prompt {number} has no token at positions {positions!r}, so that a gate can read nothing")
    return read


def best_threshold(wanted: Float[np.ndarray, " n"], other: Float[np.ndarray, " m"]) -> tuple[float, float, float, int]:
    """(balanced accuracy, gap, threshold, sign) that tells ``wanted`` numbers from ``other`` best.

    The threshold lies in the middle of two neighbouring numbers; of equal accuracies the one with the widest gap wins.
    """
    edges = np.unique(np.concatenate([wanted, other]).astype(np.float64))
    found = [(0.5, 0.0, float(edges[0]), 1)]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        middle = (low + high) / 2
        share = ((wanted > middle).mean() + (other < middle).mean()) / 2
        found.append((float(max(share, 1 - share)), float(high - low), float(middle), 1 if share >= 0.5 else -1))
    return max(found)


def balanced_accuracy(right: Sequence[int], counts: Sequence[int]) -> tuple[float, tuple[float, float]]:
    """Mean of two shares ``right / counts`` and its 95 % interval, from both Wilson intervals (Newcombe)."""
    shares = [r / n for r, n in zip(right, counts, strict=True)]
    ends = [wilson(r, n) for r, n in zip(right, counts, strict=True)]
    mean = sum(shares) / 2
    low, high = (
        math.sqrt(sum((end[side] - share) ** 2 for end, share in zip(ends, shares, strict=True))) / 2 for side in (0, 1)
    )
    return mean, (max(0.0, mean - low), min(1.0, mean + high))
