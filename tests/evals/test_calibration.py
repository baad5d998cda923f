"""Strengths at equal disturbance: what is asked for is reached, many at once, and what cannot be is named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.evals import side_effects as effects
from jaxsteer.evals.calibration import TOLERANCE, Unreached, approach, calibrate, neutral_rows
from jaxsteer.evals.side_effects import side_effects
from jaxsteer.models.model import Model
from jaxsteer.steer import Vectors
from tests.helpers.tiny import tiny_model

SITE = "blocks.1.hook_resid_post"
TEXTS = ("How do I boil an egg?", "Why does bread rise?", "Name a river.")


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def vectors(model: Model, seed: int, scale: float = 1.0, **fields: object) -> Vectors:
    draw = np.random.default_rng(seed).standard_normal(model.config.d_model) * scale
    return Vectors(arrays={SITE: draw.astype(np.float32)}, mean_resid_norm={SITE: 1.5}, **fields)


@pytest.mark.parametrize("kl", [0.02, 0.3])
def test_the_divergence_that_was_asked_for_is_reached_with_either_sign(model: Model, kl: float) -> None:
    some = [vectors(model, 0), vectors(model, 1, 30.0), vectors(model, 2, coefficient_units="mean_resid_norm")]
    found = calibrate(model, some, kl, signs=(1, -1), texts=TEXTS)
    assert [one.coefficient > 0 for one in found] == [True, False] * 3
    edits = [v.edits(coefficient=c.coefficient) for v, c in zip(np.repeat(some, 2), found, strict=True)]
    measured = side_effects(model, neutral_rows(model, TEXTS), edits)
    np.testing.assert_allclose([one.kl for one in found], measured.kl, rtol=1e-4)
    np.testing.assert_allclose([one.perplexity for one in found], measured.perplexity, rtol=1e-4)
    np.testing.assert_allclose(measured.kl, kl, rtol=TOLERANCE * 1.01)
    assert found[0].coefficient == pytest.approx(calibrate(model, some[0], kl, texts=TEXTS)[0].coefficient, rel=1e-3)


def test_other_strengths_compile_nothing(model: Model) -> None:
    calibrate(model, vectors(model, 3), 0.1, texts=TEXTS)
    before = effects._compare._cache_size()
    calibrate(model, vectors(model, 4, 5.0), 0.05, texts=TEXTS)
    assert effects._compare._cache_size() == before


def test_what_cannot_be_reached_is_named(model: Model) -> None:
    with pytest.raises(UserError, match=f"the vector at {SITE} .* reaches a divergence of 1e\\+09 nats at no strength"):
        calibrate(model, vectors(model, 0), 1e9, texts=TEXTS)
    found = approach(model, [vectors(model, 0), vectors(model, 1, 0.0)], 1e9, signs=(-1,), texts=TEXTS)
    assert [type(one) for one in found] == [Unreached, Unreached] and found[0].coefficient < 0 < found[0].kl
    measured = side_effects(
        model, neutral_rows(model, TEXTS), [vectors(model, 0).edits(coefficient=found[0].coefficient)]
    )
    assert found[0].kl == pytest.approx(measured.kl[0], rel=1e-4)
    assert (found[1].coefficient, found[1].kl) == (0, 0) and "is zero" in found[1].why
    with pytest.raises(UserError, match="is zero"):
        calibrate(model, vectors(model, 1, 0.0), 0.1, texts=TEXTS)
    with pytest.raises(UserError, match="floor has no strength"):
        calibrate(model, dataclasses.replace(vectors(model, 0), operation="floor", values={SITE: 0.0}))
    with pytest.raises(UserError, match="above 0"):
        calibrate(model, vectors(model, 0), 0.0)


def test_vectors_of_another_model_are_refused(model: Model) -> None:
    foreign = dataclasses.replace(vectors(model, 0), model="another", fingerprint="f" * 64)
    with pytest.raises(UserError, match="were made on another .*any_weights=True"):
        calibrate(model, foreign, 0.1, texts=TEXTS)
    (found,) = calibrate(model, foreign, 0.1, texts=TEXTS, any_weights=True)
    assert found == calibrate(model, vectors(model, 0), 0.1, texts=TEXTS)[0]
