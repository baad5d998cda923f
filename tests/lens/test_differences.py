"""Two runs side by side: against NumPy, with a prompt, with controls; what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError, lens, steer
from jaxsteer.lens import LensComparison, Side
from jaxsteer.lens.differences import by_ends
from tests.helpers.checkpoints import family_config, random_model
from tests.helpers.tiny import tiny_model

MODEL = random_model(family_config("gemma2", n_layers=3))
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, 67, n) for n in (7, 12)]
PUSH = RNG.standard_normal(24).astype(np.float32)


def test_a_steered_run_beside_a_plain_one() -> None:
    edit = steer.add("blocks.0.hook_resid_post", PUSH, positions="every")
    weak = steer.add("blocks.0.hook_resid_post", PUSH * 1e-3, positions="every")
    found = lens.compare(MODEL, Side(texts=TEXTS, edits=edit, name="pushed"), Side(texts=TEXTS), top=3,
                         controls=[Side(texts=TEXTS, edits=weak, name="weak")])  # fmt: skip
    start = 0
    for number, ids in enumerate(TEXTS):
        pushed, plain = (lens.site_logits(MODEL, ids[None], edits=each) for each in (edit, None))
        here = found.shift.text == number
        assert (found.shift.at[here] == np.arange(len(ids))).all()
        for s, place in enumerate(found.run.places):
            log_p, log_q = (np.asarray(jax.nn.log_softmax(x[place][0]), np.float64) for x in (pushed, plain))
            change = np.exp(log_p) - np.exp(log_q)
            np.testing.assert_allclose(found.shift.kl[s, here], (np.exp(log_p) * (log_p - log_q)).sum(-1), atol=1e-4)
            np.testing.assert_allclose(found.shift.gained[s, here], -np.sort(-change)[:, :3], atol=1e-5)
            np.testing.assert_allclose(found.shift.lost[s, here], np.sort(change)[:, :3], atol=1e-5)
            picked = np.take_along_axis(change, found.shift.gained_ids[s, here], -1)
            np.testing.assert_allclose(picked, found.shift.gained[s, here], atol=1e-5)
        start += len(ids)
    assert found.summary[0].kl == 0.0 and found.summary[-1].kl > 100 * found.summary[-1].controls[0] > 0
    table = found.table()
    assert "KL(pushed || plain)" in table and "weak" in table
    again = LensComparison.from_json(found.to_json())
    assert again.table() == table and found.plot().svg().startswith("<svg") and len(found.to_rows()) == 4


def test_a_prompt_is_laid_alongside() -> None:
    model = tiny_model()
    asked = [{"role": "user", "content": "Which do you prefer?"}]
    prompted = [{"role": "system", "content": "Please be truthful."}, *asked]
    found = lens.compare(model, Side(texts=[prompted], name="prompted"), Side(texts=[asked]), top=2)
    ids, other = found.run.cells.ids, found.base.cells.ids
    at = found.shift.at
    assert (at >= 0).sum() == len(other) and (ids[at >= 0] == other[at[at >= 0]]).all()
    assert np.isnan(found.shift.kl[:, at < 0]).all() and (found.shift.gained_ids[:, at < 0] == -1).all()
    run = jaxsteer.logits(model, ids[None])[0], jaxsteer.logits(model, other[None])[0]
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in run)
    log_p, log_q = log_p[at >= 0], log_q[at[at >= 0]]
    np.testing.assert_allclose(found.shift.kl[-1, at >= 0], (np.exp(log_p) * (log_p - log_q)).sum(-1), atol=1e-4)


@pytest.mark.parametrize(
    ("own", "theirs", "at"),
    [
        ([1, 2, 3], [1, 2, 3], [0, 1, 2]),
        ([1, 9, 9, 2, 3], [1, 2, 3], [0, -1, -1, 1, 2]),
        ([1, 2, 3], [1, 9, 9, 2, 3], [0, 3, 4]),
        ([1, 7, 3], [1, 8, 3], [0, 1, 2]),
        ([4, 5], [6, 7, 8], [-1, -1]),
    ],
)
def test_common_beginnings_and_ends(own: list[int], theirs: list[int], at: list[int]) -> None:
    assert by_ends(np.asarray(own), np.asarray(theirs)).tolist() == at


def test_sides_go_in_pairs() -> None:
    with pytest.raises(UserError, match="texts go in pairs: the sides have 2, 1"):
        lens.compare(MODEL, Side(texts=TEXTS), Side(texts=TEXTS[:1]))
