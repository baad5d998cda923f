"""Every objective through the search's own scoring, against float64 NumPy on captured values, and its gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.objectives import (
    Attention,
    LogitDifference,
    MatchDistribution,
    Neuron,
    Projection,
    Reads,
    Standardised,
    TargetLogProb,
    needs,
    weighted_sum,
)
from jaxsteer.prompt_search import make_task, rescore
from jaxsteer.prompt_search import score as score_op_by_op
from jaxsteer.prompts import Placement, build_slots, prompt_text, question_conversation, with_target
from jaxsteer.sae import SAE, SAEConfig, latents_objective
from tests.prompt_search.setting import QUESTIONS, random_prompts, setting

STREAM, NEURONS, PATTERN = "blocks.1.hook_resid_post", "blocks.2.mlp.hook_post", "blocks.0.attn.hook_pattern"
D, CONTEXTS = 32, 3
TARGETS = (" (B)", " (A)", " (B) A large reward")
RNG = np.random.default_rng(3)
DELTA = RNG.standard_normal(D).astype(np.float32)
TOKENS = RNG.integers(20, 400, (2, CONTEXTS)).astype(np.int32)


def log_softmax(row: np.ndarray) -> np.ndarray:
    row = row - row.max(-1, keepdims=True)
    return row - np.log(np.exp(row).sum(-1, keepdims=True))


def toy_sae() -> SAE:
    rng = np.random.default_rng(5)
    config = SAEConfig(activation="jumprelu", site_in=STREAM, site_out=STREAM)
    arrays = {
        "W_enc": rng.standard_normal((D, 12)) / 6,
        "W_dec": rng.standard_normal((12, D)),
        "b_enc": rng.standard_normal(12) / 10,
        "b_dec": np.zeros(D),
        "threshold": np.full(12, 0.2),
    }
    return SAE(**{k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}, config=config)


SAE_TOY = toy_sae()
LATENTS, WEIGHTS = np.array([1, 4, 7, 8]), np.array([1.0, -2.0, 0.5, 3.0], np.float32)


def latents_by_hand(r: np.ndarray) -> np.ndarray:
    p = r @ np.asarray(SAE_TOY.W_enc, np.float64)[:, LATENTS] + np.asarray(SAE_TOY.b_enc, np.float64)[LATENTS]
    return np.where(p > 0.2, p, 0.0) @ WEIGHTS


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt in one context as a whole text: captured values by site, in float64, and where things stand."""

    values: dict[str, np.ndarray]
    logits: np.ndarray
    context: int
    read: int
    prompt: slice
    target: np.ndarray
    target_start: int


def distribution(vocab: int) -> np.ndarray:
    logits = np.random.default_rng(8).standard_normal((CONTEXTS, vocab)) * 2
    log_probs = log_softmax(logits)
    log_probs[:, 5] = -np.inf  # impossible tokens are allowed
    return log_softmax(np.where(np.isfinite(log_probs), log_probs, -1e30)).astype(np.float32)


def cosine(r: np.ndarray) -> float:
    return r @ DELTA.astype(np.float64) / np.linalg.norm(r) / np.linalg.norm(DELTA.astype(np.float64))


def zscore(r: np.ndarray) -> float:
    return (r - r.mean()) / (r.std(ddof=1) + 1e-6) @ DELTA.astype(np.float64)


def answer(row: Row) -> np.ndarray:
    at = row.target_start + np.arange(len(row.target))
    return log_softmax(row.logits[at])[np.arange(len(row.target)), row.target]


def divergence(row: Row) -> float:
    target = distribution(row.logits.shape[-1])[row.context].astype(np.float64)
    probs = np.exp(target)
    ratio = np.where(probs > 0, target, 0) - log_softmax(row.logits[row.read])
    return -(probs * ratio).sum()


