"""``logits`` and ``capture``: what they return, what they run, and how they refuse."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError
from jaxsteer.models.capture import _capture
from jaxsteer.models.sites import KINDS, Site
from jaxsteer.models.transformer import unembed
from tests.helpers.checkpoints import random_model, random_params, tiny_config
from tests.helpers.reference import reference_forward

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


def _scan_lengths(*sites: Site) -> list[int]:
    jaxpr = jax.make_jaxpr(lambda p, t: _capture.__wrapped__(p, CONFIG, t, None, None, None, sites=sites))(
        MODEL.params, TOKENS
    )
    return [equation.params["length"] for equation in jaxpr.jaxpr.eqns if equation.primitive.name == "scan"]


def test_no_layer_above_the_last_site_is_run() -> None:
    assert _scan_lengths(Site(0, "hook_embed")) == []
    assert _scan_lengths(Site(1, "hook_resid_post")) == [2]
    assert _scan_lengths(Site(0, "attn.hook_z"), Site(2, "hook_resid_mid")) == [3]


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
        assert count["forward"] == count["_capture"] == 0


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
