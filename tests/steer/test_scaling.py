"""Activation scaling: its loss and gradients against float64 NumPy, what it learns, and its files."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer import steer
from jaxsteer.errors import UserError
from jaxsteer.models.padding import pad_rows
from jaxsteer.models.sites import parse_site
from jaxsteer.steer import scaling as module
from jaxsteer.steer.scaling import Scaling, learn_scaling
from tests.helpers.checkpoints import family_config, random_model
from tests.steer.plain import run

MODEL = random_model(family_config("gemma3", n_layers=3))
SITES = ("blocks.0.attn.hook_z", "blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out")
RNG = np.random.default_rng(0)
ROWS = [RNG.integers(1, 67, n).astype(np.int32) for n in (3, 7, 5, 9)][:2]
WANTED, OTHER = RNG.permutation(67)[:8].reshape(2, 4)[:, :2]
HOW = Scaling(tokens=4, margin=0.7, faithfulness=0.8, minimality=0.03)


def scaled_logits(row: np.ndarray, alphas: dict[str, np.ndarray], coefficient: float) -> np.ndarray:
    """Behind the last token, by definition."""

    def change(kind: str, layer: int, value: np.ndarray) -> np.ndarray:
        for name, numbers in alphas.items():
            site = parse_site(name)
            if (kind, layer) == (site.kind, site.layer):
                value = value.copy()
                for j, alpha in enumerate(numbers[: len(row)]):
                    value[len(row) - 1 - j] *= 1 + coefficient * alpha
        return value

    return run(MODEL.params, MODEL.config, row, change)[0][-1]


def plain_loss(alphas: dict[str, np.ndarray]) -> float:
    total = 0.0
    for row, wanted, other in zip(ROWS, WANTED, OTHER, strict=True):
        rest = [i for i in range(67) if i not in (wanted, other)]
        base = scaled_logits(row, {}, 0)[rest]
        p = np.exp(base - base.max()) / np.exp(base - base.max()).sum()
        for sign in (1, -1):
            logits = scaled_logits(row, alphas, sign)
            total += max(HOW.margin - sign * (logits[wanted] - logits[other]), 0) / 2
            q = np.exp(logits[rest] - logits[rest].max())
            total += HOW.faithfulness * (p * np.log(p / (q / q.sum()))).sum() / 2
    return total / len(ROWS) + HOW.minimality * sum(np.abs(a).sum() for a in alphas.values())


def test_loss_and_gradients_against_float64() -> None:
    alphas = {name: RNG.normal(0, 0.3, 4) for name in SITES}
    tokens, mask = pad_rows(ROWS, 16)
    answers = WANTED.astype(np.int32), OTHER.astype(np.int32)
    data = module._Data(*map(jnp.asarray, (tokens, mask, *answers, np.full(2, 0.5, np.float32))))
    base = module._last_logits(MODEL.params, MODEL.config, data, None)
    sites = tuple(map(parse_site, SITES))
    given = {
        "attn.hook_z": jnp.asarray([alphas[SITES[0]]], jnp.float32),
        "hook_mlp_out": jnp.asarray([alphas[SITES[1]], alphas[SITES[2]]], jnp.float32),
    }

    def loss(alphas: Any) -> Any:
        return module._terms(MODEL.params, data, base, alphas, config=MODEL.config, sites=sites, scaling=HOW)[0]

    value, slopes = jax.value_and_grad(loss)(given)
    assert float(value) == pytest.approx(plain_loss(alphas), rel=1e-4)
    found = dict(zip(SITES, [*np.asarray(slopes["attn.hook_z"]), *np.asarray(slopes["hook_mlp_out"])], strict=True))
    for name, j in zip((*SITES, SITES[0]), (0, 1, 3, 2), strict=True):
        ends = []
        for step in (1e-5, -1e-5):
            moved = {n: a.copy() for n, a in alphas.items()}
            moved[name][j] += step
            ends.append(plain_loss(moved))
        assert found[name][j] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=2e-3, abs=2e-4)


def test_the_sign_chooses_the_answer(tmp_path: Any, compile_counter: Any) -> None:
    told: list[tuple[int, int, float]] = []
    found = learn_scaling(
        MODEL, ROWS, WANTED, OTHER, SITES, progress=lambda *a: told.append(a),
        scaling=Scaling(steps=80, rate=0.1, tokens=3, margin=0.2, faithfulness=0.1, minimality=1e-3),
    )  # fmt: skip
    assert [done for done, _, _ in told] == [20, 40, 60, 80] and told[-1][2] < told[0][2]
    loaded = steer.load_vectors(steer.save_vectors(found, tmp_path / "scale.safetensors"), model=MODEL)
    assert loaded.operation == "scale" and {a.shape for a in loaded.arrays.values()} == {(3,)}
    for row, wanted, other in zip(ROWS, WANTED, OTHER, strict=True):
        for coefficient in (1.0, -1.0):
            edits = loaded.edits(coefficient=coefficient)
            logits = np.asarray(jaxsteer.logits(MODEL, row[None], edits=edits))[0, -1]
            np.testing.assert_allclose(logits, scaled_logits(row, loaded.arrays, coefficient), atol=1e-4)
            assert (logits[wanted] > logits[other]) == (coefficient > 0)
    tokens, mask = pad_rows(ROWS, left=True)
    with compile_counter() as count:
        off = jaxsteer.logits(MODEL, tokens, mask, edits=loaded.edits(coefficient=0.0))
        np.testing.assert_array_equal(off, jaxsteer.logits(MODEL, tokens, mask))
        for coefficient in (0.5, 2.0):
            jaxsteer.logits(MODEL, tokens, mask, edits=loaded.edits(coefficient=coefficient))
    assert count["_run"] <= 2  # without edits and with them
    lengths = [2, 5]
    assert steer.count_positions(loaded.edits(), tokens, mask, prompt_length=np.asarray(lengths)).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: learn_scaling(MODEL, ROWS, WANTED[:1], OTHER[:1], SITES), "one token id of each"),
        (lambda: learn_scaling(MODEL, ROWS, WANTED, WANTED, SITES), "two different token ids"),
        (lambda: learn_scaling(MODEL, ROWS, WANTED, OTHER + 99, SITES), "from 0 to 66"),
        (lambda: learn_scaling(MODEL, ROWS, WANTED, OTHER, SITES, scaling=Scaling(rate=0.0)), "rate"),
        (lambda: steer.scale_prompt(list(SITES[1:]), np.ones((3, 2))), "for 2 sites"),
        (lambda: VECTORS.edits(positions="last"), "takes no positions"),
        (lambda: dataclasses.replace(VECTORS, positions="all"), "takes no positions"),
    ],
)
def test_what_cannot_be_scaled_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


VECTORS = steer.Vectors(arrays={SITES[0]: np.ones(3, np.float32)}, operation="scale")