VOCAB = setting().model.config.vocab_size
TERMS: dict[str, tuple[Callable, Callable[[Row], float]]] = {
    "raw": (Projection(delta=DELTA, site=STREAM), lambda row: row.values[STREAM][row.read] @ DELTA),
    "cosine": (Projection(delta=DELTA, site=STREAM, norm="cosine"), lambda row: cosine(row.values[STREAM][row.read])),
    "zscore": (Projection(delta=DELTA, site=STREAM, norm="zscore"), lambda row: zscore(row.values[STREAM][row.read])),
    "over the prompt": (
        Projection(delta=DELTA, site="blocks.2.hook_resid_pre", norm="cosine", at="prompt"),
        lambda row: cosine(row.values["blocks.2.hook_resid_pre"][row.prompt].mean(0)),
    ),
    "over the tail": (
        Projection(delta=DELTA, site="blocks.0.hook_resid_post", at="tail"),
        lambda row: row.values["blocks.0.hook_resid_post"][row.prompt.stop : row.target_start + 1].mean(0) @ DELTA,
    ),
    "embeddings of the prompt": (
        Projection(delta=DELTA, site="blocks.0.hook_resid_pre", norm="zscore", at="prompt"),
        lambda row: zscore(row.values["blocks.0.hook_resid_pre"][row.prompt].mean(0)),
    ),
    "mlp out": (
        Projection(delta=DELTA, site="blocks.0.hook_mlp_out"),
        lambda row: row.values["blocks.0.hook_mlp_out"][row.read] @ DELTA,
    ),
    "attn out": (
        Projection(delta=DELTA, site="blocks.2.hook_attn_out"),
        lambda row: row.values["blocks.2.hook_attn_out"][row.read] @ DELTA,
    ),
    "latents": (
        latents_objective(SAE_TOY, LATENTS, WEIGHTS, STREAM),
        lambda row: latents_by_hand(row.values[STREAM][row.read]),
    ),
    "latents over the prompt": (
        latents_objective(SAE_TOY, LATENTS, WEIGHTS, STREAM, at="prompt"),
        lambda row: latents_by_hand(row.values[STREAM][row.prompt]).mean(),
    ),
    "target": (TargetLogProb(), lambda row: answer(row).sum()),
    "target per token": (TargetLogProb(per_token=True), lambda row: answer(row).mean()),
    "logit difference": (
        LogitDifference(plus=jnp.asarray(TOKENS[0]), minus=jnp.asarray(TOKENS[1])),
        lambda row: np.subtract(*row.logits[row.read][TOKENS[:, row.context]]),
    ),
    "logit difference, one for all": (
        LogitDifference(plus=jnp.asarray(TOKENS[0, :1]), minus=jnp.asarray(TOKENS[1, :1])),
        lambda row: np.subtract(*row.logits[row.read][TOKENS[:, 0]]),
    ),
    "neuron": (Neuron(index=jnp.int32(17), site=NEURONS), lambda row: row.values[NEURONS][row.read, 17]),
    "neuron over the prompt": (
        Neuron(index=jnp.int32(5), site=NEURONS, at="prompt"),
        lambda row: row.values[NEURONS][row.prompt, 5].mean(),
    ),
    "attention to the prompt": (
        Attention(head=jnp.int32(2), site=PATTERN),
        lambda row: row.values[PATTERN][2, row.read, row.prompt].sum(),
    ),
    "attention to the first token": (
        Attention(head=jnp.int32(1), site=PATTERN, to="first"),
        lambda row: row.values[PATTERN][1, row.read, 0],
    ),
    "attention before": (
        Attention(head=jnp.int32(0), site=PATTERN, to="before"),
        lambda row: row.values[PATTERN][0, row.read, : row.prompt.start].sum(),
    ),
    "attention to the tail": (
        Attention(head=jnp.int32(3), site=PATTERN, to="tail"),
        lambda row: row.values[PATTERN][3, row.read, row.prompt.stop : row.read + 1].sum(),
    ),
    "distribution": (MatchDistribution(log_probs=jnp.asarray(distribution(VOCAB))), divergence),
    "a plain function": (
        lambda reads: reads["blocks.0.hook_resid_mid"][:, 3] ** 2,
        lambda row: row.values["blocks.0.hook_resid_mid"][row.read, 3] ** 2,
    ),
    "standardised": (
        Standardised(objective=Neuron(index=jnp.int32(1), site=STREAM), offset=jnp.float32(2), scale=jnp.float32(4)),
        lambda row: (row.values[STREAM][row.read, 1] - 2) / 4,
    ),
}


