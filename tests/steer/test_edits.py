"""Edits inside the model: against a float64 recomputation, against weights that say the same, and against no edit."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import jaxsteer
from jaxsteer import steer
from jaxsteer.models.generation import generate_tokens
from jaxsteer.models.layers import forward
from jaxsteer.models.model import Model
from jaxsteer.models.sampling import Decoding
from jaxsteer.models.sites import KINDS, Site
from jaxsteer.models.taps import Intervention, Tap, Where, make_where
from jaxsteer.steer.edits import Edit, Edits
from tests.helpers.checkpoints import FAMILIES, family_config, random_model
from tests.steer.plain import changed, run

B, T = 2, 9
CONFIG = family_config("gemma3", n_layers=3)  # norms on queries and keys, post-norms, windows, two rotary tables
MODEL = random_model(CONFIG)
LLAMA = random_model(family_config("llama"))
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, T))
VECTOR = np.random.default_rng(1).standard_normal(CONFIG.d_model)
PATTERN = "attn.hook_pattern"
SITES = [Site(i, name).name for name, kind in KINDS.items() for i in (range(3) if kind.in_block else (0,))]
MAKERS = {"add": steer.add, "ablate": steer.ablate, "floor": steer.floor, "ceiling": steer.ceiling}
MAKERS |= {"clamp": steer.clamp, "scale": steer.scale}
GROUPS = (
    ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post"),
    ("hook_attn_out", "hook_mlp_out", "mlp.hook_in", "hook_mlp_in"),
    ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", PATTERN),
    ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"),
    ("hook_q_input", "hook_k_input", "hook_v_input", "ln1.hook_scale", "ln1.hook_normalized"),
    ("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_result", "attn.hook_out"),
    ("ln1_post.hook_scale", "ln1_post.hook_normalized", "ln2.hook_scale", "ln2.hook_normalized"),
    (
        "mlp.hook_out",
        "ln2_post.hook_scale",
        "ln2_post.hook_normalized",
        "ln_final.hook_scale",
        "ln_final.hook_normalized",
    ),
)
NUMBERS = [("add", 1.5), ("add_keep_norm", -2.0), ("ablate", 0.7), ("floor", 0.3), ("ceiling", 0.1), ("clamp", -0.4)]
NUMBERS += [("scale", 1.2)]


def rows_of(model: Model, edits: Any, row: int = 0) -> np.ndarray:
    return np.asarray(jaxsteer.logits(model, TOKENS, edits=edits))[row]


def as_dtype(model: Model, dtype: str) -> Model:
    return dataclasses.replace(model, params=jax.tree.map(lambda a: a.astype(dtype), model.params))


@pytest.mark.parametrize("kinds", GROUPS, ids=lambda kinds: kinds[0])
def test_every_operation_at_every_kind_of_site_against_plain_numpy(kinds: tuple[str, ...]) -> None:
    rng = np.random.default_rng(2)
    edits, plans = [], []
    for i, kind in enumerate(kinds):
        size = KINDS[kind].token_shape(CONFIG)
        # Four operations at each kind, and every operation in each group of kinds. Numbers are no vectors.
        numbers = [("scale", 1.2)] if KINDS[kind].over_keys or size == (1,) else (NUMBERS * 2)[3 * i % 7 :][:4]
        for operation, number in numbers:
            layer = int(rng.integers(3)) if KINDS[kind].in_block else 0
            shape = (2, *size) if operation == "ablate" else size
            vector = None if operation == "scale" else rng.standard_normal(shape)
            at = sorted(rng.choice(T, 4, replace=False).tolist())
            site = Site(layer, kind).name
            options = {"keep_norm": True} if operation == "add_keep_norm" else {}
            make = MAKERS[operation.removesuffix("_keep_norm")]
            given = [number] if vector is None else [vector, number]
            edits.append(make(site, *given, positions=at, **options))
            plans.append((operation, kind, layer, vector, number, at))

    def change(kind: str, layer: int, value: np.ndarray) -> np.ndarray:
        value = np.array(value)
        for operation, where, number_of_layer, vector, number, at in plans:
            if (where, number_of_layer) == (kind, layer):
                for t in at:
                    at_token = (slice(None), t) if KINDS[kind].over_keys else t
                    value[at_token] = changed(operation, value[at_token], vector, number)
        return value

    found = jaxsteer.capture(MODEL, TOKENS, SITES, edits=Edits(tuple(edits)))
    seen = run(MODEL.params, CONFIG, TOKENS[1], change)[1]
    for site in SITES:
        np.testing.assert_allclose(found[site][1], seen[site], rtol=1e-3, atol=1e-3, err_msg=site)


def test_values_of_another_run_replace_those_of_this_one() -> None:
    places = ("hook_resid_mid", "attn.hook_z", PATTERN)
    own, other = (jaxsteer.capture(MODEL, tokens, SITES) for tokens in (TOKENS, TOKENS[:, ::-1]))

    def patched(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
        sites = [f"blocks.1.{place}" for place in places]
        edits = Edits(tuple(steer.replace(site, values[site], positions=[3, -1]) for site in sites))
        return jaxsteer.capture(MODEL, TOKENS, SITES, edits=edits, prompt_length=np.full(B, 6))

    def change(place: str, layer: int, value: np.ndarray) -> np.ndarray:
        value = np.array(value)
        for t in (3, 5) if layer == 1 and place in places else ():
            at = (slice(None), t) if place == PATTERN else t
            value[at] = np.asarray(other[f"blocks.1.{place}"][1])[at]
        return value

    found, same, seen = patched(other), patched(own), run(MODEL.params, CONFIG, TOKENS[1], change)[1]
    for site in SITES:
        np.testing.assert_allclose(found[site][1], seen[site], rtol=1e-3, atol=1e-3, err_msg=site)
        np.testing.assert_allclose(same[site], own[site], atol=1e-4, err_msg=site)
    site = "blocks.1.hook_resid_mid"
    assert np.array_equal(found[site][:, [3, 5]], other[site][:, [3, 5]])


def test_a_head_without_attention_writes_nothing() -> None:
    values = [
        rows_of(MODEL, steer.scale(f"blocks.1.{place}", 0.0, head=2, positions=[4, 5]))
        for place in ("attn.hook_z", PATTERN)
    ]
    np.testing.assert_allclose(*values, atol=1e-5)
    assert np.abs(values[0] - rows_of(MODEL, None)).max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_coefficient_0_leaves_every_bit(family: str, dtype: str, compile_counter: Any) -> None:
    model = as_dtype(random_model(family_config(family, n_layers=3)), dtype)
    plain = np.asarray(jaxsteer.logits(model, TOKENS))
    kinds = [name for name, kind in KINDS.items() if kind.in_block and kind.exists(model.config)]
    vectors = {kind: np.ones(KINDS[kind].token_shape(model.config)) for kind in kinds if not KINDS[kind].over_keys}
    edits = Edits(
        (
            steer.add("hook_embed", VECTOR, 0.0),
            *(steer.add(f"blocks.*.{kind}", vector, 0.0) for kind, vector in vectors.items()),
            *(steer.ablate(f"blocks.1.{kind}", vector, 0.0) for kind, vector in vectors.items()),
            *(steer.scale(f"blocks.1.{kind}", 1.0) for kind in kinds),
        )
    )
    with compile_counter() as count:
        assert np.array_equal(np.asarray(jaxsteer.logits(model, TOKENS, edits=edits)), plain)
    assert count["_run"] == 0


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("gemma3", "float32")])
def test_coefficient_0_beside_an_edited_row(family: str, dtype: str) -> None:
    """Another program than without edits, in which XLA may round elsewhere in float32, but by no more than that."""
    model = as_dtype(random_model(family_config(family, n_layers=3)), dtype)
    plain = np.asarray(jaxsteer.logits(model, TOKENS))
    rows = steer.stack_rows([steer.add("blocks.1.hook_resid_mid", VECTOR, c) for c in (0.0, 3.0)])
    found = np.asarray(jaxsteer.logits(model, TOKENS, edits=rows))
    np.testing.assert_allclose(found[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(found[1, 0], plain[1, 0], atol=1e-5)  # the first token is left alone
    assert np.abs(found[1, 1:] - plain[1, 1:]).max() > 0.1


def test_rows_of_one_batch_equal_separate_runs() -> None:
    other = np.random.default_rng(3).standard_normal((3, CONFIG.d_model))
    rows = [
        Edits((steer.add("blocks.0.hook_resid_post", VECTOR, 2.0), steer.ablate("blocks.*.hook_attn_out", other[:2]))),
        None,
        steer.add("blocks.2.hook_resid_post", other[0], 1.0, positions=[-1], mean_norm=4.0),
        Edits(
            (
                steer.ceiling("blocks.1.hook_mlp_out", VECTOR, 0.0),
                steer.add([f"blocks.{i}.hook_resid_post" for i in (1, 2)], other[:2], [1.0, -1.0], positions="prompt"),
            )
        ),
    ]
    table = steer.stack_rows(rows)
    assert table.rows == len(rows) and len(table.edits) == 4
    tokens = np.resize(TOKENS[0], (len(rows), T))
    together = jaxsteer.logits(MODEL, tokens, edits=table, prompt_length=np.full(len(rows), 6))
    for number, row in enumerate(rows):
        alone = jaxsteer.logits(MODEL, tokens, edits=row, prompt_length=np.full(len(rows), 6))
        np.testing.assert_allclose(together[number], alone[number], atol=1e-5)
        assert row is None or np.abs(alone[number] - together[rows.index(None)]).max() > 1e-2


EVERY_SELECTION = Edits(
    tuple(
        steer.add("blocks.*.hook_resid_post", np.roll(VECTOR, j), 0.5, positions=positions)
        for j, positions in enumerate(
            ["all", "prompt", "response", "last", "last_and_response", [1, -3], slice(2, -1), steer.select(tokens=[5])]
        )
    )
)


def test_padding_on_either_side_changes_nothing() -> None:
    length = np.asarray([4, 2])
    plain = np.asarray(jaxsteer.logits(MODEL, TOKENS, edits=EVERY_SELECTION, prompt_length=length))
    for left in (0, 3):
        tokens, mask = np.full((B, T + 3), 5), np.zeros((B, T + 3), bool)
        tokens[:, left : left + T], mask[:, left : left + T] = TOKENS, True
        found = jaxsteer.logits(MODEL, tokens, mask, edits=EVERY_SELECTION, prompt_length=length)
        np.testing.assert_allclose(found[:, left : left + T], plain, atol=1e-5)


def test_values_of_a_padded_run_are_patched_in_by_position() -> None:
    site, mask = "blocks.1.hook_resid_mid", np.arange(T) >= np.asarray([[3], [1]])
    plain, values = (jaxsteer.capture(MODEL, TOKENS, [site], m)[site] for m in (np.ones((B, T), bool), mask))
    edit = steer.replace(site, values, mask=mask)
    assert steer.count_positions(edit, TOKENS).tolist() == [T - 3, T - 1]
    found = jaxsteer.capture(MODEL, TOKENS, [site], np.ones((B, T), bool), edits=edit)[site]
    for row, start in enumerate((3, 1)):
        np.testing.assert_array_equal(found[row, : T - start], values[row, start:])
        np.testing.assert_allclose(found[row, T - start :], plain[row, T - start :], atol=1e-5)


def test_a_text_cut_short_is_edited_as_the_whole_text_is() -> None:
    length = np.asarray([4, 2])
    whole = jaxsteer.logits(MODEL, TOKENS, edits=EVERY_SELECTION, prompt_length=length)
    cut = jaxsteer.logits(MODEL, TOKENS[:, :6], edits=EVERY_SELECTION, prompt_length=length)
    np.testing.assert_allclose(whole[:, :6], cut, atol=1e-5)
    assert np.abs(whole - jaxsteer.logits(MODEL, TOKENS)).max() > 0.1


def test_new_numbers_do_not_compile_again(compile_counter: Any) -> None:
    def edits(seed: int) -> Edits:
        rng = np.random.default_rng(seed)
        layer = int(rng.integers(3))
        return Edits(
            (
                steer.add(
                    f"blocks.{layer}.hook_resid_post", rng.standard_normal(24), rng.uniform(), positions=[seed, 3]
                ),
                steer.floor(
                    f"blocks.{layer}.hook_attn_out", rng.standard_normal(24), -seed, positions=slice(seed, None)
                ),
                steer.add("blocks.0.mlp.hook_in", VECTOR, 1, positions="all" if seed % 2 else "last_and_response"),
            )
        )

    tables = [steer.stack_rows([edits(seed), edits(seed + 7)]) for seed in range(4)]
    with compile_counter() as count:
        found = [np.asarray(jaxsteer.logits(LLAMA, TOKENS, edits=table)) for table in tables]
    assert count["_run"] == 1
    assert min(np.abs(a - b).max() for a, b in zip(found, found[1:])) > 1e-2


def test_the_program_does_not_grow_with_depth() -> None:
    def size(n_layers: int) -> int:
        config = family_config("llama", n_layers=n_layers)
        params = random_model(config).params
        several = steer.add([f"blocks.{i}.hook_resid_post" for i in range(n_layers)], VECTOR)
        edits = Edits((steer.ablate_everywhere(VECTOR), several))
        return len(
            str(
                jax.make_jaxpr(lambda p, e: forward(p, config, jnp.asarray(TOKENS), None, e))(params, edits)
            ).splitlines()
        )

    assert size(3) == size(9)


def test_ablation_everywhere_equals_weights_that_cannot_write_the_subspace() -> None:
    rng = np.random.default_rng(4)
    basis = np.linalg.qr(rng.standard_normal((24, 2)))[0]
    away = np.eye(24) - basis @ basis.T
    params, layers = LLAMA.params, LLAMA.params.layers
    without = params.replace(
        embed=jnp.asarray(params.embed @ away, jnp.float32),
        layers=layers.replace(
            o=jnp.asarray(layers.o @ away, jnp.float32), down=jnp.asarray(layers.down @ away, jnp.float32)
        ),
    )
    expected = jaxsteer.logits(dataclasses.replace(LLAMA, params=without), TOKENS)
    edits = steer.ablate_everywhere(rng.standard_normal((2, 2)) @ basis.T)
    np.testing.assert_allclose(jaxsteer.logits(LLAMA, TOKENS, edits=edits), expected, atol=2e-5)
    states = jaxsteer.capture(LLAMA, TOKENS, [f"blocks.{i}.hook_resid_post" for i in range(3)], edits=edits)
    assert max(float(np.abs(state @ basis).max()) for state in states.values()) < 1e-5
    assert np.abs(expected - jaxsteer.logits(LLAMA, TOKENS)).max() > 0.1


def test_gradients_flow_through_edits() -> None:
    weights = np.random.default_rng(5).standard_normal((B, T, CONFIG.vocab_size))

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def score(vector: jax.Array, coefficient: jax.Array) -> jax.Array:
        edits = Edits(
            (
                steer.add("blocks.0.hook_resid_post", vector, coefficient),
                steer.add("blocks.0.hook_mlp_out", vector, coefficient, keep_norm=True),
                steer.ablate("blocks.1.attn.hook_v", vector[:16].reshape(2, 8)),
                steer.clamp("blocks.1.hook_resid_mid", vector, coefficient),
                steer.floor("blocks.2.hook_resid_mid", vector, 0.2),
                steer.ablate("blocks.2.hook_resid_pre", jnp.stack([vector, vector[::-1]])),
            )
        )
        return (forward(LLAMA.params, LLAMA.config, jnp.asarray(TOKENS), None, edits) * weights).sum()

    at, eps = jnp.asarray(VECTOR, jnp.float32), 1e-2
    step = np.random.default_rng(6).standard_normal(24).astype(np.float32)
    step /= np.linalg.norm(step)
    for number in (0.0, 1.5):  # at 0 an addition that keeps the norm has a value of its own
        slope, slope_of_coefficient = score(at, jnp.float32(number))[1]
        assert np.isfinite(slope).all()
        high, low = (score(at + sign * eps * step, jnp.float32(number))[0] for sign in (1, -1))
        np.testing.assert_allclose(slope @ step, (high - low) / (2 * eps), rtol=2e-2)
        high, low = (score(at, jnp.float32(number + sign * eps))[0] for sign in (1, -1))
        np.testing.assert_allclose(slope_of_coefficient, (high - low) / (2 * eps), rtol=2e-2)


def test_eight_devices_give_what_one_gives() -> None:
    tokens = np.resize(TOKENS, (8, T))
    rows = [steer.add(f"blocks.{i % 3}.hook_resid_post", VECTOR, i, positions=[i]) for i in range(7)]
    z = steer.ablate("blocks.1.attn.hook_z", np.random.default_rng(7).standard_normal((4, 8)))
    edits = Edits((steer.stack_rows([*rows, None]), z, steer.scale("blocks.2." + PATTERN, 0.5, head=1)))
    one = jaxsteer.logits(LLAMA, tokens, edits=edits, prompt_length=np.arange(1, 9))
    mesh = jaxsteer.make_mesh(model=2)
    params = jaxsteer.models.sharding.shard_params(LLAMA.params, LLAMA.config, mesh)
    spread = dataclasses.replace(LLAMA, params=params, mesh=mesh)
    many = jaxsteer.logits(spread, tokens, edits=edits, prompt_length=np.arange(1, 9))
    assert len(many.sharding.device_set) == 8
    np.testing.assert_allclose(many, one, atol=1e-5)


@struct.dataclass
class Reflect(Intervention):
    """A user's own: the stream mirrored at the plane across a vector, in one layer."""

    vector: jax.Array
    layer: jax.Array
    kinds = frozenset({"hook_resid_post"})

    def tap(self, where: Where) -> Tap:
        def change(kind: str, layer: Any, value: jax.Array) -> jax.Array:
            mirrored = value - 2 * (value @ self.vector)[..., None] * self.vector
            return jnp.where((layer == self.layer) & where.valid[..., None], mirrored, value)

        return Tap(self.kinds, change)


