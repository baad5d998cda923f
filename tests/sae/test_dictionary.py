"""The pytree itself: subsets, gradients, rewritings, dtypes, shardings, and what belongs together."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer import UserError, make_mesh
from jaxsteer.files.sae_form import Dictionary, Matrix, SAEConfig, canonical, drop_b_dec, unit_decoder
from jaxsteer.models.model import Model
from jaxsteer.sae import (  # fmt: skip
    SAE,
    check_health,
    check_sae,
    decode,
    encode,
    fidelity,
    load_sae,
    reconstruct,
    save_sae,
    shard_sae,
    subset,
)
from jaxsteer.sae.loading import same_model, to_device, to_host
from tests.helpers.tiny import tiny_model
from tests.sae.layouts import D, F, K, weights

SITE = "blocks.1.hook_resid_post"
ACTIVATIONS = ("relu", "jumprelu", "gated", "topk", "abstopk", "groupmax", "matching_pursuit")


def host(activation: str, seed: int = 0, **config: Any) -> Dictionary:
    """A random SAE on the host."""
    w = weights(seed)
    k = {"topk": K, "abstopk": K, "groupmax": 4}.get(activation)
    gated = {"b_mag": w["extra"], "mag_scale": np.exp(w["scale"])} if activation == "gated" else {}
    decoder = Matrix(w["W_dec"] / np.linalg.norm(w["W_dec"], axis=1, keepdims=True))
    pursuit = activation == "matching_pursuit"
    return Dictionary(
        config=SAEConfig(activation=activation, k=k, site_in=SITE, **config),  # type: ignore[arg-type]
        W_enc=Matrix(decoder.stored, transposed=True) if pursuit else Matrix(w["W_enc"]),
        W_dec=decoder if pursuit else Matrix(w["W_dec"]),
        b_enc=np.zeros(F) if pursuit else w["b_enc"],
        b_dec=w["b_dec"],
        threshold=w["threshold"] if activation == "jumprelu" else None,
        **gated,
    )


def made(activation: str, **config: Any) -> SAE:
    return to_device(host(activation, **config), dtype=jnp.dtype("float32"))


@pytest.fixture
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).standard_normal((6, D)), jnp.float32)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Everything that a jaxpr computes, inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                yield from equations(inner)


def widths(jaxpr: Any) -> set[int]:
    """The sizes of all axes of everything that a jaxpr computes."""
    return {size for equation in equations(jaxpr) for value in equation.outvars for size in value.aval.shape}


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "gated"])
def test_a_subset_never_computes_the_other_latents(activation: str, x: jax.Array):
    sae, some = made(activation, subtract_b_dec=True), jnp.asarray([7, 2, 19])
    jaxpr = jax.make_jaxpr(encode)(sae, x, some).jaxpr
    assert F not in widths(jaxpr)
    assert F in widths(jax.make_jaxpr(encode)(sae, x).jaxpr)
    np.testing.assert_allclose(encode(sae, x, some), encode(sae, x)[:, some], atol=1e-6)
    small = subset(sae, some)
    np.testing.assert_allclose(decode(small, encode(small, x)), decode(sae, encode(sae, x, some), some), atol=1e-5)


def test_latents_that_compete_have_no_subset(x: jax.Array):
    sae = made("topk")
    with pytest.raises(UserError, match="compete"):
        subset(sae, jnp.asarray([1]))
    np.testing.assert_array_equal(encode(sae, x, jnp.arange(4)), encode(sae, x)[:, :4])
    assert (np.count_nonzero(encode(sae, x), axis=1) <= K).all()


@pytest.mark.parametrize("activation", ACTIVATIONS[:-1])
def test_gradients_are_those_of_the_active_latents(activation: str, x: jax.Array):
    """Against central differences in the direction of a random vector, where no latent switches."""
    sae = made(activation, input_norm="layer_norm" if activation == "relu" else "none")
    direction = jax.random.normal(jax.random.key(1), x.shape)
    weight = jax.random.normal(jax.random.key(2), (F,))

    @jax.jit
    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def score(x: jax.Array) -> jax.Array:
            return (encode(sae, x) * weight).sum(-1)

        (value, back) = jax.vjp(score, x)
        return value, (back(jnp.ones_like(value))[0] * direction).sum(-1)

    h = 1e-2
    high, low = both(x + h * direction)[0], both(x - h * direction)[0]
    same = ((encode(sae, x + h * direction) != 0) == (encode(sae, x - h * direction) != 0)).all(-1)
    slope = both(x)[1]
    assert int(same.sum()) >= 2
    np.testing.assert_allclose(slope[same], ((high - low) / (2 * h))[same], rtol=0.02, atol=2e-2)


def test_no_gradient_reaches_latents_that_are_off(x: jax.Array):
    sae = made("jumprelu")
    off = int(np.flatnonzero(~np.asarray(encode(sae, x)[0] != 0))[0])
    assert not jnp.any(jax.grad(lambda x: encode(sae, x)[0, off])(x))


# Rewritings

numbers = st.floats(0.05, 20.0)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    activation=st.sampled_from(ACTIVATIONS[:-1]), s=numbers, s_out=numbers, subtract=st.booleans(),
    seed=st.integers(0, 1000), norm=st.sampled_from(["none", "constant_norm", "layer_norm"]),
)  # fmt: skip
def test_rewritings_are_identities(activation: str, s: float, s_out: float, subtract: bool, seed: int, norm: str):
    """Latents and outputs in float64 before and after, by formulas written here."""
    d = host(activation, seed, input_scale=s, output_scale=s_out, subtract_b_dec=subtract, input_norm=norm)
    x = np.random.default_rng(seed).standard_normal((3, D))
    before, after = reference(d, x), reference(canonical(d), x)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)
    assert canonical(d).config.input_scale == 1 and not canonical(d).config.subtract_b_dec
    if activation in ("relu", "jumprelu", "gated"):
        folded = unit_decoder(canonical(d))
        f, y = reference(folded, x)
        norms = canonical(d).W_dec.row_norms()
        np.testing.assert_allclose(f, before[0] * norms, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(y, before[1], rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(folded.W_dec.row_norms(), 1.0, rtol=1e-12)
        assert folded.config.latent_units == "unit decoder"


def reference(d: Dictionary, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents and output in float64."""
    c = d.config
    shift, scale = np.zeros((len(x), 1)), np.ones((len(x), 1))
    if c.input_norm == "constant_norm":
        scale = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(D)
    if c.input_norm == "layer_norm":
        shift, scale = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
    v = (x - shift) / (scale + (1e-5 if c.input_norm == "layer_norm" else 0)) * c.input_scale
    g = (v - d.b_dec * c.subtract_b_dec) @ d.W_enc.read()
    p = g + d.b_enc
    order = np.argsort(-(np.abs(p) if c.activation == "abstopk" else p), axis=1)
    if c.activation == "relu":
        f = np.maximum(p, 0)
    elif c.activation == "jumprelu":
        f = np.maximum(p, 0) * (p > d.threshold)
    elif c.activation == "gated":
        f = (p > 0) * np.maximum(g * d.mag_scale + d.b_mag, 0)
    elif c.activation == "groupmax":
        blocks = np.maximum(p, 0).reshape(len(x), c.k, -1)
        f = np.where(blocks == blocks.max(-1, keepdims=True), blocks, 0).reshape(len(x), -1)
    else:
        f = np.zeros_like(p)
        np.put_along_axis(f, order[:, : c.k], np.take_along_axis(p, order[:, : c.k], 1), 1)
        f = f if c.activation == "abstopk" else np.maximum(f, 0)
    y = (f @ d.W_dec.read() + d.b_dec) / c.output_scale
    return f, y * scale + shift


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_config_that_is_not_folded_computes_the_same(activation: str, x: jax.Array):
    pursuit = activation == "matching_pursuit"
    scales = {} if pursuit else {"input_scale": 0.5, "output_scale": 0.25}
    d = host(activation, subtract_b_dec=True, **scales)
    raw, folded = (to_device(e, dtype=jnp.dtype("float32")) for e in (d, canonical(d)))
    assert raw.config.subtract_b_dec and folded.config.subtract_b_dec == pursuit
    np.testing.assert_allclose(encode(raw, x), encode(folded, x), atol=1e-5)
    np.testing.assert_allclose(reconstruct(raw, x), reconstruct(folded, x), atol=1e-4)


