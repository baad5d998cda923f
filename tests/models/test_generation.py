"""Decoding with a cache gives what running the whole text again gives, however the rows are packed."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import jaxsteer
from jaxsteer.evals.scoring import Text, score_texts
from jaxsteer.models import generation
from jaxsteer.models.decoding import Batch
from jaxsteer.models.generation import NO_TOKEN, generate_tokens
from jaxsteer.models.model import Model
from jaxsteer.models.sampling import Decoding, Sampling, _keep_largest, choose, make_sampling, of_rows
from jaxsteer.models.sharding import make_mesh, shard_params
from jaxsteer.models.taps import Intervention, Tap, Where
from tests.helpers.checkpoints import FAMILIES, WINDOW, family_config, random_model

VOCAB = 67
LENGTHS = (5, 14, 9)
PROMPTS = [np.random.default_rng(n).integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]
PROMPTS += [PROMPTS[0]]
NEW = 24


def run(model: Model, prompts: list[np.ndarray] = PROMPTS, *, new: int = NEW, **options: object) -> np.ndarray:
    """Tokens (B, ``new``) of all rows in their order."""
    names = ("samples", "edits", "every", "batch", "end")
    rest = {name: options.pop(name) for name in names if name in options}
    rows = {}
    for progress in generate_tokens(model, prompts, Decoding(max_new_tokens=new, **options), **rest):
        rows |= dict(zip(progress.rows.tolist(), progress.tokens, strict=True))
    tokens = np.full((len(rows), new), NO_TOKEN)
    for row, made in rows.items():
        tokens[row, : min(new, len(made))] = made[:new]
    return tokens


def next_logits(model: Model, prompts: list[np.ndarray], tokens: np.ndarray, **options: object) -> np.ndarray:
    """Logits (B, M, V) before every decoded token, from running whole texts without a cache, padded on the right."""
    lengths = np.asarray([len(ids) for ids in prompts])
    whole = np.zeros((len(prompts), 64), np.int32)
    mask = np.arange(64) < (lengths + tokens.shape[1])[:, None]
    for row, ids in enumerate(prompts):
        whole[row, : mask[row].sum()] = np.concatenate([ids, tokens[row]])
    logits = np.asarray(jaxsteer.logits(model, whole, mask, prompt_length=lengths, **options))
    return np.stack([logits[row, n - 1 : n - 1 + tokens.shape[1]] for row, n in enumerate(lengths)])


jit_choose = jax.jit(choose)


def chosen(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What ``choose`` takes from logits (B, M, V)."""
    own, first = of_rows(sampling, jnp.arange(len(logits))), jnp.zeros(len(logits), jnp.int32)
    return np.stack([jit_choose(logits[:, i], own, first + i) for i in range(logits.shape[1])], axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoded_tokens_are_those_of_the_whole_text(family: str) -> None:
    """Unequal lengths, a repeated prompt, texts three times as long as the sliding window; drawn and greedy."""
    model = random_model(family_config(family))
    assert min(LENGTHS) + NEW > 3 * WINDOW
    for temperature in (1.0, 0.0):
        tokens = run(model, temperature=temperature, seed=3)
        sampling = make_sampling(model, Decoding(temperature=temperature, seed=3))
        expected = chosen(next_logits(model, PROMPTS, tokens), sampling)
        np.testing.assert_array_equal(tokens, expected)
        if temperature:
            assert len(set(tokens.ravel().tolist())) > 20  # text that a mistake would change


@functools.cache
def gemma() -> Model:
    return random_model(family_config("gemma3"))


def test_packing_pieces_and_neighbours_change_nothing() -> None:
    whole = run(gemma(), seed=5)
    np.testing.assert_array_equal(run(gemma(), seed=5, every=5), whole)
    np.testing.assert_array_equal(run(gemma(), seed=5, batch=2), whole)
    long = [*PROMPTS[:2], np.arange(40, dtype=np.int32)]  # more padding for all, a group for each
    np.testing.assert_array_equal(run(gemma(), long, seed=5)[:2], whole[:2])


def test_samples_differ_and_belong_to_their_row() -> None:
    tokens = run(gemma(), PROMPTS[:2], samples=2)
    assert len({tuple(row) for row in tokens.tolist()}) == 4
    assert (run(gemma(), PROMPTS[:2], samples=2, seed=1) != tokens).any()


def test_room_grows_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(gemma())
    monkeypatch.setattr(generation, "_FIRST_SLOTS", 16)
    np.testing.assert_array_equal(run(gemma()), whole)


def test_a_repeated_prompt_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    start = generation.start

    def spy(params: object, config: object, batch: Batch, *rest: object, **options: object) -> object:
        seen.append((batch.tokens.shape[0], batch.groups.tolist(), batch.rows.tolist()))
        return start(params, config, batch, *rest, **options)

    monkeypatch.setattr(generation, "start", spy)
    run(gemma())
    assert seen.pop() == (3, [0, 0, 1, 2], [0, 3, 2, 1])  # three prompts, one of them continued twice
    run(gemma(), PROMPTS[:2], samples=2)
    assert seen.pop() == (2, [0, 1], [0, 1, 2, 3])  # two groups of two rows: no copies of keys at all


def test_one_program_for_all_settings(compile_counter: type) -> None:
    run(gemma())
    with compile_counter() as count:
        run(gemma(), seed=8, temperature=0.5, top_k=9, top_p=0.8, stop=[3])
        run(gemma(), temperature=0.0, every=7)
        run(gemma(), [*PROMPTS[:2], PROMPTS[2][:7], PROMPTS[1]], new=17)
    assert {"start", "decode", "grow"}.isdisjoint(count.names())


@pytest.mark.parametrize("model_axis", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_eight_devices_give_the_same_tokens(model_axis: int) -> None:
    alone = gemma()
    mesh = make_mesh(model=model_axis)
    spread = dataclasses.replace(alone, mesh=mesh, params=shard_params(alone.params, alone.config, mesh))
    np.testing.assert_array_equal(run(spread, seed=5), run(alone, seed=5))


def test_rows_end_where_the_caller_says() -> None:
    """``end`` is asked every few tokens; what it cuts and when it is asked does not show in other rows."""
    free = run(gemma())
    for every in (1, 5):
        ended = run(gemma(), every=every, end=lambda made: 7 if len(made) >= 7 and made[0] == free[1, 0] else None)
        assert (ended[1] == np.where(np.arange(NEW) < 7, free[1], NO_TOKEN)).all()
        np.testing.assert_array_equal(np.delete(ended, 1, 0), np.delete(free, 1, 0))


def test_rows_end_at_stop_tokens_and_where_positions_end() -> None:
    free = run(gemma())
    ids = [int(free[0, 6]), int(free[2, 3])]
    ended = run(gemma(), stop=ids)
    for row, tokens in enumerate(free):
        n = next((i + 1 for i, token in enumerate(tokens) if token in ids), NEW)
        np.testing.assert_array_equal(ended[row], np.where(np.arange(NEW) < n, tokens, NO_TOKEN))
    assert (ended[2] == NO_TOKEN).any()
    end = gemma().config.max_positions
    steps = [*generate_tokens(gemma(), [np.zeros(end - 3, np.int32)], Decoding(max_new_tokens=NEW))]
    assert steps[-1].length.tolist() == [3]


# Choosing


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities after temperature, top-k and top-p, as transformers applies them."""
    order = np.argsort(-logits)
    p = np.exp((logits - logits.max()) / temperature)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 4, 1.0), (1.5, 0, 0.6), (1.0, 6, 0.8), (1.0, 1, 1.0)]
)
def test_draws_follow_the_reference_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logits = 1.5 * np.random.default_rng(1).standard_normal(12).astype(np.float32)
    n = 4096
    sampling = dataclasses.replace(
        make_sampling(gemma(), Decoding(temperature=temperature, top_k=top_k, top_p=top_p, seed=1)), vocab=10
    )
    drawn = chosen(np.tile(logits, (n, 1, 1)), sampling)[:, 0]
    expected = np.append(reference(logits[:10], temperature, top_k, top_p), [0, 0])  # beyond the tokenizer: never
    found = np.bincount(drawn, minlength=12) / n
    assert not found[expected == 0].any()
    assert (found[expected > 0.01] > 0).all()
    error = (found - expected) / np.sqrt(np.maximum(expected * (1 - expected), 1e-9) / n)
    assert np.abs(error[(expected > 0) & (expected < 1)]).max(initial=0) < 4  # standard errors


def test_as_few_of_the_largest_as_are_enough() -> None:
    logits = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    logits[1] *= 1e20
    logits[2, 30:] = -np.inf
    logits[3, :5] = logits[3].max()  # ties at the threshold stay together
    logits[4, 7], logits[4, 8] = 0.0, -0.0
    for k in (1, 3, 40):
        kept = np.isfinite(_keep_largest(jnp.asarray(logits), lambda mask, k=k: mask.sum(-1) >= k))
        least = -np.sort(-logits, axis=1)[:, k - 1 : k]
        np.testing.assert_array_equal(kept[:4], ((logits >= least) & np.isfinite(logits))[:4])


# Edits


@struct.dataclass
class Push(Intervention):
    """Adds ``vector`` [D] or [B, D] after one block: to everything, or to what stands at or after ``since``."""

    vector: jax.Array
    layer: jax.Array
    response_only: jax.Array
    rows: int | None = struct.field(pytree_node=False, default=None)
    kinds = frozenset({"hook_resid_post"})

    def tap(self, where: Where) -> Tap:
        late = where.positions >= jnp.where(self.response_only, where.prompt_length[:, None], 0)
        amount = jnp.where(late & where.valid, 1.0, 0.0)[..., None] * jnp.atleast_2d(self.vector)[:, None]

        return Tap(self.kinds, lambda kind, layer, value: value + jnp.where(layer == self.layer, amount, 0.0))


def push(seed: int, *, response_only: bool, rows: int | None = None) -> Push:
    d = gemma().config.d_model
    vector = 2 * np.random.default_rng(seed).standard_normal(d if rows is None else (rows, d)).astype(np.float32)
    return Push(jnp.asarray(vector), jnp.int32(seed % 5), jnp.asarray(response_only), rows)


@pytest.mark.parametrize("rows", [None, len(PROMPTS)])
def test_an_edit_applies_at_every_decoded_token(rows: int | None, compile_counter: type) -> None:
    plain = run(gemma(), seed=2)
    for response_only in (False, True):
        edits = push(3, response_only=response_only, rows=rows)
        tokens = run(gemma(), seed=2, edits=edits)
        logits = next_logits(gemma(), PROMPTS, tokens, edits=edits)
        np.testing.assert_array_equal(tokens, chosen(logits, make_sampling(gemma(), Decoding(seed=2))))
        assert (tokens != plain).any()
    with compile_counter() as count:
        other = run(gemma(), seed=2, edits=push(4, response_only=False, rows=rows))
    assert not count.total() and (other != tokens).any()


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    model, end = gemma(), gemma().config.max_positions
    with pytest.raises(jaxsteer.UserError, match=f"Prompt 1 has {end} tokens.*positions end at {end}"):
        run(model, [PROMPTS[0], np.zeros(end, np.int32)])
    with pytest.raises(jaxsteer.UserError, match="Prompt 0 has 0 tokens"):
        run(model, [np.zeros(0, np.int32)])
    with pytest.raises(jaxsteer.UserError, match="lie in 0 ... 66"):
        run(model, [np.asarray([67], np.int32)])
    with pytest.raises(jaxsteer.UserError, match="--max-new-tokens must be at least 1, got 0"):
        run(model, new=0)
    with pytest.raises(jaxsteer.UserError, match="made for 3 rows; 4 prompts x 1 samples are 4"):
        run(model, edits=push(1, response_only=False, rows=3))
    with pytest.raises(jaxsteer.UserError, match="Decoding 1,048,576 rows at a time needs .* choose a smaller batch"):
        run(model, PROMPTS[:1], samples=1 << 20, batch=1 << 20)
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.2}, {"top_k": -1}):
        with pytest.raises(jaxsteer.UserError, match=next(iter(bad)).replace("_", "-")):
            Decoding(**bad)


@pytest.mark.parametrize(("name", "factor"), [("final_norm", jnp.nan), ("embed", 1e25)])
def test_logits_that_are_not_finite_are_an_error_and_no_text(name: str, factor: float) -> None:
    """Also where the norm's squares overflow, which would make every token equally likely."""
    model = gemma()
    params = dataclasses.replace(model.params, **{name: getattr(model.params, name) * factor})
    broken = dataclasses.replace(model, params=params)
    with pytest.raises(jaxsteer.UserError, match="logits are NaN or infinite"):
        run(broken)
    texts = [[Text(context=PROMPTS[0], answers=(np.asarray([1]), np.asarray([2])))]]
    with pytest.raises(jaxsteer.UserError, match="logits are NaN or infinite"):
        score_texts(broken.params, broken.config, texts)


def test_edits_that_break_only_what_is_decoded_are_an_error_too() -> None:
    edits = dataclasses.replace(push(3, response_only=True), vector=jnp.full(gemma().config.d_model, jnp.inf))
    with pytest.raises(jaxsteer.UserError, match="logits are NaN or infinite"):
        run(gemma(), edits=edits)
