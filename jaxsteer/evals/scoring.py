"""Log-probabilities of two or more answers after many texts, each text run through the model once.

Texts come in groups that share their beginning (one question, many prompts). The shared beginning is run once per
group and its keys and values serve all rows without a batch axis. A row holds the rest of one text and all its answers
side by side: the answers share a trunk, and a tree mask keeps them from seeing each other. Scored positions are
gathered before the unembedding.

With edits every text is a group of its own (an edit may depend on where its prompt ends), and all edits of a call run
in one program.

Letters: C groups, P texts per group, B = C * P rows, U shared beginning, T row, K scored tokens of a row, A answers,
V vocabulary, E edits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import prefill, run_layers
from jaxsteer.models.log_probs import label_log_probs, not_finite
from jaxsteer.models.padding import bucket, pad_rows
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import put
from jaxsteer.models.sites import FINAL
from jaxsteer.models.taps import NO_TAP, Intervention, Visit, Where, checked, make_where
from jaxsteer.models.transformer import embed, final_norm, make_context, positions_of
from jaxsteer.processes import to_host

ROWS = 512
"""Rows run at once by default."""
CPU_WORK = 2e12
"""Multiplications and additions of a batch, about, on a CPU. There a batch of a large model takes minutes otherwise,
and nothing shows how far the work is. Small models and accelerators take ``ROWS``."""
SHORT = 128
"""Up to this length all batches of a call are padded alike: compiling costs more than the padding."""
TRUNK, PADDING = 0, -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """One text and its answers in token space: ``context + answers[k]`` is what answer k is scored on."""

    context: np.ndarray
    answers: tuple[np.ndarray, ...]

    @property
    def length(self) -> int:
        """Tokens of the longest full text."""
        return len(self.context) + max(len(a) for a in self.answers)


def common_start(rows: Sequence[np.ndarray]) -> int:
    """Number of leading ids that all rows share."""
    shortest = min(len(row) for row in rows)
    same = np.ones(shortest, bool)
    for row in rows[1:]:
        same &= row[:shortest] == rows[0][:shortest]
    return shortest if same.all() else int(np.argmin(same))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    ids: np.ndarray
    positions: np.ndarray
    segment: np.ndarray
    at: list[int]
    target: list[int]
    answer: list[int]


def _pack(text: Text, start: int) -> _Row:
    """The row of ``text`` behind its first ``start`` tokens: trunk, then what only one answer has, one after the other.

    An answer's last token is never an input, only a target.
    """
    first, n = text.answers[0], len(text.answers)
    shared = common_start(text.answers)
    trunk = np.concatenate([text.context[start:], first[:shared]])
    ids, positions, segment = [trunk], [start + np.arange(len(trunk))], [np.full(len(trunk), TRUNK)]
    head = len(text.context) - start
    at = [head + j - 1 for j in range(shared)] * n
    target = [int(t) for t in first[:shared]] * n
    answer = [k for k in range(n) for _ in range(shared)]
    width = len(trunk)
    for k, branch in enumerate(a[shared:] for a in text.answers):
        inputs = branch[:-1]
        for j, token in enumerate(branch):
            at.append(len(trunk) - 1 if j == 0 else width + j - 1)
            target.append(int(token))
            answer.append(k)
        ids.append(inputs)
        positions.append(start + len(trunk) + np.arange(len(inputs)))
        segment.append(np.full(len(inputs), k + 1))
        width += len(inputs)
    return _Row(
        ids=np.concatenate(ids),
        positions=np.concatenate(positions),
        segment=np.concatenate(segment),
        at=at,
        target=target,
        answer=answer,
    )


@functools.partial(jax.jit, static_argnames="config")
def _score_edits(params: Params, config: ModelConfig, rows: tuple[Array, ...], edits: Intervention) -> Array:
    """(E, B, K) ``_score`` under every edit of a stack, one after the other in one program."""
    return lax.map(lambda edit: _score(params, config, *rows, edit), edits)


@functools.partial(jax.jit, static_argnames="config")
def _score(
    params: Params,
    config: ModelConfig,
    shared: Int[Array, "C U"],
    shared_length: Int[Array, " C"],
    ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    at: Int[Array, "B K"],
    target: Int[Array, "B K"],
    prompt_length: Int[Array, " B"],
    edit: Intervention | None = None,
) -> Float[Array, "B K"]:
    """Log-probability of every target at the position that predicts it, float32. ``edit`` needs B = C.

    Many parameters: arrays of a packed batch, in the order of ``_arrays``.
    """
    shared_mask = jnp.arange(shared.shape[1]) < shared_length[:, None]
    before = behind = final = NO_TAP
    if edit is not None:
        where = Where(tokens=ids, positions=positions, valid=segment != PADDING, prompt_length=prompt_length)
        behind, final = edit.tap(where), edit.tap(where.at(at))
        before = edit.tap(make_where(shared, jnp.arange(shared.shape[1])[None], shared_mask, prompt_length))
    prefix, _ = prefill(params, config, shared, shared_mask, before)
    if edit is not None:
        prefix = edit.cached(prefix, config)
    context = make_context(config, positions, segment != PADDING, prefix)
    queries, keys = segment[:, :, None], segment[:, None, :]
    own_branch = (keys == TRUNK) | (keys == queries)
    context = dataclasses.replace(
        context,
        self_mask=context.self_mask & own_branch,
        distance=positions[:, :, None] - positions[:, None, :],  # branches start at the same position
    )
    x = embed(params, config, ids, positions, behind)
    x = run_layers(params, config, x, context, 0, config.n_layers, tap=behind)
    x = jnp.take_along_axis(x, at[:, :, None], axis=1)
    if normed := Visit(final).changes(*FINAL):
        x = final_norm(params, config, x, Visit(final))
    flat = x.reshape(-1, x.shape[-1])
    return label_log_probs(params, config, flat, target.reshape(-1), normed=normed).reshape(target.shape)


@functools.partial(jax.jit, static_argnames="config")
def _decide(
    params: Params, config: ModelConfig, tokens: Int[Array, "B T"], mask: Array, edits: Intervention
) -> Intervention:
    """Every edit of a stack, decided by the contexts of the B rows."""
    where = make_where(tokens, positions_of(mask), mask)
    return lax.map(lambda edit: edit.decided(params, config, where), edits)


def score_texts(
    params: Params,
    config: ModelConfig,
    groups: Sequence[Sequence[Text]],
    *,
    rows: int = ROWS,
    mesh: Mesh | None = None,
    variants: Sequence[Intervention] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "E C P A"]:
    """Summed log-probabilities (float32, nats) of the A answers of every text, under every edit of ``variants``.

    A is the largest number of answers; a text with fewer has NaN behind them. Without variants E is 1. They differ in
    their arrays only (layers, vectors, coefficients), not in their structure.

    ``groups`` are C lists of P texts each; what the texts of a list have in common at their start is computed once.
    A score does not depend on padding or on the other texts beyond float rounding. With a ``mesh``, groups are
    spread over its axis "prompts". ``progress(done, total)`` is called after each batch with counts of texts.
    Raises ``UserError`` for a text longer than the model's positions and for edits that cannot run together.
    """
    n_variants = max(1, len(variants))
    if not groups:
        return np.zeros((n_variants, 0, 0, 2), np.float32)
    n_answers = max(len(text.answers) for group in groups for text in group)
    stacked = stack_edits(variants, config) if variants else None
    per_group = len(groups[0])
    if any(len(group) != per_group for group in groups):
        raise ValueError(f"groups of different sizes: {sorted({len(g) for g in groups})}")
    longest = max(text.length for group in groups for text in group)
    if longest > config.max_positions:
        raise UserError(
            f"the longest text with its answer has {longest} tokens, but the model has {config.max_positions} "
            "positions: leave out the long questions, or shorten the prompt"
        )
    if stacked is not None and per_group > 1:
        single = [[text] for group in groups for text in group]
        found = score_texts(params, config, single, rows=rows, mesh=mesh, variants=variants, progress=progress)
        return found.reshape(n_variants, len(groups), per_group, n_answers)
    out = np.full((n_variants, len(groups), per_group, n_answers), np.nan, np.float32)
    shards = 1 if mesh is None else mesh.shape["prompts"]
    size = max(1, rows_at_once(params, longest, rows) // per_group)
    size = -(-len(groups) // -(-len(groups) // size))  # equal batches: 24 groups in two of 12, not 16 and 8 padded
    size = -(-size // shards) * shards
    starts = [_shared_start(group) for group in groups]
    rows_of = [[_pack(text, start) for text in group] for group, start in zip(groups, starts, strict=True)]
    widest = _widths(starts, [row for packed in rows_of for row in packed])
    floors = [width if width <= SHORT else 0 for width in widest]
    order = sorted(range(len(groups)), key=lambda g: (starts[g], max(t.length for t in groups[g])))
    for begin in range(0, len(order), size):
        chosen = order[begin : begin + size]
        padded = chosen + [chosen[-1]] * (size - len(chosen))
        packed = [rows_of[g] for g in padded]
        shared = [groups[g][0].context[: starts[g]] for g in padded]
        lengths = [len(text.context) for g in padded for text in groups[g]]
        arrays: list[Any] = _arrays(shared, [row for group in packed for row in group], lengths, floors)
        if mesh is not None:
            arrays = [put(a, NamedSharding(mesh, P("prompts"))) for a in arrays]
        if stacked is None:
            scores = to_host(_score(params, config, *arrays))
        else:
            ready = stacked
            if stacked.conditional:
                contexts = [text.context for g in padded for text in groups[g]]
                whole: list[Any] = list(pad_rows(contexts, bucket(longest, 8)))
                if mesh is not None:
                    whole = [put(a, NamedSharding(mesh, P("prompts"))) for a in whole]
                ready = _decide(params, config, *whole, stacked)
            scores = to_host(_score_edits(params, config, tuple(arrays), ready))
        scores = scores.reshape(n_variants, size, per_group, -1).astype(np.float64)
        finite = np.all(
            [
                np.isfinite(scores[:, i, p, : len(row.answer)]).all(-1)
                for i, group in enumerate(packed)
                for p, row in enumerate(group)
            ],
            axis=0,
        )
        if not finite.all():
            raise UserError(not_finite(variants[int(np.argmin(finite))].label if variants else ""))
        for i, (g, group_rows) in enumerate(zip(chosen, packed, strict=False)):
            for p, row in enumerate(group_rows):
                kept = scores[:, i, p, : len(row.answer)]
                answer = np.asarray(row.answer)
                count = len(groups[g][p].answers)
                out[:, g, p, :count] = np.stack([kept[:, answer == k].sum(-1) for k in range(count)], axis=-1)
        if progress is not None:
            progress(min(begin + size, len(order)) * per_group, len(order) * per_group)
    return out


def rows_at_once(params: Params, longest: int, most: int = ROWS) -> int:
    """How many rows of ``longest`` tokens to run at once: ``most``, or fewer of a large model on a CPU, at least 1."""
    if jax.default_backend() == "cpu":
        weights = sum(leaf.size for leaf in jax.tree.leaves(params))
        most = min(most, int(CPU_WORK / (2 * weights * longest)))
    return max(1, most)


def _shared_start(group: Sequence[Text]) -> int:
    """How much all texts of a group share; at least the token that predicts an answer stays in the row."""
    contexts = [text.context for text in group]
    return min(common_start(contexts), min(len(c) for c in contexts) - 1)


def _widths(starts: Sequence[int], rows: Sequence[_Row]) -> tuple[int, int, int]:
    """Padded lengths U, T and K for these shared starts and rows."""
    return bucket(max(starts), 8), bucket(max(len(r.ids) for r in rows), 8), bucket(max(len(r.at) for r in rows), 2)


def same_form(edits: Sequence[Intervention]) -> list[list[int]]:
    """Numbers of the edits that can run in one program (``stack_edits``), group by group in the order of the first."""
    forms: dict[str, list[int]] = {}
    for i, edit in enumerate(edits):
        leaves, form = jax.tree.flatten(edit)
        forms.setdefault(f"{form}{[np.shape(leaf) for leaf in leaves]}", []).append(i)
    return list(forms.values())


def stack_edits(variants: Sequence[Intervention], config: ModelConfig) -> Intervention:
    """One pytree whose arrays have a leading axis over ``variants``.

    Raises ``UserError`` for edits that do not fit the model, that differ in kind, or that are made for certain rows.
    """
    for edit in variants:
        checked(edit, config, None)
        if edit.rows is not None:
            raise UserError(
                f"These edits are made for {edit.rows} rows of one batch; here every edit serves all texts. Give one "
                "edit for each setting instead."
            )
    try:
        stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *variants)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"These {len(variants)} edits cannot run in one program: they must agree in operation, place, selector and "
            f"the shapes of their arrays, and differ in values only ({str(error).splitlines()[0]})."
        ) from None
    return stacked


def _arrays(shared: list[np.ndarray], rows: list[_Row], lengths: list[int], floors: Sequence[int]) -> list[np.ndarray]:
    widths = _widths([len(s) for s in shared], rows)
    u, t, k = (max(width, floor) for width, floor in zip(widths, floors, strict=True))
    ids, positions, segment = (np.zeros((len(rows), t), np.int32) for _ in range(3))
    segment[:] = PADDING
    at, target = (np.zeros((len(rows), k), np.int32) for _ in range(2))
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], positions[i, :n], segment[i, :n] = row.ids, row.positions, row.segment
        at[i, : len(row.at)], target[i, : len(row.at)] = row.at, row.target
    return [
        pad_rows(shared, u)[0],
        np.asarray([len(s) for s in shared], np.int32),
        ids,
        positions,
        segment,
        at,
        target,
        np.asarray(lengths, np.int32),
    ]