def test_matrices_read_by_parts_as_they_would_whole():
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((5, 7)).astype(np.float32)
    matrix = (
        Matrix(stored, transposed=True).scaled(rows=rng.uniform(1, 2, 7)).scaled(rows=2.0, columns=rng.uniform(1, 2, 5))
    )
    whole = stored.astype(np.float64).T * matrix.rows[:, None] * matrix.columns
    np.testing.assert_array_equal(matrix.read(), whole)
    np.testing.assert_array_equal(matrix.read(slice(2, 6), slice(1, 4)), whole[2:6, 1:4])
    np.testing.assert_allclose(matrix.before(np.ones(7)), whole.sum(0))
    np.testing.assert_allclose(matrix.row_norms(), np.linalg.norm(whole, axis=1))
    assert matrix.read(dtype=np.float32).dtype == np.float32


def test_folds_that_would_change_the_answer_are_refused():
    with pytest.raises(UserError, match="which latents win"):
        unit_decoder(host("topk"))
    with pytest.raises(UserError, match="matching pursuit"):
        canonical(host("matching_pursuit", input_scale=2.0))
    with pytest.raises(UserError, match="finite number above 0"):
        canonical(host("relu", input_scale=-1.0))
    with pytest.raises(UserError, match="needs k"):
        SAEConfig(activation="topk")
    d = host("relu")
    with pytest.raises(UserError, match=r"W_enc \(24, 8\), not \(24, 24\)|W_enc \(24, 8\)"):
        dataclasses.replace(d, W_enc=Matrix(d.W_enc.stored.T))
    with pytest.raises(UserError, match="arrays are not those"):
        dataclasses.replace(d, threshold=np.ones(F))
    with pytest.raises(UserError, match="k=50 does not go"):
        d.replace(activation="topk", k=50)
    assert drop_b_dec(d) is d


