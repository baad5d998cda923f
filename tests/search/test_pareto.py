"""The archive is the true frontier of everything inserted, as long as it fits."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsteer.search.pareto import empty_archive, frontier, insert

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
