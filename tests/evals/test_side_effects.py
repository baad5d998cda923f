"""Divergence and perplexity under edits against a float64 recomputation from the public logits."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jaxtyping import Array, Float, Int

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.evals.side_effects import side_effects
from jaxsteer.models.taps import Tap, Where
from tests.helpers.checkpoints import random_model, tiny_config

MODEL = random_model(tiny_config())
TEXTS = [np.random.default_rng(i).integers(0, 67, n).astype(np.int32) for i, n in enumerate((5, 9, 2, 12))]


@struct.dataclass
class Push:
    vector: Float[Array, " D"]
    layer: Int[Array, ""]

    def tap(self, where: Where) -> Tap:
        def tap(place: str, layer: Array | int, value: Array) -> Array:
            return value + self.vector * (layer == self.layer) if place == "hook_resid_post" else value

        return tap


def push(seed: int, layer: int) -> Push:
    return Push(jnp.asarray(np.random.default_rng(seed).normal(size=24) / 2, jnp.float32), jnp.int32(layer))


def log_probs(text: np.ndarray, edit: Push | None) -> np.ndarray:
    logits = np.asarray(jaxsteer.logits(MODEL, text[None], edits=edit), np.float64)[0]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_agrees_with_the_public_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxsteer.evals.side_effects.LOGITS", 2 * 12 * 67)  # two rows at a time
    edits = [push(0, 1), push(1, 2), Push(jnp.zeros(24), jnp.int32(0))]
    found = side_effects(MODEL, TEXTS, edits)
    n = sum(len(t) for t in TEXTS)
    assert found.tokens == n
    base = [log_probs(t, None) for t in TEXTS]

    def nll(rows: list[np.ndarray]) -> float:
        taken = [r[np.arange(len(t) - 1), t[1:]] for r, t in zip(rows, TEXTS, strict=True)]
        return -sum(x.sum() for x in taken) / (n - len(TEXTS))

    assert found.baseline_perplexity == pytest.approx(np.exp(nll(base)), rel=1e-4)
    for e, edit in enumerate(edits):
        rows = [log_probs(t, edit) for t in TEXTS]
        kl = sum((np.exp(b) * (b - r)).sum() for b, r in zip(base, rows, strict=True)) / n
        assert found.kl[e] == pytest.approx(kl, abs=1e-5)
        assert found.perplexity[e] == pytest.approx(np.exp(nll(rows)), rel=1e-4)
    assert found.kl[0] > 0.01
    assert found.kl[2] == 0


def test_texts_that_cannot_be_scored_are_refused() -> None:
    for texts in ([], [np.array([3])], [np.zeros(129, int)]):
        with pytest.raises(UserError, match="2 to 128 tokens"):
            side_effects(MODEL, texts, [push(0, 0)])
