from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.models import log_probs
from jaxsteer.models.log_probs import entries, label_log_probs
from tests.helpers.tiny import tiny_model


@pytest.mark.parametrize("labels", [[3, 0, 3], [[1, 1], [0, 4], [2, 3]]])
def test_an_entry_and_its_gradient_are_those_of_indexing_without_a_scatter(labels: list) -> None:
    values, index = jnp.arange(15.0).reshape(3, 5), jnp.asarray(labels)

    def taken(pick: Callable) -> Callable:
        return lambda values: jnp.sum(jnp.sin(jax.vmap(pick)(values, index)))

    np.testing.assert_array_equal(jax.vmap(entries)(values, index), jax.vmap(lambda v, i: v[i])(values, index))
    want = jax.grad(taken(lambda v, i: v[i]))(values)
    np.testing.assert_allclose(jax.grad(taken(entries))(values), want, rtol=1e-6)
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(taken(entries)))(values))


def test_chunks_of_rows_change_no_log_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("organism")
    hidden = jax.random.normal(jax.random.key(0), (7, model.config.d_model))
    labels = jnp.arange(14).reshape(7, 2)
    whole = label_log_probs(model.params, model.config, hidden, labels)
    monkeypatch.setattr(log_probs, "VOCABULARY_BLOCK", 3 * model.config.vocab_size)
    np.testing.assert_allclose(label_log_probs(model.params, model.config, hidden, labels), whole, rtol=1e-6)
