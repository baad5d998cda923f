"""Words of vectors: against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsteer import UserError
from jaxsteer.lens import read_words
from tests.helpers.tiny import tiny_model

RNG = np.random.default_rng(0)


def test_words_are_those_of_the_lens_and_of_the_nearest_columns() -> None:
    model = tiny_model()
    table = np.float64(model.params.unembed)[:, : len(model.tokenizer)]
    vectors = RNG.standard_normal((3, 32)).astype(np.float32)
    found = read_words(model, vectors, ["a", "b", "c"], top=5)
    logits = vectors * np.float64(model.params.final_norm) @ table
    cosines = vectors @ table / np.linalg.norm(vectors, axis=1, keepdims=True) / np.linalg.norm(table, axis=0)
    text = lambda scores: tuple(model.tokenizer.decode([i]) for i in np.argsort(-scores)[:5])  # noqa: E731
    for row in range(3):
        assert found.lens[row] == text(logits[row]) and found.lens_against[row] == text(-logits[row])
        assert found.nearest[row] == text(cosines[row])
        np.testing.assert_allclose(found.cosines[row], np.sort(cosines[row])[::-1][:5], atol=1e-5)
    assert type(found).from_json(found.to_json()) == found and found.table().count("\n") == 4


def test_vectors_of_another_width() -> None:
    with pytest.raises(UserError, match=r"vectors must be \[S, 32\]"):
        read_words(tiny_model(), np.zeros((1, 3), np.float32))
