"""``run`` and its halves: what they return, what they compute, gradients at every kind of site, and refusals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import jaxsteer
from jaxsteer import UserError, steer
from jaxsteer.models.params import Params
from jaxsteer.models.run import Run, _gradients, _Rows, _run
from jaxsteer.models.sites import KINDS, Site, parse_site
from jaxsteer.models.transformer import unembed
from tests.helpers.checkpoints import family_config, random_model, random_params, tiny_config
from tests.helpers.reference import reference_forward
from tests.steer import plain

CONFIG = tiny_config(n_layers=4)
MODEL = random_model(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9))


def test_every_place_at_several_layers_in_one_call() -> None:
    kinds = [name for name, kind in KINDS.items() if kind.in_block and kind.exists(CONFIG)]
    names = ["hook_embed", *(f"blocks.{i}.{kind}" for i in (0, 2) for kind in kinds), "layers.-1"]
    found = jaxsteer.capture(MODEL, TOKENS, names)
    assert list(found) == names
    _, states = reference_forward(MODEL.params, CONFIG, TOKENS[1])
    np.testing.assert_allclose(found["hook_embed"][1], states[0], atol=1e-5)
    np.testing.assert_allclose(found["blocks.0.hook_resid_pre"][1], states[0], atol=1e-5)
    np.testing.assert_allclose(found["blocks.2.hook_resid_pre"][1], states[2], atol=1e-4)
    np.testing.assert_allclose(found["blocks.2.hook_resid_post"][1], states[3], atol=1e-4)
    np.testing.assert_allclose(found["layers.-1"][1], states[4], atol=1e-4)
    for layer in (0, 2):
        at = {place: np.asarray(found[f"blocks.{layer}.{place}"]) for place in kinds}
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)  # noqa: E731
        close(at["hook_resid_pre"] + at["hook_attn_out"], at["hook_resid_mid"])
        close(at["hook_resid_mid"] + at["hook_mlp_out"], at["hook_resid_post"])
        close(np.einsum("btnh,nhd->btd", at["attn.hook_z"], MODEL.params.layers.o[layer]), at["hook_attn_out"])
        gate = at["mlp.hook_pre"] / (1 + np.exp(-at["mlp.hook_pre"]))
        close(gate * at["mlp.hook_pre_linear"], at["mlp.hook_post"])
        close(at["attn.hook_pattern"].sum(-1), 1)
        values = np.repeat(at["attn.hook_v"], 2, axis=2)
        close(np.einsum("bntu,bunh->btnh", at["attn.hook_pattern"], values), at["attn.hook_z"])
    assert all(value.dtype == np.float32 for value in found.values())
    logits = jax.jit(unembed, static_argnums=1)(MODEL.params, CONFIG, found["layers.-1"])
    np.testing.assert_allclose(logits, jaxsteer.logits(MODEL, TOKENS), atol=1e-5)


def _scan_lengths(*sites: str, to_logits: bool = False) -> list[int]:
    named = tuple(parse_site(name, 4) for name in sites)
    rows = _Rows(jnp.asarray(TOKENS, jnp.int32))
    traced = jax.make_jaxpr(lambda p: _run.__wrapped__(p, CONFIG, rows, sites=named, to_logits=to_logits))(MODEL.params)
    return [equation.params["length"] for equation in traced.jaxpr.eqns if equation.primitive.name == "scan"]


def test_no_layer_above_the_last_site_is_run() -> None:
    assert _scan_lengths("hook_embed") == []
    assert _scan_lengths("blocks.1.hook_resid_post") == [2]
    assert _scan_lengths("blocks.0.attn.hook_z", "blocks.2.hook_resid_mid") == [3]
    assert _scan_lengths("blocks.0.attn.hook_z", to_logits=True) == _scan_lengths("ln_final.hook_scale") == [4]


def test_the_stream_before_a_block_does_not_run_the_block() -> None:
    broken = jax.tree.map(lambda a: a.at[2:].set(np.nan), MODEL.params.layers)
    model = jaxsteer.Model(
        params=MODEL.params.replace(layers=broken), config=CONFIG, tokenizer=None, name="", fingerprint=""
    )
    assert np.isfinite(jaxsteer.capture(model, TOKENS, ["blocks.2.hook_resid_pre"])["blocks.2.hook_resid_pre"]).all()


def test_same_shapes_do_not_compile_again(compile_counter: object) -> None:
    sites = ["blocks.1.hook_resid_post"]
    jaxsteer.logits(MODEL, TOKENS), jaxsteer.capture(MODEL, TOKENS, sites)
    other = jaxsteer.Model(
        params=random_params(CONFIG, 9), config=tiny_config(n_layers=4), tokenizer=None, name="", fingerprint=""
    )
    with compile_counter() as count:
        for model in (MODEL, other):
            jaxsteer.logits(model, TOKENS + 1), jaxsteer.capture(model, TOKENS + 1, sites)
        assert count["_run"] == 0


WEIGHTS = np.random.default_rng(1).standard_normal((9, CONFIG.vocab_size)).astype(np.float32)


@struct.dataclass
class Weighted:
    """A number made of the logits of row 1 and of a state."""

    weights: jax.Array

    def __call__(self, run: Run) -> jax.Array:
        return jnp.sum(run.logits[1] * self.weights)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_at_every_kind_of_site_are_those_of_float64_differences(family: str) -> None:
    """``plain.run`` shares no code with the package: the value at a site is moved a little, and the number measured."""
    config = family_config(family, n_layers=3)
    model, tokens = random_model(config), TOKENS % 67
    sites = {name: Site(1 if kind.in_block else 0, name) for name, kind in KINDS.items() if kind.exists(config)}
    found = jaxsteer.gradients(model, tokens, Weighted(WEIGHTS), sites=[site.name for site in sites.values()])
    states = jaxsteer.capture(model, tokens, list(found.states))
    rng = np.random.default_rng(2)
    for name, state in states.items():
        np.testing.assert_allclose(found.states[name], state, rtol=1e-4, atol=1e-4, err_msg=name)
        slope = np.asarray(found.gradients[name][1], np.float64)
        assert slope.any() and not np.asarray(found.gradients[name][0]).any(), name  # rows do not see each other
        step = rng.standard_normal(slope.shape) + slope / np.linalg.norm(slope)
        step /= np.linalg.norm(step)

        def moved(by: float, site: str = name, step: np.ndarray = step) -> float:
            change = lambda kind, layer, value: value + by * step if Site(layer, kind).name == site else value  # noqa: E731
            return float((plain.run(model.params, config, tokens[1], change)[0] * WEIGHTS).sum())

        expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert abs((slope * step).sum() - expected) < 1e-4 * np.linalg.norm(slope), name


def test_a_run_is_differentiable_inside_jit() -> None:
    vector, at = np.random.default_rng(3).standard_normal(CONFIG.d_model), "blocks.2.hook_resid_post"

    @jax.jit
    def score(params: Params, vector: jax.Array, coefficient: jax.Array, tokens: jax.Array) -> jax.Array:
        edits = steer.add("blocks.0.hook_resid_post", vector, coefficient, positions="response")
        model = dataclasses.replace(MODEL, params=params)
        run = jaxsteer.run(model, tokens, sites=[at, "hook_embed"], edits=edits, prompt_length=jnp.asarray([3, 4]))
        return jnp.sum(run.logits[1] * WEIGHTS) + run.states[at][0, -1, 0] ** 2

    inputs = (MODEL.params, jnp.asarray(vector, jnp.float32), jnp.float32(0.0), jnp.asarray(TOKENS))
    slopes = jax.grad(score, argnums=(0, 1, 2))(*inputs)
    assert float(jnp.abs(slopes[1]).max()) == 0.0  # times the coefficient
    high, low = (score(*inputs[:2], jnp.float32(c), inputs[3]) for c in (1e-2, -1e-2))
    np.testing.assert_allclose(slopes[2], (high - low) / 2e-2, rtol=1e-2)
    bump = MODEL.params.replace(final_norm=MODEL.params.final_norm.at[5].add(1e-2))
    np.testing.assert_allclose(slopes[0].final_norm[5], (score(bump, *inputs[1:]) - score(*inputs)) / 1e-2, rtol=1e-2)


def test_a_run_is_what_its_halves_are_and_wildcards_name_every_layer() -> None:
    sites = ["blocks.*.hook_resid_post", "resid_pre.1", "ln_final.hook_normalized"]
    found, edits = jaxsteer.run(MODEL, TOKENS, sites=sites), steer.scale("ln_final.hook_scale", 2.0)
    assert list(found.states) == [f"blocks.{i}.hook_resid_post" for i in range(4)] + sites[1:]
    np.testing.assert_allclose(found.logits, jaxsteer.logits(MODEL, TOKENS), atol=1e-5)
    for name, state in jaxsteer.capture(MODEL, TOKENS, sites).items():
        np.testing.assert_allclose(state, found.states[name], atol=1e-5)
    halved = jaxsteer.run(MODEL, TOKENS, edits=edits, sites=sites[-1:])
    np.testing.assert_allclose(halved.logits[:, 1:] * 2, found.logits[:, 1:], atol=1e-4)
    np.testing.assert_allclose(halved.states[sites[-1]][:, 1:] * 2, found.states[sites[-1]][:, 1:], atol=1e-4)
    one = jaxsteer.gradients(MODEL, TOKENS, Weighted(WEIGHTS), sites=["blocks.2.hook_mlp_out"])
    every = jaxsteer.gradients(MODEL, TOKENS, Weighted(WEIGHTS), sites=["blocks.*.hook_mlp_out"])
    name = "blocks.2.hook_mlp_out"
    np.testing.assert_allclose(one.gradients[name], every.gradients[name], atol=1e-4)
    np.testing.assert_allclose(one.value, (found.logits[1] * WEIGHTS).sum(), rtol=1e-5)


def test_gradients_compile_once_and_take_memory_for_the_layers_asked_for(
    compile_counter: object,
) -> None:
    with compile_counter() as count:
        for scale in (1.0, 2.0):
            edits = steer.add("blocks.1.hook_resid_mid", np.ones(24), scale)
            jaxsteer.gradients(MODEL, TOKENS, Weighted(scale * WEIGHTS), sites=["blocks.2.attn.hook_z"], edits=edits)
    assert count["_gradients"] == 1
    rows, named = _Rows(jnp.asarray(TOKENS, jnp.int32)), (("z", Site(2, "attn.hook_z")),)
    text = str(
        jax.make_jaxpr(lambda p, m: _gradients(p, CONFIG, rows, m, sites=named))(MODEL.params, Weighted(WEIGHTS))
    )
    z = ",".join(map(str, (2, 9, CONFIG.n_heads, CONFIG.d_head)))
    assert f"f32[1,{z}]" in text and f"f32[4,{z}]" not in text


def test_a_metric_returns_one_float() -> None:
    for metric in (lambda run: run.logits[:, -1, 0], lambda run: run.logits.argmax(-1)[0, 0]):
        with pytest.raises(UserError, match="metric must return one float"):
            jaxsteer.gradients(MODEL, TOKENS, metric, sites=["hook_embed"])


@pytest.mark.parametrize(
    ("tokens", "sites", "says"),
    [
        (TOKENS, ["blocks.4.hook_resid_post"], "beyond the last layer.*4 layers.*0 to 3"),
        (TOKENS, "blocks.1.hook_resid_post", "must be a list"),
        (TOKENS + 60, ["hook_embed"], "0 ... 66"),
        (TOKENS - 9, ["hook_embed"], "0 ... 66"),
        (np.zeros((1, 129), int), ["hook_embed"], "129 tokens.*128"),
    ],
)
def test_bad_input_is_refused(tokens: np.ndarray, sites: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        jaxsteer.capture(MODEL, tokens, sites)
