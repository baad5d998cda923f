"""The archive is the true frontier of everything inserted, as long as it fits."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsteer.prompt_search.pareto import empty_archive, frontier, insert
from jaxsteer.prompt_search.population import State, evict

points = st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 8)), min_size=8, max_size=8)


def brute(f: np.ndarray, x: np.ndarray) -> set[tuple[float, float]]:
    """Value pairs that no other pair beats in one and equals or beats in the other."""
    pairs = set(zip(f.tolist(), x.tolist(), strict=True))
    return {(a, b) for a, b in pairs if not any((c >= a and d <= b) and (c, d) != (a, b) for c, d in pairs)}


@settings(deadline=None, max_examples=60)
@given(points, points)
def test_insert_keeps_exactly_the_frontier(first, second) -> None:
    archive = empty_archive(16, 2)
    seen_f, seen_x = [], []
    for step, batch in enumerate((first, second)):
        f, x = (jnp.asarray(column, jnp.float32) for column in zip(*batch, strict=True))
        ids = jnp.stack([f, x], axis=1).astype(jnp.int32)
        archive = insert(archive, ids, f, x, jnp.int32(step))
        seen_f += f.tolist()
        seen_x += x.tolist()
    kept = np.isfinite(np.asarray(archive.f))
    f, x = np.asarray(archive.f)[kept], np.asarray(archive.x)[kept]
    assert set(zip(f.tolist(), x.tolist(), strict=True)) == brute(np.array(seen_f), np.array(seen_x))
    assert (np.diff(f) < 0).all() and kept[: kept.sum()].all()
    np.testing.assert_array_equal(np.asarray(archive.ids)[kept], np.stack([f, x], axis=1).astype(int))


def test_a_full_archive_keeps_its_ends() -> None:
    f = jnp.linspace(0, 1, 50)
    archive = insert(empty_archive(8, 1), jnp.arange(50)[:, None], f, f**2, jnp.int32(0))
    kept = sorted(np.asarray(archive.ids)[:, 0].tolist())
    assert len(set(kept)) == 8 and kept[0] == 0 and kept[-1] == 49


def test_invalid_candidates_never_enter() -> None:
    f = jnp.asarray([-jnp.inf, 1.0, jnp.nan])
    archive = insert(
        empty_archive(4, 1),
        jnp.arange(3)[:, None],
        jnp.where(jnp.isnan(f), -jnp.inf, f),
        jnp.full(3, 2.0),
        jnp.int32(0),
    )
    assert np.isfinite(np.asarray(archive.f)).sum() == 1


@settings(deadline=None, max_examples=60)
@given(points)
def test_host_frontier(batch) -> None:
    f, x = (np.asarray(column, float) for column in zip(*batch, strict=True))
    chosen = frontier(f, x)
    assert set(zip(f[chosen].tolist(), x[chosen].tolist(), strict=True)) == brute(f, x)


def test_what_a_broken_prompt_pushed_off_comes_back() -> None:
    one = lambda name, f, x: (jnp.full((1, 2), name), jnp.array([f]), jnp.array([x]))  # noqa: E731
    nobody = dict(zip(("ids", "f", "x"), one(9, -jnp.inf, jnp.inf), strict=True))
    none = jnp.zeros(4, bool)
    empty = empty_archive(4, 2)
    state = State(archive=insert(empty, *one(1, 1.0, 2.0), jnp.int32(1)), verified=empty, step=jnp.int32(1), **nobody)
    state = evict(state, jnp.array([False]), none)  # the text of prompt 1 is found to be good
    state = state.replace(archive=insert(state.archive, *one(2, 3.0, 1.0), jnp.int32(2)))
    assert state.archive.ids[0, 0] == 2 and not np.isfinite(state.archive.f[1]), "prompt 2 alone is the frontier"
    state = evict(state, jnp.array([False]), none.at[0].set(True))
    assert state.archive.ids[0, 0] == 1 and state.archive.step[0] == 1
    assert np.isfinite(np.asarray(state.archive.f)).sum() == 1


def test_what_is_in_the_population_comes_back_too() -> None:
    """Found and pushed off the frontier between two checks, but still in a slot of its own."""
    ids, f, x = jnp.array([[1, 1], [2, 2]]), jnp.array([1.0, 3.0]), jnp.array([2.0, 1.0])
    empty = empty_archive(4, 2)
    state = State(ids=ids, f=f, x=x, archive=insert(empty, ids, f, x, jnp.int32(5)), verified=empty, step=jnp.int32(5))
    state = evict(state, jnp.array([False, True]), jnp.zeros(4, bool).at[0].set(True))
    assert state.archive.ids[0, 0] == 1 and np.isneginf(state.f[1])
