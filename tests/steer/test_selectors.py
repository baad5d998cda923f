"""Which tokens are touched, against the definition token by token; how many; and the norm that coefficients are in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsteer
from jaxsteer import UserError, steer
from jaxsteer.models.roles import ASSISTANT, ROLES, TEMPLATE, Rendered, Roles, stack_rendered, unlabelled
from jaxsteer.models.taps import Intervention, Where, make_where
from jaxsteer.models.transformer import positions_of
from tests.helpers.checkpoints import random_model, tiny_config

B, T = 3, 8
MODEL = random_model(tiny_config())
SITE = "blocks.1.hook_resid_post"


def definition(positions: Any, tokens: tuple[int, ...], first: bool | None, p: int, token: int, prompt: int) -> bool:
    """Whether a token at position p is selected, as the docstring of ``select`` has it."""
    if token in tokens:
        return True
    if isinstance(positions, str):
        inside = {
            "all": True,
            "prompt": p < prompt,
            "response": p >= prompt,
            "last": p == prompt - 1,
            "last_and_response": p >= prompt - 1,
        }[positions]
        return inside and (p > 0 or (positions == "last" if first is None else first))
    if positions is None:
        return not tokens and p > 0
    if isinstance(positions, slice):
        edges = [None if e is None else e + prompt * (e < 0) for e in (positions.start, positions.stop)]
        inside = p >= (edges[0] or 0) and (edges[1] is None or p < edges[1])
    else:
        inside = p in [q + prompt * (q < 0) for q in np.atleast_1d(np.asarray(positions)).tolist()]
    return inside and (p > 0 or first is not False)


choices = st.one_of(
    st.sampled_from(["all", "prompt", "response", "last", "last_and_response"]),
    st.integers(-4, 8),
    st.lists(st.integers(-4, 8), min_size=1, max_size=4),
    st.builds(slice, st.none() | st.integers(-4, 8), st.none() | st.integers(-4, 8)),
)
touched = jax.jit(lambda selector, where: selector.touched(where))


def where_of(tokens: np.ndarray, mask: np.ndarray, prompt: np.ndarray | None, roles: Roles | None = None) -> Where:
    tokens, mask, prompt, roles = jax.tree.map(jnp.asarray, (tokens, mask, prompt, roles))
    return make_where(tokens, positions_of(mask), mask, prompt, roles)


@settings(max_examples=80, deadline=None)
@given(choices, st.lists(st.integers(0, 5), max_size=2), st.sampled_from([None, None, True, False]), st.integers(0, 99))
def test_every_token_against_the_definition(positions: Any, tokens: list[int], first: bool | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(0, 6, (B, T)), np.ones((B, T), bool)
    mask[0, : rng.integers(0, 5)] = False
    mask[1, rng.integers(3, 8) :] = False
    prompt = rng.integers(0, mask.sum(-1) + 1)
    selector = steer.select(positions, tokens=tokens, include_first=first)
    where = where_of(ids, mask, prompt)
    expected = np.zeros((B, T), bool)
    for b in range(B):
        for p, t in enumerate(np.flatnonzero(mask[b])):
            expected[b, t] = definition(positions, tuple(tokens), first, p, ids[b, t], prompt[b])
    assert np.array_equal(touched(selector, where), expected)
    edit = steer.add(SITE, np.ones(24), positions=selector)
    assert np.array_equal(steer.count_positions(edit, ids, mask, prompt_length=prompt), expected.sum(-1))


NAMES = ("all", "every", "prompt", "response", "last", "last_and_response", *ROLES)


def defined(name: str, turns: list[int] | None, special: bool, row: Rendered, prompt: int, p: int) -> bool:
    """The same for conversations: ``row`` tells whose its tokens are, or that it is none."""
    known = row.turns > 0
    spoken = [role == ASSISTANT if known else q >= prompt for q, role in enumerate(row.role)]
    follows = p + 1 < len(spoken) and spoken[p + 1]
    inside = {
        "all": True,
        "every": True,
        "prompt": p < prompt and not spoken[p],
        "response": spoken[p],
        "assistant": spoken[p],
        "last": p == prompt - 1,
        "last_and_response": spoken[p] or follows or p == prompt - 1,
    }.get(name, known and name == ROLES[row.role[p]])
    inside = inside and (p > 0 or name in ("every", "last")) and (special or not known or row.role[p] != TEMPLATE)
    return inside and (turns is None or (known and {row.turn[p], row.turn[p] - row.turns} & set(turns) != set()))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.none() | st.lists(st.integers(-3, 3), min_size=1, max_size=2),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_roles_and_turns_against_the_definition(
    name: str, turns: list[int] | None, special: bool, given_prompt: bool, seed: int
) -> None:
    rng, rows = np.random.default_rng(seed), []
    for n in (T, 5, 6):
        role, turn = rng.integers(0, len(ROLES), n).astype(np.int8), np.sort(rng.integers(0, 3, n)).astype(np.int32)
        rows.append(Rendered(text="", ids=rng.integers(0, 6, n).astype(np.int32), role=role, turn=turn, turns=3))
    rows[2] = unlabelled(rows[2].ids)
    tokens, mask, roles = stack_rendered(rows, left=bool(seed % 2))
    answers = [np.flatnonzero((row.role == ASSISTANT) & (row.turn == row.turns - 1)) for row in rows]
    prompt = np.asarray([min([*first, len(row.ids)]) for first, row in zip(answers, rows, strict=True)])
    if given_prompt:
        prompt = np.asarray([rng.integers(0, len(row.ids) + 1) for row in rows])
    selector = steer.select(name, turns=turns, special=special)
    where = where_of(tokens, mask, prompt if given_prompt else None, roles)
    found = np.asarray(touched(selector, where))
    for b, row in enumerate(rows):
        expected = [defined(name, turns, special, row, prompt[b], p) for p in range(len(row.ids))]
        assert found[b, mask[b]].tolist() == expected and not found[b, ~mask[b]].any()
    if name in ROLES or turns is not None or not special:
        with pytest.raises(UserError, match="whose each token is"):
            steer.count_positions(steer.add(SITE, np.ones(24), positions=selector), tokens, mask)


def test_rows_of_a_table_keep_their_roles_and_turns() -> None:
    role = np.asarray([0, 1, 0, 2, 2, 0, 3, 3], np.int8)
    turn = np.asarray([0, 0, 1, 1, 1, 2, 2, 2], np.int32)
    row = Rendered(text="", ids=np.arange(T, dtype=np.int32), role=role, turn=turn, turns=3)
    choices = [steer.select("user"), steer.select("all", turns=[0, -1], special=False), steer.select([1, 2])]
    tokens, mask, roles = stack_rendered([row] * 3)
    edits = steer.stack_rows([steer.scale(SITE, 2.0, positions=choice) for choice in choices])
    where = where_of(tokens, mask, None, roles)
    assert [np.flatnonzero(on).tolist() for on in edits.touched(where)] == [[3, 4], [1, 6, 7], [1, 2]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(positions="first"), "'first' is not known.*'all'"),
        (dict(positions=[]), "would touch nothing"),
        (dict(positions=np.asarray([1.5])), "integers"),
        (dict(positions=True), "integers"),
        (dict(positions=slice(0, 4, 2)), "step 1"),
        (dict(positions=slice(0.5, 4)), "integers"),
        (dict(tokens=[-1]), "0 or more"),
        (dict(tokens=np.asarray([[1]])), "one list"),
        (dict(positions=steer.select("all"), include_first=True), "a Selector already"),
        (dict(positions=steer.select("all"), turns=[0]), "a Selector already"),
        (dict(turns=[]), "turns is empty"),
    ],
)
def test_select_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        steer.select(**options)


def test_counts_are_those_of_all_edits_together() -> None:
    tokens = np.resize(np.arange(6), (B, T))
    vector = np.ones(24)
    edits = steer.Edits(
        (
            steer.add(SITE, vector, 0.0, positions=[2, 3]),
            steer.replace("blocks.0.hook_mlp_out", np.ones((5, 24)), positions="response"),
        )
    )
    assert steer.count_positions(edits, tokens, prompt_length=np.asarray([3, 4, 8])).tolist() == [3, 3, 2]
    rows = steer.stack_rows([edits, None, steer.scale(SITE, 2.0)])
    assert steer.count_positions(rows, tokens).tolist() == [2, 0, 7]

    class Own(Intervention): ...

    with pytest.raises(UserError, match="Own cannot say"):
        steer.count_positions(steer.Edits((Own(),)), tokens)


def test_mean_norms_leave_out_padding_and_the_first_token(compile_counter: Any) -> None:
    tokens = np.random.default_rng(0).integers(0, 67, (5, T))
    mask = np.ones((5, T), bool)
    mask[0, :3], mask[3, 2:] = False, False
    sites = [SITE, "blocks.2.attn.hook_z"]
    values = jaxsteer.capture(MODEL, tokens, sites, mask)
    counted = mask & (np.cumsum(mask, -1) > 1)
    with compile_counter() as count:
        found = steer.mean_norms(MODEL, tokens, sites, mask, batch_size=2)
    assert count["_run"] == 1 and list(found) == sites
    for site in sites:
        flat = np.asarray(values[site], np.float64).reshape(5, T, -1)
        np.testing.assert_allclose(found[site], np.linalg.norm(flat[counted], axis=-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(steer.mean_norms(MODEL, tokens, sites, mask)[SITE], found[SITE], rtol=1e-5)
    unit = steer.add(SITE, np.ones(24), 0.5, mean_norm=found[SITE])
    before, after = (jaxsteer.capture(MODEL, tokens, [SITE], mask, edits=edits)[SITE] for edits in (None, unit))
    np.testing.assert_allclose(np.linalg.norm(after - before, axis=-1)[counted], 0.5 * found[SITE], rtol=1e-4)
    with pytest.raises(UserError, match="nothing remains"):
        steer.mean_norms(MODEL, tokens[:, :1], sites)
    with pytest.raises(UserError, match="no norm"):
        steer.mean_norms(MODEL, tokens, ["blocks.0.attn.hook_pattern"])