@functools.cache
def scored(slot: str) -> SimpleNamespace:
    """All terms as one weighted sum whose weights are data: the search's scoring compiles once for all of them."""
    base = setting()
    model = base.model
    conversations = [question_conversation(q, Placement(slot=slot), alternatives=("(A)", "(B)")) for q in QUESTIONS]
    slots = with_target(model.tokenizer, build_slots(model.tokenizer, conversations, 5), TARGETS)
    total = weighted_sum(*((1.0, term) for term, _ in TERMS.values()))
    wanted = needs(total, model.config)
    task = make_task(model.params, model.config, slots, needs=wanted, allowed=base.allowed, batch=4)
    ids = random_prompts(task, 3)
    made = {"slots": slots, "total": total, "needs": wanted, "task": task, "ids": ids}
    rows = by_hand(model, slots, wanted, ids)
    return SimpleNamespace(model=model, rows=rows, score=jax.jit(score_op_by_op), **made)


def by_hand(model, slots, wanted, ids) -> list[list[Row]]:  # noqa: ANN001
    """Per prompt and context, what ``jaxsteer.capture`` and ``jaxsteer.logits`` see in the whole text."""
    parts = list(zip(slots.before, slots.closing, slots.target, strict=True))
    texts = [np.concatenate([b, row, c, t[:-1]]) for row in np.asarray(ids) for b, c, t in parts]
    width = max(map(len, texts))
    tokens = np.asarray([np.pad(t, (0, width - len(t))) for t in texts], np.int32)
    mask = np.asarray([np.arange(width) < len(t) for t in texts])
    sites = sorted({*wanted.sites, *(site for site, _ in wanted.spans)})
    values = {k: np.asarray(v, np.float64) for k, v in jaxsteer.capture(model, tokens, sites, mask).items()}
    logits = np.asarray(jaxsteer.logits(model, tokens, mask), np.float64)
    out: list[list[Row]] = []
    for n in range(len(texts)):
        before, closing, target = parts[c := n % len(parts)]
        start = len(before)
        row = Row(
            values={k: v[n] for k, v in values.items()},
            logits=logits[n],
            context=c,
            read=start + int(slots.read_index[c]),
            prompt=slice(start, start + slots.length),
            target=target,
            target_start=start + slots.length + len(closing) - 1,
        )
        out = [*out[:-1], [*out[-1], row]] if c else [*out, [row]]
    return out


def alone(s: SimpleNamespace, name: str):  # noqa: ANN202
    """The sum with all weight on one term."""
    weights = np.asarray([other == name for other in TERMS], np.float32)
    return dataclasses.replace(s.total, weights=jnp.asarray(weights))


@pytest.mark.parametrize("slot", ["suffix", "prefix"])
@pytest.mark.parametrize("name", list(TERMS))
def test_scores_equal_float64_recomputation(slot: str, name: str) -> None:
    s = scored(slot)
    f, _ = s.score(s.model.params, s.task, alone(s, name), s.ids)
    want = [np.mean([TERMS[name][1](row) for row in rows]) for rows in s.rows]
    np.testing.assert_allclose(f, want, atol=1e-4, rtol=1e-4)
    assert np.std(want) > 1e-5, "a term that is the same for all prompts tests nothing"


def test_scores_from_text_are_the_same() -> None:
    s = scored("suffix")
    f, _ = s.score(s.model.params, s.task, s.total, s.ids)
    texts = [prompt_text(s.model.tokenizer, row) for row in np.asarray(s.ids)]
    again = rescore(s.model, s.slots, s.total, s.needs, texts)
    np.testing.assert_allclose([r.target for r in again], f, rtol=1e-4, atol=1e-3)


