"""What operations promise, on random values; and what their constructors refuse."""

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
from jaxsteer.models.sites import parse_site
from jaxsteer.models.taps import make_where
from jaxsteer.steer.edits import Edit, Edits
from tests.helpers.checkpoints import random_model, tiny_config

B, T, D = 2, 5, 6
SITE = "blocks.3.hook_resid_mid"
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 67, (B, T)))
WHERE = make_where(TOKENS, jnp.arange(T)[None], None)


@jax.jit
def at_layer(edits: Any, value: jax.Array, layer: int) -> jax.Array:
    tap = edits.tap(WHERE)
    for place in ("hook_resid_mid", "attn.hook_z"):  # as the model would: only one of them is the edit's
        value = tap(place, layer, value)
    return value


def apply(edits: Any, value: np.ndarray, layer: int = 3) -> np.ndarray:
    return np.asarray(at_layer(edits, jnp.asarray(value, jnp.float32), layer))


def draw(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values, a vector that is not of norm 1, that vector's direction)."""
    rng = np.random.default_rng(seed)
    value, vector = rng.standard_normal((B, T, D)).astype(np.float32) * 3, rng.standard_normal(D) * 5
    return value, vector, vector / np.linalg.norm(vector)


ALL = dict(positions=slice(0, None))
few = settings(max_examples=25, deadline=None)


@few
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_identities(seed: int, number: float) -> None:
    value, vector, unit = draw(seed)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
    ablated = apply(steer.ablate(SITE, vector, **ALL), value)
    close(apply(steer.ablate(SITE, vector, **ALL), ablated), ablated)
    close(ablated @ unit, 0)
    clamped = apply(steer.clamp(SITE, vector, number, **ALL), value)
    close(clamped @ unit, number)
    close(clamped - ablated, number * np.broadcast_to(unit, value.shape))
    floor, ceiling = (apply(f(SITE, vector, number, **ALL), value) for f in (steer.floor, steer.ceiling))
    assert (floor @ unit).min() >= number - 1e-5 and (ceiling @ unit).max() <= number + 1e-5
    close(floor, apply(steer.ceiling(SITE, -vector, -number, **ALL), value))
    close(floor + ceiling - value, clamped)
    kept = (value @ unit > number)[..., None]
    assert np.array_equal(np.where(kept, floor, 0), np.where(kept, value, 0))
    there_and_back = Edits((steer.add(SITE, vector, number), steer.add(SITE, vector, -number)))
    close(apply(there_and_back, value), value)
    level = apply(steer.add(SITE, vector, number, keep_norm=True, **ALL), value)
    np.testing.assert_allclose(np.linalg.norm(level, axis=-1), np.linalg.norm(value, axis=-1), rtol=1e-5)
    moved = apply(steer.add(SITE, vector, number, mean_norm=7.0, **ALL), value)
    close((moved - value) @ unit, 7 * number)


@few
@given(st.integers(0, 10**6))
def test_settings_that_change_nothing_keep_every_bit(seed: int) -> None:
    value, vector, _ = draw(seed)
    value[0, 1] = 0
    edits = (
        steer.add(SITE, vector, 0.0),
        steer.add(SITE, vector, 0.0, keep_norm=True),
        steer.ablate(SITE, vector, 0.0),
        steer.scale(SITE, 1.0),
        steer.floor(SITE, vector, -1e6),
        steer.ceiling(SITE, vector, 1e6),
        steer.replace(SITE, value),
    )
    assert np.array_equal(apply(Edits(edits), value), value)
    assert [edit.neutral for edit in edits] == [True] * 4 + [False] * 3
    other = [steer.add("blocks.2.hook_resid_mid", vector), steer.add(SITE, vector, positions=[9])]
    assert np.array_equal(apply(Edits(tuple(other)), value), value)


def test_order_is_as_stated() -> None:
    value, vector, unit = draw(0)
    add, floor = steer.add(SITE, vector, -10.0), steer.floor(SITE, vector, 1.0)
    first, second = apply(Edits((add, floor)), value), apply(Edits((Edits((floor,)), add)), value)
    np.testing.assert_allclose(first[:, 1:] @ unit, 1, atol=1e-5)
    assert (second[:, 1:] @ unit).max() < -10


def test_layers_of_one_edit() -> None:
    value, vector, _ = draw(1)
    vectors = np.stack([vector, 2 * vector, 3 * vector])
    edit = steer.add([f"blocks.{i}.hook_resid_mid" for i in (5, 3, 1)], vectors, [1.0, 0.5, 0.1])
    for layer, factor in ((5, 1.0), (3, 1.0), (1, 0.3), (0, 0.0)):
        np.testing.assert_allclose(apply(edit, value, layer)[:, 1:], value[:, 1:] + factor * vector, atol=1e-5)
    everywhere = steer.add("blocks.*.hook_resid_mid", vector)
    for layer in (0, 7):
        np.testing.assert_allclose(apply(everywhere, value, layer)[:, 1:], value[:, 1:] + vector, atol=1e-5)
    site = parse_site("blocks.-1.hook_resid_mid", 4)
    assert np.array_equal(apply(steer.add(site, vector), value), apply(steer.add(SITE, vector), value))


def test_one_head() -> None:
    rng, site = np.random.default_rng(2), "blocks.3.attn.hook_z"
    value, vector = rng.standard_normal((B, T, 4, D)), rng.standard_normal(D)
    whole = np.zeros((4, D))
    whole[2] = vector
    by_hand = {"add": (1.5,), "ablate": (), "clamp": (0.5,), "floor": (0.1,), "ceiling": (-0.1,)}
    for name, number in by_hand.items():
        make = getattr(steer, name)
        one = apply(make(site, vector, *number, head=2), value)
        np.testing.assert_allclose(one, apply(make(site, whole, *number), value), atol=1e-6)
        assert np.array_equal(one[:, :, [0, 1, 3]], value.astype(np.float32)[:, :, [0, 1, 3]])
    replaced = apply(steer.replace(site, np.ones((T, D)), head=1), value)
    assert (replaced[:, :, 1] == 1).all() and not (replaced[:, :, [0, 2, 3]] == 1).any()
    rows = steer.stack_rows([steer.scale(site, 0.0, head=3), steer.scale(site, 2.0)])
    scaled = apply(rows, value)
    assert (scaled[0, 1:, 3] == 0).all() and np.array_equal(scaled[0, :, :3], value.astype(np.float32)[0, :, :3])
    np.testing.assert_allclose(scaled[1, 1:], 2 * value[1, 1:], rtol=1e-6)


def test_one_token_at_a_time_is_edited_as_the_whole_text_is() -> None:
    value, vector, _ = draw(3)
    prompt_length = jnp.asarray([2, 4])
    names: list[Any] = ["all", "prompt", "response", "last", "last_and_response", [2, -1], slice(1, -1)]
    edits = Edits(
        (
            *(steer.add(SITE, np.roll(vector, i), positions=p) for i, p in enumerate(names)),
            steer.add(SITE, vector, positions=steer.select(tokens=TOKENS[0, 2:4])),
            steer.replace(SITE, np.roll(value, 1, axis=1), positions=[0, 3]),
        )
    )
    whole = make_where(TOKENS, jnp.arange(T)[None], None, prompt_length)

    @jax.jit
    def stepwise(value: jax.Array) -> tuple[jax.Array, jax.Array]:
        one = [
            edits.tap(make_where(TOKENS[:, t : t + 1], jnp.full((B, 1), t), None, prompt_length))(
                "hook_resid_mid", 3, value[:, t : t + 1]
            )
            for t in range(T)
        ]
        return edits.tap(whole)("hook_resid_mid", 3, value), jnp.concatenate(one, axis=1)

    together, stepped = stepwise(jnp.asarray(value))
    np.testing.assert_allclose(together, stepped, atol=1e-6)
    assert (np.abs(together - value).max(-1) > 0.1).all()


def test_rows_of_other_sizes_are_filled_with_nothing() -> None:
    value, vector, _ = draw(4)
    plane = np.random.default_rng(4).standard_normal((2, D))
    rows: list[Any] = [
        steer.ablate(SITE, plane, positions=[1, 2, 3]),
        steer.ablate(["blocks.2.hook_resid_mid", SITE], vector, positions=steer.select(tokens=[int(TOKENS[1, 0])])),
    ]
    table = steer.stack_rows(rows)
    assert table.rows == 2 and table.edits[0].vector.shape == (2, 2, 2, D)
    for layer in (2, 3):
        alone = np.stack([apply(row, value, layer)[i] for i, row in enumerate(rows)])
        np.testing.assert_allclose(apply(table, value, layer), alone, atol=1e-6)
    swapped = apply(steer.take_rows(table, np.asarray([1, 0])), value)
    np.testing.assert_allclose(swapped[1], apply(rows[0], value)[1], atol=1e-6)
    assert steer.take_rows(rows[0], np.asarray([1, 0])).rows is None
    assert steer.stack_rows([None, None]).edits == ()
    add, floor = steer.add(SITE, vector, -1.0), steer.floor(SITE, vector, 1.0)
    orders: list[Any] = [Edits((floor, add, add)), Edits((floor, add, floor))]  # one kind twice in a row of the batch
    alone = np.stack([apply(row, value)[i] for i, row in enumerate(orders)])
    np.testing.assert_allclose(apply(steer.stack_rows(orders), value), alone, atol=1e-5)


def test_constructors_work_inside_jit() -> None:
    value, vector, _ = draw(5)
    plane = np.stack([vector, vector[::-1]])

    @jax.jit
    def inside(vector: jax.Array, plane: jax.Array, value: jax.Array) -> jax.Array:
        edits = Edits((steer.floor(SITE, vector, vector[0]), steer.ablate(SITE, plane), steer.add(SITE, vector, 2.0)))
        edits.check(tiny_config(n_layers=4, d_model=D, n_heads=1, n_kv_heads=1), B)
        return edits.tap(WHERE)("hook_resid_mid", 3, value)

    outside = (steer.floor(SITE, vector, vector[0]), steer.ablate(SITE, plane), steer.add(SITE, vector, 2.0))
    np.testing.assert_allclose(inside(vector, plane, value), apply(Edits(outside), value), atol=1e-5)


V = np.ones(D)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: steer.add("block.3.hook_resid_mid", V), "not the name of a site"),
        (lambda: steer.add("blocks.*.hook_nothing", V), "names no place"),
        (lambda: steer.add("blocks.-1.hook_resid_mid", V), "parse_site"),
        (lambda: steer.add([SITE, "blocks.3.hook_resid_pre"], V), "one kind of site, once per layer"),
        (lambda: steer.add([SITE, SITE], V), "once per layer"),
        (lambda: steer.add(["blocks.*.hook_resid_mid", SITE], V), "once per layer"),
        (lambda: steer.add(SITE, np.zeros(D)), "is zero"),
        (lambda: steer.add(SITE, [1.0, np.nan, np.inf]), "2 entries that are NaN or infinite"),
        (lambda: steer.add(SITE, V, np.nan), "coefficient has 1 entries that are NaN"),
        (lambda: steer.add(SITE, V, np.inf), "coefficient"),
        (lambda: steer.add(SITE, V, [1.0, 2.0]), r"each of 1 sites, got shape \[2\].*stack_rows"),
        (lambda: steer.add(SITE, V, mean_norm=0.0), "mean_norm must be greater than 0"),
        (lambda: steer.add(SITE, np.ones((2, D))), r"has the shape \[width\]; got \[2, 6\]"),
        (lambda: steer.add([SITE], np.ones((2, D))), r"1 sites.*\[2, 6\]"),
        (lambda: steer.add("blocks.1.attn.hook_z", V), r"\[heads, H\]"),
        (lambda: steer.add("blocks.1.attn.hook_z", np.ones((4, 8)), head=1), r"has the shape \[H\]"),
        (lambda: steer.add(SITE, V, head=1), "no heads at hook_resid_mid"),
        (lambda: steer.scale("blocks.1.attn.hook_z", 0.0, head=-1), "count from 0"),
        (lambda: steer.ablate(SITE, np.ones((2, D))), "linearly dependent"),
        (lambda: steer.ablate(SITE, np.stack([V, 0 * V])), "is zero"),
        (lambda: steer.clamp("blocks.1.attn.hook_pattern", V, 1.0), "only scale and replace"),
        (lambda: steer.replace("blocks.*.hook_resid_mid", np.ones((T, D))), "one replace per layer"),
        (lambda: steer.replace(SITE, V), r"2 or 3 axes.*got shape \[6\]"),
        (lambda: steer.replace(SITE, np.ones((B, T, D)), mask=np.ones((B, 9))), r"mask has shape \[2, 9\].*\[2, 5\]"),
        (lambda: steer.stack_rows([]), "at least one row"),
        (lambda: steer.stack_rows([steer.replace(SITE, np.ones((B, T, D)))]), "for 2 rows already"),
    ],
)
def test_constructors_refuse(make: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()


MODEL = random_model(tiny_config())
WIDE = np.ones(MODEL.config.d_model)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        (steer.add("blocks.0.hook_resid_mid", V), r"6 components.*\[24\]"),
        (steer.add("blocks.0.mlp.hook_pre", WIDE), r"24 components.*\[40\]"),
        (steer.add("blocks.0.attn.hook_k", np.ones((4, 8))), r"32 components.*\[2, 8\]"),
        (steer.add("blocks.3.hook_resid_mid", WIDE), "names layer 3.*layers 0 to 2"),
        (steer.scale("blocks.0.attn.hook_v", 0.0, head=2), "names head 2.*heads 0 to 1"),
        (steer.stack_rows([steer.add("blocks.0.hook_resid_mid", WIDE, c) for c in (1.0, 2, 3)]), "3 rows.*batch has 2"),
        (
            Edits(
                (steer.floor("blocks.*.hook_resid_mid", WIDE, 2.0), steer.ceiling("blocks.*.hook_resid_mid", WIDE, 1))
            ),
            "floor 2 lies above the ceiling 1",
        ),
        (Edits(steer.add("blocks.0.hook_resid_mid", WIDE)), r"takes a tuple.*Edits\(\(edit,\)\)"),  # type: ignore
        (Edits((steer.add,)), "must be an Intervention"),  # type: ignore
    ],
)
def test_edits_that_do_not_fit_are_refused_before_anything_compiles(
    edits: Edit | Edits, says: str, compile_counter: Any
) -> None:
    with compile_counter() as count, pytest.raises(UserError, match=says):
        jaxsteer.logits(MODEL, np.zeros((B, 19), int), edits=edits)
    with pytest.raises(UserError, match=says):
        jaxsteer.capture(MODEL, np.zeros((B, 19), int), ["blocks.0.hook_resid_pre"], edits=edits)
    assert count["_run"] == 0


def test_lengths_and_rows_are_checked() -> None:
    with pytest.raises(UserError, match=r"prompt_length.*2 rows, got shape \[3\]"):
        jaxsteer.logits(MODEL, np.zeros((B, T), int), prompt_length=np.ones(3, int))
    with pytest.raises(UserError, match="for 3 rows, but the batch has 2"):
        steer.replace(SITE, np.ones((3, T, D))).tap(WHERE)
    with pytest.raises(UserError, match="different numbers of rows: 2, 3"):
        Edits((steer.replace(SITE, np.ones((3, T, D))), steer.replace(SITE, np.ones((2, T, D))))).tap(WHERE)
