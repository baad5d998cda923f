"""Edits behind a gate: what opens it against float64 NumPy, what a closed one leaves alone, files, and its tuning."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer import steer
from jaxsteer.errors import UserError
from jaxsteer.evals.refusal import first_tokens
from jaxsteer.evals.scoring import Text, score_texts
from jaxsteer.evals.side_effects import side_effects
from jaxsteer.models.padding import pad_rows
from jaxsteer.models.sites import resid_site
from jaxsteer.models.taps import make_where
from jaxsteer.steer.vectors import Vectors
from tests.helpers.checkpoints import family_config, random_model
from tests.helpers.tiny import tiny_model
from tests.steer.plain import run

MODEL = random_model(family_config("gemma3", n_layers=3))
CONFIG = MODEL.config
SITE, WHERE = resid_site(2), "blocks.1.hook_resid_mid"
RNG = np.random.default_rng(0)
ROWS = [RNG.integers(1, 67, n).astype(np.int32) for n in (5, 9, 7, 6, 12, 4)]
VECTOR, CONDITION = (RNG.standard_normal(CONFIG.d_model).astype(np.float32) for _ in range(2))
EDIT = steer.add(SITE, VECTOR, 3.0)


def cosines(positions: str) -> np.ndarray:
    """Of every prompt, by its definition."""
    found = []
    for row in ROWS:
        state = run(MODEL.params, CONFIG, row, lambda kind, layer, value: value)[1][WHERE]
        h = state[-1] if positions == "last" else state[1:].mean(0)
        found.append(h @ CONDITION / np.linalg.norm(h) / np.linalg.norm(CONDITION))
    return np.asarray(found)


def gate(positions: str = "prompt", *, sign: int = 1, threshold: float | None = None) -> steer.Gate:
    """One that half of the rows open."""
    middle = float(np.median(cosines(positions))) if threshold is None else threshold
    return steer.Gate(site=WHERE, vector=CONDITION, threshold=middle, sign=sign, positions=positions)


def logits(edits: Any, *, left: bool = False) -> list[np.ndarray]:
    """Of each row alone, without its padding."""
    tokens, mask = pad_rows(ROWS, left=left)
    found = np.asarray(jaxsteer.logits(MODEL, tokens, mask, edits=edits))
    return [row[kept] for row, kept in zip(found, mask, strict=True)]


@pytest.mark.parametrize(("positions", "sign", "left"), [("prompt", 1, False), ("last", -1, True)])
def test_rows_are_steered_whose_prompts_open_the_gate(positions: str, sign: int, left: bool) -> None:
    chosen = gate(positions, sign=sign)
    open = sign * (cosines(positions) - chosen.threshold) > 0
    assert 0 < open.sum() < len(ROWS)
    steered, plain = logits(EDIT, left=left), logits(None, left=left)
    found = logits(steer.gated(EDIT, chosen), left=left)
    shut = logits(steer.gated(EDIT, gate(positions, threshold=1.0)), left=left)
    for i, opened in enumerate(open):
        np.testing.assert_allclose(found[i], (steered if opened else plain)[i], atol=1e-4)
        assert np.array_equal(found[i], shut[i]) is not opened  # bit for bit, in the same program
    tokens, mask = pad_rows(ROWS, left=left)
    where = make_where(jnp.asarray(tokens), jnp.maximum(jnp.cumsum(mask, -1) - 1, 0), jnp.asarray(mask))
    decided = steer.gated(EDIT, chosen).decided(MODEL.params, CONFIG, where)
    assert (steer.count_positions(decided, tokens, mask) == open * [len(row) - 1 for row in ROWS]).all()


def test_decoding_keeps_what_the_prompt_decided(compile_counter: Any) -> None:
    """Also where the tokens that follow would decide otherwise, in samples that share a prompt, and in batches."""
    options: dict[str, Any] = dict(max_new_tokens=12, temperature=1.0, seed=1, samples=2)
    chosen = gate()
    open = np.repeat(cosines("prompt") > chosen.threshold, 2)
    made = jaxsteer.generate(MODEL, ROWS, edits=steer.gated(EDIT, chosen), **options)
    plain, steered = (jaxsteer.generate(MODEL, ROWS, edits=edits, **options) for edits in (None, EDIT))
    for row, opened in enumerate(open):
        expected = (steered if opened else plain).tokens[row]
        np.testing.assert_array_equal(made.tokens[row], expected)
    assert (plain.tokens != steered.tokens).any(-1)[open].all()
    with compile_counter() as count:  # a value of the threshold is data; a gate that nobody opens runs nothing
        for threshold in (-0.9, 0.0):
            jaxsteer.generate(MODEL, ROWS, edits=steer.gated(EDIT, gate(threshold=threshold)), **options)
        shut = jaxsteer.generate(MODEL, ROWS, edits=steer.gated(EDIT, gate(threshold=1.0)), **options)
    assert count["decide"] + count["decode"] == 0
    few = jaxsteer.generate(MODEL, ROWS, edits=steer.gated(EDIT, chosen), batch=4, **options)
    np.testing.assert_array_equal(shut.tokens, plain.tokens)
    np.testing.assert_array_equal(few.tokens, made.tokens)


def test_answers_and_side_effects_are_scored_behind_it() -> None:
    answers = tuple(np.asarray(ids, np.int32) for ids in ([3, 4], [5]))
    groups = [[Text(context=row, answers=answers)] for row in ROWS]
    chosen = gate("last")
    variants = [steer.gated(EDIT, one) for one in (chosen, gate("last", threshold=1.0), gate("last", threshold=-1.0))]
    mixed, shut, wide = score_texts(MODEL.params, CONFIG, groups, variants=variants)
    open = cosines("last") > chosen.threshold
    np.testing.assert_array_equal(mixed, np.where(open[:, None, None], wide, shut))
    assert (wide != shut).all()
    np.testing.assert_allclose(shut, score_texts(MODEL.params, CONFIG, groups)[0], atol=1e-4)
    (mixed, shut, wide), *_ = first_tokens(MODEL, ROWS, np.asarray([3, 4]), variants)
    np.testing.assert_array_equal(mixed, np.where(open, wide, shut))
    effects = side_effects(MODEL, ROWS, variants)
    assert abs(effects.kl[1]) < 1e-6 < 1e-3 < effects.kl[0] < effects.kl[2]


def test_any_function_of_reads_is_a_gate() -> None:
    sites = [SITE, "blocks.0.attn.hook_z"]

    def long(reads: dict[str, Any]) -> Any:
        assert reads[sites[1]].shape == (len(ROWS), CONFIG.n_heads * CONFIG.d_head)
        return reads[SITE] @ CONDITION > 0

    found = logits(steer.gated(EDIT, long, sites=sites, positions="last"))
    plain, steered = logits(None), logits(EDIT)
    tokens = [run(MODEL.params, CONFIG, row, lambda kind, layer, value: value)[1][SITE][-1] for row in ROWS]
    for i, h in enumerate(tokens):
        np.testing.assert_allclose(found[i], (steered if h @ CONDITION > 0 else plain)[i], atol=1e-4)


def test_a_file_steers_behind_its_gate(tmp_path: Any) -> None:
    chosen = dataclasses.replace(gate("last", sign=-1), accuracy=0.9, interval=(0.7, 1.0), n=20)
    vectors = Vectors(arrays={SITE: VECTOR}, coefficient=3.0, gate=chosen)
    loaded = steer.load_vectors(steer.save_vectors(vectors, tmp_path / "gated.safetensors"), model=MODEL)
    assert loaded.gate is not None and loaded.gate.to_json() == chosen.to_json()
    np.testing.assert_array_equal(loaded.gate.vector, CONDITION)
    for one, other in zip(logits(loaded.edits()), logits(steer.gated(EDIT, chosen)), strict=True):
        np.testing.assert_array_equal(one, other)
    wrong = dataclasses.replace(vectors, gate=dataclasses.replace(chosen, vector=CONDITION[:5]))
    path = steer.save_vectors(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match="5 components.*24"):
        steer.load_vectors(path, model=MODEL)
    with pytest.raises(UserError, match="behind a gate"):
        steer.write_control_vector(vectors, tmp_path / "a.gguf", model_hint="llama")


def test_tuning_finds_the_site_and_the_side() -> None:
    """Prompts that begin with one of two words; what they say then is the same."""
    model = tiny_model()
    rng = np.random.default_rng(3)
    kinds = [[np.r_[1, [word] * 4, rng.integers(20, 90, 6)].astype(np.int32) for _ in range(24)] for word in (300, 301)]
    sites = ["hook_embed", "blocks.1.hook_resid_post"]
    found = steer.tune_gate(model, *kinds, sites)
    assert found.accuracy == 1 and found.interval is not None and 0.6 < found.interval[0] < 1 and found.n == 16
    new = [np.r_[1, [word] * 4, rng.integers(20, 90, 6)].astype(np.int32) for word in (300, 301) * 4]
    edit = steer.gated(steer.add(sites[1], row := np.ones(32), 9.0), found)
    gaps = [abs(np.asarray(jaxsteer.logits(model, ids[None], edits=edit) - jaxsteer.logits(model, ids[None]))).max()
            for ids in new]  # fmt: skip
    assert (np.asarray(gaps[::2]) > 1e-2).all() and max(gaps[1::2]) < 1e-5 and row.any()
    swapped = steer.tune_gate(model, kinds[1], kinds[0], sites)
    assert swapped.accuracy == 1
    same = steer.tune_gate(model, kinds[0], kinds[1], sites, positions="last")
    assert same.accuracy is not None and same.accuracy < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gate(threshold=1.5), "threshold from -1 to 1"),
        (lambda: dataclasses.replace(gate(), vector=np.zeros(24, np.float32)), "not zero"),
        (lambda: dataclasses.replace(gate(), positions="nowhere"), "not known"),
        (lambda: steer.gated(EDIT, lambda reads: None), "name them"),
        (lambda: steer.gated(EDIT, gate(), sites=[SITE]), "belong to a function"),
        (lambda: logits(steer.gated(EDIT, lambda reads: reads[SITE].sum() > 0, sites=SITE)), "each of 6 rows"),
        (lambda: steer.count_positions(steer.gated(EDIT, gate()), ROWS[0][None]), "decided"),
        (lambda: steer.tune_gate(MODEL, ROWS, ROWS[:5], SITE), "at least 6"),
        (lambda: steer.tune_gate(MODEL, [r[:1] for r in ROWS], ROWS, SITE), "prompt 0 has no token"),
        (lambda: steer.tune_gate(MODEL, ROWS[:1] * 6, ROWS[:1] * 6, WHERE), "6 different prompts"),
    ],
)
def test_what_can_be_no_gate_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        (steer.add(SITE, VECTOR, 1e25), "add of 1e.25 at hook_resid_post, layers 2"),
        (
            steer.gated(steer.Edits((EDIT, steer.add(SITE, VECTOR, 1e25))), gate(threshold=-1.0)),
            "add of 3 .*e.25.*gate",
        ),
    ],
)
def test_a_strength_that_is_too_large_is_named(edits: Any, told: str) -> None:
    for run_it in (
        lambda: jaxsteer.generate(MODEL, ROWS, edits=edits, max_new_tokens=12, seed=1, samples=2),
        lambda: score_texts(
            MODEL.params, CONFIG, [[Text(context=ROWS[1], answers=(ROWS[0][:2], ROWS[2][:1]))]], variants=[edits]
        ),
    ):
        with pytest.raises(UserError, match=f"NaN or infinite.*steered by: {told}"):
            run_it()
