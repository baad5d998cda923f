"""Slopes of propensity: planted lines, questions that move the other way, and what cannot be fitted."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.evals.choice import choice_eval
from jaxsteer.evals.steerability import STRENGTHS, propensities, steer_each, steerability
from jaxsteer.personas import load_persona
from jaxsteer.steer import add
from tests.helpers.tiny import tiny_model


def test_planted_slopes_come_back() -> None:
    slopes = np.asarray([2.0, 1.0, 3.0, -0.5])
    x = np.asarray(STRENGTHS)
    found = steerability(x[:, None] * slopes + [0.1, -4.0, 0.0, 2.0], STRENGTHS)
    assert found.slope.value == pytest.approx(slopes.mean()) and found.n == 4
    assert found.spread == pytest.approx(slopes.std(ddof=1))
    assert found.anti == 0.25 and found.anti_ci95[0] < 0.25 < found.anti_ci95[1]
    assert found.residual == pytest.approx(0, abs=1e-12) and found.monotone == pytest.approx(0.5)
    bent = steerability((x**2)[:, None] * np.ones(3), STRENGTHS)
    assert bent.slope.value == pytest.approx(0) and bent.residual > 0.5
    away = steerability(-x[:, None] * np.asarray([2.0, 1.0, -3.5, 3.0]), STRENGTHS)
    assert away.slope.value < 0 and away.anti == 0.25
    assert type(found).from_json(found.to_json()) == found


@pytest.mark.parametrize("margins", [np.ones((7, 1)), np.full((7, 3), np.nan), np.ones((6, 3))])
def test_what_cannot_be_fitted_is_refused(margins: np.ndarray) -> None:
    with pytest.raises(UserError, match="2 or more questions under 3 or more strengths"):
        steerability(margins, STRENGTHS)


def test_questions_are_the_unit_and_strength_0_is_the_model_as_it_is() -> None:
    model, items = tiny_model(), load_persona("sycophancy").items[:5]
    vector = np.random.default_rng(0).standard_normal(model.config.d_model)
    edits = [add("blocks.1.hook_resid_post", vector, c) for c in (-1.0, 0.0, 1.0)]
    margins = steer_each(model, items, edits, ("", " Please."))
    assert margins.shape == (2, 3, len({item.group for item in items}))
    plain, groups = propensities(choice_eval(model, items, ("", " Please.")))
    np.testing.assert_allclose(margins[:, 1], plain, atol=1e-4)
    (whole,) = choice_eval(model, items, "")
    first = np.asarray(whole.groups) == groups[0]
    assert plain[0, 0] == pytest.approx(whole.margin[first].mean(), abs=1e-5)
    assert np.abs(margins[:, 2] - margins[:, 0]).max() > 1e-2