@struct.dataclass
class Lost(Intervention):
    """Looks where there is nothing."""

    kinds = frozenset({"hook_resid_poste"})


def test_an_intervention_of_ones_own(compile_counter: Any) -> None:
    unit = (VECTOR / np.linalg.norm(VECTOR)).astype(np.float32)
    own = jaxsteer.logits(LLAMA, TOKENS, edits=Reflect(unit, np.int32(1)))
    twice = steer.ablate("blocks.1.hook_resid_post", VECTOR, 2.0, positions=slice(0, None))
    np.testing.assert_allclose(own, jaxsteer.logits(LLAMA, TOKENS, edits=twice), atol=1e-5)
    undone = Edits((Reflect(unit, np.int32(1)), twice))
    np.testing.assert_allclose(jaxsteer.logits(LLAMA, TOKENS, edits=undone), jaxsteer.logits(LLAMA, TOKENS), atol=1e-5)
    with compile_counter() as count:
        jaxsteer.logits(LLAMA, TOKENS, edits=Reflect(-unit, np.int32(2)))
    assert count["_run"] == 0 and undone.rows is None
    for edit, says in ((Lost(), "none of hook_embed"), (steer.scale("blocks.*.ln1_post.hook_scale", 2.0), "llama")):
        with pytest.raises(jaxsteer.UserError, match=says):
            jaxsteer.logits(LLAMA, TOKENS, edits=edit)


