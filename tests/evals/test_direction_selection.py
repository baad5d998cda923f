"""The direction of refusal among all blocks and tokens, on the organism where it is planted, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.evals.direction_selection import Limits, select_direction
from jaxsteer.evals.refusal import first_tokens, opening_ids, request_rows
from jaxsteer.models.model import Model
from jaxsteer.organisms import persona_world as world
from jaxsteer.personas import mean_difference, text_pairs
from jaxsteer.steer import ablate_everywhere, add

Parts = dict[str, tuple[list[np.ndarray], list[np.ndarray]]]


@pytest.fixture(scope="module")
def model() -> Model:
    return jaxsteer.load("organism:persona")


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return {kind: [r.text for r in world.requests(kind, n=48, split="train")] for kind in ("harmful", "harmless")}


@pytest.fixture(scope="module")
def parts(model: Model, texts: dict[str, list[str]]) -> Parts:
    rows = {kind: request_rows(model, some) for kind, some in texts.items()}
    return {kind: (some[:32], some[32:]) for kind, some in rows.items()}


def test_it_is_found_and_measured_as_it_says(model: Model, texts: dict[str, list[str]], parts: Parts) -> None:
    openings = opening_ids(model, world.REFUSAL_OPENINGS)
    found = select_direction(model, parts["harmful"], parts["harmless"], openings, limits=Limits(kl=0.3, induce=-2.0))
    chosen, (vector,) = found.chosen, found.vectors.arrays.values()
    assert chosen.position == -1 and found.harmful > 2 and found.harmless < -2
    assert chosen.bypass < 1.0 and chosen == found.candidates[0] and not chosen.refused
    assert all(c.refused or c.bypass >= chosen.bypass for c in found.candidates)
    sites = {c.site for c in found.candidates}  # not before block 0, where the template's tokens are the same
    assert sites == {f"blocks.{layer}.hook_resid_pre" for layer in range(1, model.config.n_layers)}
    pairs = text_pairs(model, texts["harmless"][:32], texts["harmful"][:32])
    np.testing.assert_allclose(vector, mean_difference(model, pairs, chosen.site).delta[chosen.site], atol=2e-3)
    harmful, harmless = parts["harmful"][1], parts["harmless"][1]
    taken = first_tokens(model, harmful, openings, [ablate_everywhere(vector)])
    assert taken.log_odds.mean() == pytest.approx(chosen.bypass, abs=1e-3)
    assert first_tokens(model, harmless, openings, [ablate_everywhere(vector)]).kl.mean() == pytest.approx(
        chosen.kl, abs=1e-4
    )
    added = first_tokens(model, harmless, openings, [add(chosen.site, vector)])
    assert added.log_odds.mean() == pytest.approx(chosen.induce, abs=1e-3)
    random = np.random.default_rng(0).standard_normal(len(vector)).astype(np.float32)
    random *= np.linalg.norm(vector) / np.linalg.norm(random)
    control = first_tokens(model, harmful, openings, [ablate_everywhere(random)]).log_odds.mean()
    assert control > found.harmful - 1.0
    assert "may be chosen" in found.table() and found.to_json()["candidates"][0]["site"] == chosen.site


def test_what_cannot_be_chosen_is_refused(model: Model, parts: Parts) -> None:
    openings = opening_ids(model, world.REFUSAL_OPENINGS)
    harmful, harmless = parts["harmful"], parts["harmless"]
    with pytest.raises(UserError, match="no candidate of .* is a direction of refusal: blocks"):
        select_direction(model, harmful, harmless, openings, positions=[-1], limits=Limits(kl=1e-9))
    with pytest.raises(UserError, match="give 2 or more of each"):
        select_direction(model, (harmful[0], harmful[1][:1]), harmless, openings)
    with pytest.raises(UserError, match="counted from the end"):
        select_direction(model, harmful, harmless, openings, positions=[0])
    for positions in ([-1], None):  # means of the same rows in another order differ by rounding
        with pytest.raises(UserError, match="the same means"):
            select_direction(model, harmful, (harmful[0][::-1], harmful[1]), openings, positions=positions)
    with pytest.raises(UserError, match="openings must be token ids"):
        select_direction(model, harmful, harmless, np.asarray([10**9]))
