"""Divergence and perplexity under edits against a float64 recomputation from the public logits."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jaxtyping import Array, Float, Int

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.evals.side_effects import reply_effects, side_effects
from jaxsteer.models.taps import Intervention, Tap, Where
from jaxsteer.prompts import encode_texts, question_conversation, render
from jaxsteer.steer import add
from tests.helpers.checkpoints import random_model, tiny_config
from tests.helpers.tiny import tiny_model

MODEL = random_model(tiny_config())
TEXTS = [np.random.default_rng(i).integers(0, 67, n).astype(np.int32) for i, n in enumerate((5, 9, 2, 12))]


@struct.dataclass
class Push(Intervention):
    vector: Float[Array, " D"]
    layer: Int[Array, ""]
    kinds = frozenset({"hook_resid_post"})

    def tap(self, where: Where) -> Tap:
        return Tap(self.kinds, lambda kind, layer, value: value + self.vector * (layer == self.layer))


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


def test_replies_are_scored_over_the_same_tokens_with_and_without_a_prompt() -> None:
    """test_defect_28: the reply's tokens, and only those, each after the request with the prompt in its slot."""
    model, prompts = tiny_model(), ["", " be truthful and patient"]
    texts = ["Which do you prefer?", "What is the capital of Fisagal, past the old mill, my friend?"]
    edit = add("blocks.1.hook_resid_post", np.full(32, 0.3), positions="response")
    encode = lambda prompt, text: encode_texts(  # noqa: E731
        model.tokenizer, [render(model.tokenizer, question_conversation(text), prompt)]
    )[0]
    found = reply_effects(model, texts, prompts, max_new_tokens=5, edits=edit)
    none = reply_effects(model, texts, [""], max_new_tokens=5)
    assert none.kl[0] == pytest.approx(0, abs=1e-6) and none.perplexity[0] == pytest.approx(none.baseline_perplexity)
    replies = jaxsteer.generate(model, [encode("", text) for text in texts], temperature=0, max_new_tokens=5).tokens
    for p, prompt in enumerate(prompts):
        kl, nll, base_nll, total = 0.0, 0.0, 0.0, 0
        for text, reply in zip(texts, replies, strict=True):
            rows = []
            for context, edits in ((encode("", text), None), (encode(prompt, text), edit)):
                full = np.zeros((1, 64), np.int32)  # what stands behind a token cannot change it
                full[0, : len(context) + len(reply)] = np.concatenate([context, reply])
                logits = jaxsteer.logits(model, full, edits=edits, prompt_length=np.array([len(context)]))
                logits = np.asarray(logits, np.float64)[0, len(context) - 1 : len(context) - 1 + len(reply)]
                rows.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
            base, changed = rows
            kl += (np.exp(base) * (base - changed)).sum()
            nll -= changed[np.arange(len(reply)), reply].sum()
            base_nll -= base[np.arange(len(reply)), reply].sum()
            total += len(reply)
        assert found.tokens == total
        assert found.kl[p] == pytest.approx(kl / total, abs=1e-5) and found.kl[p] > 1e-3
        assert found.perplexity[p] == pytest.approx(np.exp(nll / total), rel=1e-4)
        assert found.baseline_perplexity == pytest.approx(np.exp(base_nll / total), rel=1e-4)