# Arithmetic


def test_thresholds_are_compared_in_float32_whatever_the_weights(x: jax.Array):
    """A pre-activation just above its threshold, which bfloat16 would round onto it."""
    base = made("jumprelu")
    p = jnp.asarray(1.0 + 2.0**-10, jnp.float32)
    assert p.astype(jnp.bfloat16) == 1.0
    half = dataclasses.replace(
        base,
        W_enc=jnp.zeros((D, F), jnp.bfloat16).at[0].set(1.0).at[1].set(2.0**-10),
        W_dec=base.W_dec.astype(jnp.bfloat16),
        b_enc=jnp.zeros(F),
        threshold=jnp.ones(F),
    )
    ones = jnp.ones((2, D), jnp.bfloat16)
    for given in (ones, ones.astype(jnp.float32)):
        f = encode(half, given)
        assert f.dtype == jnp.float32
        np.testing.assert_array_equal(f, p)
    fine = ones.astype(jnp.float32).at[:, 1].set(0.0).at[:, 0].set(p)  # an input that bfloat16 cannot hold
    np.testing.assert_array_equal(encode(half, fine), p)
    assert decode(half, encode(half, ones)).dtype == jnp.float32
    products = [e for e in equations(jax.make_jaxpr(encode)(base, x).jaxpr) if e.primitive.name == "dot_general"]
    assert products and all("HIGHEST" in str(e.params["precision"]) for e in products)


