"""The transformer against a float64 NumPy twin, and against itself cut into segments, prefixes and paddings."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.models.config import GLOBAL_WINDOW, ModelConfig, Rope
from jaxsteer.models.layers import forward, layer_weights, prefill, run_layers
from jaxsteer.models.sites import KINDS
from jaxsteer.models.taps import NO_TAP, Tap, Visit
from jaxsteer.models.transformer import block, embed, embed_tokens, make_context, positions_of, unembed
from jaxsteer.steer import Edits, scale
from tests.helpers.checkpoints import family_config, random_model, random_params, tiny_config
from tests.helpers.reference import reference_forward

PLAIN = tiny_config()
WINDOWED = dataclasses.replace(PLAIN, windows=(5, GLOBAL_WINDOW, 5))
CONFIGS = {
    "llama3 rope": PLAIN,
    "linear rope, tied": tiny_config(rope=Rope(theta=100.0, kind="linear", factor=4.0), tied_embeddings=True),
    "qwen 2.5": dataclasses.replace(PLAIN, qkv_bias=True, norm_eps=1e-6),
    "qwen 3": dataclasses.replace(PLAIN, qk_norm=True),
    "gemma 2": dataclasses.replace(
        PLAIN,
        activation="gelu_tanh",
        norm_plus_one=True,
        post_norms=True,
        query_scale=12.0**-0.5,
        attn_softcap=3.0,
        final_softcap=2.0,
        embed_scale=True,
        windows=(5, GLOBAL_WINDOW, 5),
    ),
    "gemma 3": dataclasses.replace(
        PLAIN,
        activation="gelu_tanh",
        norm_plus_one=True,
        post_norms=True,
        qk_norm=True,
        embed_scale=True,
        windows=(4, 4, GLOBAL_WINDOW),
        ropes=(Rope(theta=100.0), Rope(theta=10_000.0, kind="linear", factor=8.0)),
        rope_index=(0, 0, 1),
    ),
}
PATTERN = "attn.hook_pattern"
ROW = np.random.default_rng(3).integers(0, PLAIN.vocab_size, 21)

jit_forward = jax.jit(forward, static_argnames="config")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_path_agrees_with_float64_numpy(name: str) -> None:
    config = CONFIGS[name]
    params = random_params(config, seed=5)
    logits, _ = reference_forward(params, config, ROW)
    np.testing.assert_allclose(jit_forward(params, config, jnp.asarray(ROW)[None])[0], logits, atol=1e-4)


def _run(params: object, config: ModelConfig, x: jax.Array, start: int, stop: int) -> jax.Array:
    context = make_context(config, jnp.arange(x.shape[1])[None])
    return run_layers(params, config, x, context, start, stop)


@pytest.mark.parametrize("config", [PLAIN, WINDOWED], ids=["full", "windowed"])
def test_padding_on_either_side_changes_nothing(config: ModelConfig) -> None:
    params = random_model(config).params
    length = len(ROW)
    tokens = np.stack([ROW, np.pad(ROW[:13], (8, 0)), np.pad(ROW[:13], (0, 8)), np.pad(ROW[:6], (4, 11))])
    mask = np.zeros(tokens.shape, bool)
    for row, (start, stop) in enumerate([(0, length), (8, length), (0, 13), (4, 10)]):
        mask[row, start:stop] = True
    tokens[~mask] = 9  # whatever stands at the padding
    padded = np.asarray(jit_forward(params, config, jnp.asarray(tokens), jnp.asarray(mask)))
    alone = np.asarray(jit_forward(params, config, jnp.asarray(ROW)[None]))[0]
    assert np.isfinite(padded).all()
    for row in range(4):  # causality: the first tokens do not depend on those after them
        np.testing.assert_allclose(padded[row][mask[row]], alone[: mask[row].sum()], atol=2e-5)


def test_split_segments_equal_the_whole() -> None:
    params = random_model(WINDOWED).params

    @jax.jit
    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        parts = _run(params, WINDOWED, _run(params, WINDOWED, _run(params, WINDOWED, x, 0, 1), 1, 1), 1, 3)
        return parts, _run(params, WINDOWED, x, 0, 3)

    parts, whole = both(params.embed[ROW][None])
    np.testing.assert_array_equal(parts, whole)


def test_scan_equals_a_python_loop_over_blocks() -> None:
    params = random_model(PLAIN).params

    @jax.jit
    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        context = make_context(PLAIN, jnp.arange(len(ROW))[None])
        looped = x
        for layer in range(PLAIN.n_layers):
            looped = block(layer_weights(params, layer), PLAIN, looped, context, Visit(layer=jnp.int32(layer)))
        return looped, run_layers(params, PLAIN, x, context, 0, 3)

    looped, scanned = both(params.embed[ROW][None])
    np.testing.assert_allclose(scanned, looped, atol=1e-5)


def _equations(jaxpr: object) -> int:
    """Equations of a jaxpr and of all jaxprs inside it."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            total += _equations(inner) if hasattr(inner, "eqns") else 0
    return total