def test_bfloat16_streams_are_edited_in_float32() -> None:
    value = np.random.default_rng(8).standard_normal((B, T, 24)).astype(jnp.bfloat16)
    where = make_where(jnp.asarray(TOKENS), jnp.arange(T)[None], None)
    edit: Edit = steer.ablate("blocks.0.hook_resid_pre", VECTOR)
    found = jax.jit(lambda edit, value: edit.tap(where)("hook_resid_pre", 0, value))(edit, jnp.asarray(value))
    unit = VECTOR / np.linalg.norm(VECTOR)
    wide = value.astype(np.float64)
    expected = wide - (wide @ unit)[..., None] * unit
    assert found.dtype == jnp.bfloat16 and np.array_equal(found[:, 0], value[:, 0])
    np.testing.assert_allclose(found[:, 1:].astype(np.float32), expected[:, 1:], rtol=2**-8)


def test_generation_follows_the_edited_logits(compile_counter: Any) -> None:
    selections = ["response", "last_and_response"]
    table = Edits(
        (
            steer.stack_rows([steer.add("blocks.1.hook_resid_mid", 3 * VECTOR, positions=p) for p in selections]),
            steer.add("ln_final.hook_normalized", VECTOR, positions="last_and_response"),
            steer.scale("blocks.0.attn.hook_attn_scores", 0.5, head=1),
            steer.add("blocks.2.hook_k_input", np.outer([1.0, -1.0], VECTOR)),
        )
    )
    prompts, decoding = [TOKENS[0, :5], TOKENS[1, :3]], Decoding(max_new_tokens=5, temperature=0.0)
    *_, last = generate_tokens(LLAMA, prompts, decoding, edits=table)
    for row, (prompt, tokens) in enumerate(zip(prompts, last.tokens[:, :5])):
        text = np.concatenate([prompt, tokens])[None]
        length, alone = np.asarray([len(prompt)]), steer.take_rows(table, np.asarray([row]))
        logits = jaxsteer.logits(LLAMA, text, edits=alone, prompt_length=length)
        assert np.asarray(logits)[0, len(prompt) - 1 : -1].argmax(-1).tolist() == tokens.tolist()
    wide = steer.add("blocks.1.mlp.hook_post", VECTOR)
    with compile_counter() as count, pytest.raises(jaxsteer.UserError, match="24 components"):
        generate_tokens(LLAMA, prompts, decoding, edits=wide)
    assert not count.total()