def test_dtype_is_that_of_the_matrices_and_vectors_stay_float32(tmp_path):
    save_sae(made("jumprelu"), tmp_path / "sae")
    sae = load_sae(tmp_path / "sae", dtype="bfloat16")
    assert sae.W_enc.dtype == sae.W_dec.dtype == jnp.bfloat16
    assert sae.b_enc.dtype == sae.b_dec.dtype == sae.threshold.dtype == jnp.float32
    save_sae(sae, tmp_path / "half", dtype="bfloat16")
    again = load_sae(tmp_path / "half", dtype="bfloat16")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), sae, again))
    with pytest.raises(UserError, match="'int8' is not supported"):
        load_sae(tmp_path / "sae", dtype="int8")
    with pytest.raises(UserError, match="not supported"):
        save_sae(sae, tmp_path / "other", dtype="int8")


def test_heads_are_flattened_at_hook_z_only(x: jax.Array):
    sae = made("relu")
    with pytest.raises(UserError, match=r"width 8, and was given 4 \(shape \(6, 2, 4\)\)"):
        encode(sae, x.reshape(6, 2, 4))
    z = dataclasses.replace(sae, config=dataclasses.replace(sae.config, site_in="blocks.1.attn.hook_z"))
    np.testing.assert_array_equal(encode(z, x.reshape(6, 2, 4)), encode(sae, x))
    np.testing.assert_array_equal(reconstruct(z, x.reshape(2, 3, 2, 4)).reshape(6, D), reconstruct(sae, x))


def test_decode_says_what_it_needs(x: jax.Array):
    sae = made("relu", input_norm="layer_norm")
    with pytest.raises(UserError, match="normalises every row"):
        decode(sae, encode(sae, x))
    with pytest.raises(UserError, match="given 3 latents"):
        decode(sae, jnp.ones((2, 3)), x=x)
    skip = dataclasses.replace(made("relu"), W_skip=jnp.ones((D, D)))
    with pytest.raises(UserError, match="skip connection"):
        decode(skip, encode(skip, x))


def test_fidelity_of_a_perfect_and_of_an_empty_dictionary(x: jax.Array):
    base = made("relu")
    eye = jnp.eye(D, F)
    perfect = dataclasses.replace(
        base, W_enc=jnp.concatenate([jnp.eye(D), -jnp.eye(D), jnp.zeros((D, F - 2 * D))], 1), b_enc=jnp.zeros(F),
        W_dec=jnp.concatenate([jnp.eye(D), -jnp.eye(D), jnp.zeros((F - 2 * D, D))]), b_dec=jnp.zeros(D),
    )  # fmt: skip
    l0, fvu = fidelity(perfect, x)
    assert float(l0) == D and float(fvu) < 1e-9
    assert float(fidelity(dataclasses.replace(perfect, W_dec=0 * eye.T), x).fvu) >= 1.0
    assert float(fidelity(perfect, x, 2 * x).fvu) > 0.2