def test_program_does_not_grow_with_depth() -> None:
    def sizes(n_layers: int) -> tuple[int, int]:
        config = tiny_config(n_layers=n_layers, d_model=8, d_mlp=8, d_head=4)
        params = random_params(config)
        tokens = jnp.zeros((2, 6), jnp.int32)

        def loss(x: jax.Array) -> jax.Array:
            return _run(params, config, x, 0, n_layers).sum()

        forward_size = _equations(jax.make_jaxpr(lambda t: forward(params, config, t))(tokens).jaxpr)
        return forward_size, _equations(jax.make_jaxpr(jax.grad(loss))(params.embed[tokens]).jaxpr)

    small, large = sizes(4), sizes(40)
    assert small == large
    assert small[0] > 50  # the blocks are inside what was counted


def _products(jaxpr: object) -> int:
    """Multiplications and additions of the matrix products of a jaxpr, layers of a scan counted."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            total += equation.params.get("length", 1) * _products(inner) if hasattr(inner, "eqns") else 0
    return total


def test_what_nobody_looks_at_costs_nothing() -> None:
    """By hand, the products of a forward pass; then those of each dear site, where somebody looks."""
    config, (b, t) = family_config("llama", n_layers=3), (2, 6)
    d, n, k, h, i = config.d_model, config.n_heads, config.n_kv_heads, config.d_head, config.d_mlp
    params, tokens = random_params(config), jnp.zeros((b, t), jnp.int32)

    def cost(*kinds: str) -> int:
        edits = Edits(tuple(scale(f"blocks.*.{kind}", jnp.float32(1.0)) for kind in kinds))
        return _products(
            jax.make_jaxpr(lambda p: forward(p, config, tokens, None, edits if kinds else None))(params).jaxpr
        )

    weights = d * (n + 2 * k) * h + n * h * d + 3 * d * i
    plain = 2 * b * t * (3 * weights + d * config.vocab_size) + 3 * 2 * 2 * b * n * t * t * h
    assert cost() == plain
    on_request = [name for name, kind in KINDS.items() if kind.on_request and kind.in_block and kind.exists(config)]
    assert len(on_request) == 10
    # Where nothing else is changed, projections of copies and of heads' results cost as much as those they replace.
    assert [cost(kind) for kind in on_request] == [plain] * len(on_request)
    assert cost("attn.hook_pattern") == plain + 3 * 2 * b * n * t * t * h  # weighs the values once more


# Two groups with prefixes of different lengths (one padded left, one right), two rows each.
PREFIXES = [ROW[:7], ROW[3:7]]
TAILS = np.random.default_rng(4).integers(0, PLAIN.vocab_size, (2, 2, 6))


def _prefixed(params: object, config: ModelConfig, x: jax.Array) -> jax.Array:
    """Logits [4, 6, V] of the tails' embeddings ``x`` after their group's prefix."""
    length = max(map(len, PREFIXES)) + 1
    tokens, mask = np.zeros((2, length), np.int32), np.zeros((2, length), bool)
    tokens[0, 1:], mask[0, 1:] = PREFIXES[0], True
    tokens[1, : len(PREFIXES[1])], mask[1, : len(PREFIXES[1])] = PREFIXES[1], True
    prefix, _ = prefill(params, config, jnp.asarray(tokens), jnp.asarray(mask))
    positions = jnp.repeat(prefix.length, 2)[:, None] + jnp.arange(x.shape[1])
    context = make_context(config, positions, None, prefix)
    return unembed(params, config, run_layers(params, config, x, context, 0, config.n_layers))


def _concatenated(params: object, config: ModelConfig, x: jax.Array) -> jax.Array:
    """The same with the prefix written out before each row, padded on the left to one length."""
    length = max(map(len, PREFIXES))
    tokens, mask = np.zeros((4, length), np.int32), np.zeros((4, length + x.shape[1]), bool)
    for row in range(4):
        prefix = PREFIXES[row // 2]
        tokens[row, length - len(prefix) :], mask[row, length - len(prefix) :] = prefix, True
    whole = jnp.concatenate([embed_tokens(params, config, jnp.asarray(tokens)), x], axis=1)
    context = make_context(config, positions_of(jnp.asarray(mask)), jnp.asarray(mask))
    out = run_layers(params, config, whole, context, 0, config.n_layers)
    return unembed(params, config, out[:, length:])


@pytest.mark.parametrize("name", ["llama3 rope", "gemma 3"])
def test_shared_prefix_equals_concatenation_and_so_does_its_gradient(name: str) -> None:
    config = CONFIGS[name]
    params = random_params(config, seed=6)
    x = np.asarray(params.embed)[TAILS.reshape(4, 6)]
    weight = np.random.default_rng(0).standard_normal((4, 6, config.vocab_size)).astype(np.float32)

    def value_and_gradient(logits_of: object) -> tuple[jax.Array, jax.Array, jax.Array]:
        def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = logits_of(params, config, x)
            return (jax.nn.log_softmax(logits) * weight).sum(), logits

        (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
        return value, logits, gradient

    value, logits, gradient = value_and_gradient(_prefixed)
    expected_value, expected_logits, expected_gradient = value_and_gradient(_concatenated)
    np.testing.assert_allclose(logits, expected_logits, atol=5e-5)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    assert abs(gradient - expected_gradient).max() < 1e-3 * abs(expected_gradient).max()


def test_prefix_with_per_row_padding() -> None:
    """Rows padded on the right after a shared prefix: the padding neither sees to it nor is seen."""
    params = random_model(WINDOWED).params
    tokens = jnp.asarray(TAILS[0])
    mask = jnp.asarray([[True] * 6, [True] * 4 + [False] * 2])

    @jax.jit
    def run(tokens: jax.Array, mask: jax.Array) -> jax.Array:
        prefix, _ = prefill(params, WINDOWED, jnp.asarray(PREFIXES[0])[None], jnp.ones((1, 7), bool))
        context = make_context(WINDOWED, 7 + positions_of(mask), mask, prefix)
        return run_layers(params, WINDOWED, embed(params, WINDOWED, tokens, context.positions), context, 0, 3)

    padded, plain = run(tokens, mask), run(tokens, jnp.ones_like(mask))
    np.testing.assert_allclose(padded[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(padded[1, :4], plain[1, :4], atol=1e-5)


@pytest.mark.parametrize("with_prefix", [False, True])
def test_a_pattern_that_is_written_replaces_attention(with_prefix: bool) -> None:
    """Writing back the same pattern changes nothing; writing attention to oneself gives each token its own value."""
    params = random_model(PLAIN).params
    u = 5 if with_prefix else 0
    itself = np.concatenate([np.zeros((6, u)), np.eye(6)], axis=1)

    @jax.jit
    def run(change: jax.Array, itself: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = params.embed[TAILS.reshape(4, 6)]
        prefix = None
        if with_prefix:
            prefix, _ = prefill(params, PLAIN, jnp.asarray(ROW[:10]).reshape(2, 5), jnp.ones((2, 5), bool))
        context = make_context(PLAIN, jnp.full((4, 1), u) + jnp.arange(6), None, prefix)
        written = Tap(frozenset({PATTERN}), lambda kind, layer, value: value + change * (itself - value))
        visit = Visit(NO_TAP if itself is None else written, [PATTERN, "attn.hook_z", "attn.hook_v"], jnp.int32(0))
        return block(layer_weights(params, 0), PLAIN, x, context, visit), visit.seen

    plain, seen = run(0.0, None)
    np.testing.assert_allclose(seen[PATTERN].sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(run(0.0, itself)[0], plain, atol=1e-5)
    seen = run(1.0, itself)[1]
    np.testing.assert_allclose(seen["attn.hook_z"], np.repeat(seen["attn.hook_v"], 2, axis=2), atol=1e-5)


def test_bfloat16_stays_close_and_logits_stay_float32() -> None:
    model = random_model(PLAIN)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params)
    high = jit_forward(model.params, PLAIN, jnp.asarray(ROW)[None])
    logits = jit_forward(low, PLAIN, jnp.asarray(ROW)[None])
    assert logits.dtype == jnp.float32
    p, q = jax.nn.log_softmax(high), jax.nn.log_softmax(logits)
    assert float((jnp.exp(p) * (p - q)).sum(-1).mean()) < 0.02