def test_gradients_are_differences() -> None:
    """Along a random change of the prompt's embeddings; the weights of the sum are data, so each term in turn."""
    s = scored("suffix")
    model, task, ids = s.model, s.task, s.ids[:1]
    noise = jax.random.normal(jax.random.key(1), (task.length, model.config.d_model)) * 0.3
    direction = jnp.zeros_like(model.params.embed).at[ids[0]].set(noise)

    @jax.jit
    def slope_and_difference(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        def f(step: jax.Array) -> jax.Array:
            params = dataclasses.replace(model.params, embed=model.params.embed + step * direction)
            return score_op_by_op(params, task, dataclasses.replace(s.total, weights=weights), ids)[0][0]

        steps = jnp.asarray([3e-3, -3e-3])
        return jax.grad(f)(jnp.float32(0)), jnp.diff(jax.lax.map(f, steps[::-1]))[0] / 6e-3

    for number, name in enumerate(TERMS):
        slope, difference = slope_and_difference(jnp.zeros(len(TERMS)).at[number].set(1.0))
        assert float(slope) == pytest.approx(float(difference), rel=5e-3, abs=3e-4), name


def test_sums_differences_and_multiples() -> None:
    a, b = Neuron(index=jnp.int32(0), site=STREAM), Neuron(index=jnp.int32(2), site=STREAM)
    third = lambda reads: reads[STREAM][:, 1]  # noqa: E731
    reads = Reads({STREAM: jnp.asarray([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])})
    for combined, want in (
        (a + b, [101, 202]),
        (a - 0.5 * b, [-49, -98]),
        (-a, [-1, -2]),
        (b - third, [90, 180]),
        (third - b, [-90, -180]),
        (third + b * 2.0, [210, 420]),
        (2.0 * (a - 0.5 * (b - a)), [-97, -194]),
        (weighted_sum((0.5, third), (-1.0, a)), [4, 8]),
    ):
        np.testing.assert_allclose(combined(reads), want, rtol=1e-6)
    flat = 2.0 * (a - 0.5 * (b - a))
    assert len(flat.terms) == 3 and flat.weights.shape == (3,)
    with pytest.raises(UserError, match="not with float"):
        weighted_sum((1.0, a), (1.0, 2.0))


@pytest.mark.parametrize("activation", ["jumprelu", "topk", "gated"])
def test_surrogate_gradients_reach_latents_that_are_off(activation: str) -> None:
    """Scores are exact; gradients are those of the pre-activations, weighted."""
    rng = np.random.default_rng(0)
    gates = {"b_mag": jnp.full(12, 0.3), "mag_scale": jnp.full(12, 1.5), "threshold": None}
    sae = dataclasses.replace(
        SAE_TOY,
        config=dataclasses.replace(SAE_TOY.config, activation=activation, k=2 if activation == "topk" else None),
        **({} if activation == "jumprelu" else gates if activation == "gated" else {"threshold": None}),
    )
    x = jnp.asarray(rng.standard_normal((5, D)), jnp.float32)
    plain = latents_objective(sae, LATENTS, WEIGHTS, STREAM)
    through = latents_objective(sae, LATENTS, WEIGHTS, STREAM, surrogate="preact")
    np.testing.assert_array_equal(plain(Reads({STREAM: x})), through(Reads({STREAM: x})))
    gradient = jax.grad(lambda x: through(Reads({STREAM: x})).sum())(x)
    scale = 1.5 if activation == "gated" else 1.0
    want = scale * np.asarray(sae.W_enc)[:, LATENTS] @ WEIGHTS
    np.testing.assert_allclose(gradient, np.tile(want, (5, 1)), rtol=1e-4, atol=1e-5)
    assert np.abs(gradient - jax.grad(lambda x: plain(Reads({STREAM: x})).sum())(x)).max() > 0.1


def test_wrong_choices_are_refused() -> None:
    config = setting().model.config
    for objective, says in (
        (Projection(delta=DELTA, site=STREAM, norm="l2"), "norm must be one of raw, cosine, zscore"),  # type: ignore[arg-type]
        (Projection(delta=DELTA, site=STREAM, at="suffix"), "there are prompt, tail"),  # type: ignore[arg-type]
        (Projection(delta=DELTA[:5], site=STREAM), "failed when it was traced"),
        (Neuron(index=jnp.int32(0), site=PATTERN), "one vector per token"),
        (
            Neuron(index=jnp.int32(64), site=NEURONS),
            "no entry of blocks.2.mlp.hook_post with number 64: they are 0 to 63",
        ),
        (Attention(head=jnp.int32(-1), site=PATTERN), "no head of blocks.0.attn.hook_pattern with number -1"),
        (LogitDifference(plus=jnp.asarray([3]), minus=jnp.asarray([9999])), "no token id with number 9999"),
        (Attention(head=jnp.int32(0), site=STREAM), "not at 'blocks.1.hook_resid_post'"),
        (Attention(head=jnp.int32(0), site=PATTERN, to="suffix"), "first, before, prompt, tail"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=says):
            needs(objective, config)