# Devices


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_eight_devices_compute_what_one_computes(activation: str, x: jax.Array, tmp_path):
    save_sae(made(activation), tmp_path / "sae")
    mesh = make_mesh(model=8)
    one, eight = load_sae(tmp_path / "sae"), load_sae(tmp_path / "sae", mesh=mesh)
    assert {tuple(s.data.shape) for s in eight.W_enc.addressable_shards} == {(D, F // 8)}
    assert {tuple(s.data.shape) for s in eight.W_dec.addressable_shards} == {(F // 8, D)}
    assert len(eight.b_enc.addressable_shards[0].data) == F // 8
    for a, b in zip(jax.tree.leaves(shard_sae(one, mesh)), jax.tree.leaves(eight), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)
    run, some = jax.jit(encode), jnp.asarray([1, 22])
    np.testing.assert_allclose(run(eight, x), run(one, x), atol=1e-6)
    np.testing.assert_allclose(run(eight, x, some), run(one, x, some), atol=1e-6)
    np.testing.assert_allclose(jax.jit(reconstruct)(eight, x), jax.jit(reconstruct)(one, x), atol=1e-5)


def test_a_subset_of_a_split_dictionary_gathers_no_matrix(x: jax.Array):
    """Columns are picked on the devices that have them; what travels is [D, S], never [D, F]."""
    sae = shard_sae(made("jumprelu"), make_mesh(model=8))
    program = jax.jit(encode).lower(sae, x, jnp.asarray([1, 22, 5])).compile().as_text()
    assert f"[{D},{F}]" not in program and f"[{F},{D}]" not in program


# Whose it is


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def test_an_sae_of_another_width_fails_and_of_another_model_or_site_warns(
    model: Model, caplog: pytest.LogCaptureFixture
):
    d = model.config.d_model
    base = made("relu", model=f"owner/{model.name.rpartition('/')[2]}")
    fits = dataclasses.replace(base, W_enc=jnp.ones((d, F)), W_dec=jnp.ones((F, d)), b_dec=jnp.ones(d))
    with caplog.at_level(logging.WARNING):
        check_sae(fits, model)
        check_sae(fits, model, "layers.1")
        assert not caplog.records
        check_sae(fits, model, "blocks.0.hook_resid_post")
        assert "trained at blocks.1.hook_resid_post and is used at blocks.0" in caplog.text
        caplog.clear()
        check_sae(dataclasses.replace(fits, config=dataclasses.replace(fits.config, model="other/llama")), model)
        assert "was trained on other/llama" in caplog.text
        caplog.clear()
        check_sae(dataclasses.replace(fits, config=dataclasses.replace(fits.config, model=None)), model)
        assert "a model that its files do not name" in caplog.text
    with pytest.raises(UserError, match=f"width 8 .* has width {d}"):
        check_sae(base, model)
    with pytest.raises(UserError, match="beyond the last layer"):
        check_sae(fits, model, "blocks.99.hook_resid_post")
    with pytest.raises(UserError, match="no fixed width"):
        check_sae(fits, model, "blocks.0.attn.hook_pattern")
    with pytest.raises(UserError, match="does not say which site"):
        check_sae(dataclasses.replace(fits, config=dataclasses.replace(fits.config, site_in=None)), model)


def test_widths_of_places(model: Model):
    c = model.config
    sae = made("relu")
    for place, width in {
        "attn.hook_z": c.n_heads * c.d_head, "attn.hook_k": c.n_kv_heads * c.d_head, "mlp.hook_post": c.d_mlp,
        "mlp.hook_in": c.d_model,
    }.items():  # fmt: skip
        fits = dataclasses.replace(sae, W_enc=jnp.ones((width, F)))
        check_sae(fits, model, f"blocks.1.{place}")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("google/gemma-2-2b", "gemma-2-2b", True), ("gemma-2-2b", "google/gemma-2-2b@main", True),
        ("google/gemma-2-2b", "google/gemma-2-2b-it", False), ("a/model", "b/model", False), (None, "model", False),
    ],
)  # fmt: skip
def test_names_of_models(one: str | None, other: str, same: bool):
    assert same_model(one, other) is same


def test_dead_and_broken_latents_are_counted(tmp_path):
    sae = made("jumprelu")
    broken = dataclasses.replace(
        sae,
        W_dec=sae.W_dec.at[3].set(0.0).at[4, 0].set(jnp.nan),
        b_enc=sae.b_enc.at[5].set(jnp.inf),
        threshold=sae.threshold.at[6].set(jnp.inf),
    )
    assert check_health(sae) == (0, 0, ())
    assert check_health(broken) == (1, 2, ("W_dec", "b_enc"))
    with pytest.raises(UserError, match="b_enc holds NaN"):
        save_sae(broken, tmp_path / "sae")


def test_to_host_is_the_way_back():
    sae = made("gated")
    again = to_device(to_host(sae), dtype=jnp.dtype("float32"))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), sae, again)) and again.config == sae.config
