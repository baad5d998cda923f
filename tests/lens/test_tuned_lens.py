"""Tuned lenses: step 0, gradients against plain autodiff, a planted rotation, other bases, files, resuming, devices."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import jaxsteer
from jaxsteer import UserError, lens
from jaxsteer.files.torchfile import read_torch
from jaxsteer.files.torchwrite import write_torch
from jaxsteer.lens import logit_lens, tuning, tuning_steps
from jaxsteer.lens.tuned_lens import Translators, TunedLens, translated, unembed_hash, untrained
from jaxsteer.lens.tuned_lens_files import load_lens, save_lens
from jaxsteer.lens.tuning import TunedResult, Tuning, tune
from jaxsteer.models.sharding import make_mesh, shard_params
from jaxsteer.models.taps import Intervention, Tap, Where
from jaxsteer.models.transformer import unembed
from jaxsteer.runs.files import write_json
from jaxsteer.sae.texts import documents_of
from tests.helpers.checkpoints import FAMILIES, family_config, random_model

RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, 67, n) for n in (7, 12, 9)]


def random_lens(model: Any, scale: float = 0.2) -> TunedLens:
    layers, width = model.config.n_layers, model.config.d_model
    rng = np.random.default_rng(1)
    matrix = (rng.standard_normal((layers, width, width)) * scale / np.sqrt(width)).astype(np.float32)
    bias = (rng.standard_normal((layers, width)) * scale).astype(np.float32)
    return dataclasses.replace(untrained(model), translators=Translators(matrix=matrix, bias=bias), name="random")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_at_step_0_it_is_the_logit_lens_bit_for_bit(family: str, dtype: str) -> None:
    model = random_model(family_config(family, n_layers=3))
    model = dataclasses.replace(model, params=jax.tree.map(lambda a: a.astype(dtype), model.params))
    plain, tuned = (lens.read(model, TEXTS, lens=each).cells for each in (None, untrained(model)))
    for name in ("kl", "entropy", "top_ids", "top_log_probs", "next_log_prob"):
        np.testing.assert_array_equal(getattr(tuned, name), getattr(plain, name))


def test_a_lens_is_read_through_its_translators() -> None:
    model = random_model(family_config("qwen2"))
    own = random_lens(model)
    reading = lens.read(model, TEXTS[:1], lens=own, sites=["hook_embed", "blocks.1.hook_resid_pre", *logit_lens.EVERY])
    states = jaxsteer.capture(model, TEXTS[0][None], reading.places)
    logits = lens.site_logits(model, TEXTS[0][None], lens=own)
    for s, (place, number) in enumerate([("hook_embed", 0), ("blocks.1.hook_resid_pre", 1)]):
        x = np.asarray(states[place], np.float64)
        y = x + x @ np.float64(own.translators.matrix[number]) + np.float64(own.translators.bias[number])
        expected = np.asarray(jax.nn.log_softmax(unembed(model.params, model.config, jnp.asarray(y, jnp.float32))))[0]
        picked = np.take_along_axis(expected, reading.cells.top_ids[s], -1)
        np.testing.assert_allclose(reading.cells.top_log_probs[s], picked, atol=1e-4)
    np.testing.assert_array_equal(  # the stream after block 0 is that before block 1
        reading.cells.kl[reading.places.index("blocks.0.hook_resid_post")], reading.cells.kl[1]
    )
    assert not reading.cells.kl[-1].any() and reading.lens == "tuned lens random"
    last = "blocks.2.hook_resid_post"
    np.testing.assert_array_equal(logits[last], jaxsteer.logits(model, TEXTS[0][None]))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_plain_autodiff(family: str) -> None:
    model = random_model(family_config(family, n_layers=3))
    own = random_lens(model).translators
    [(_, [rows])] = logit_lens.batches(model, [logit_lens.encoded(model, TEXTS)], 4)
    places = logit_lens.find_places(logit_lens.EVERY, model.config)
    states = logit_lens.states_at(model.params, model.config, rows, None, places)

    def loss(translators: Translators) -> Any:
        y = jax.vmap(translated)(states[1:-1], translators)
        log_p, log_q = (jax.nn.log_softmax(unembed(model.params, model.config, x)) for x in (states[0], y))
        each = (jnp.exp(log_p) * (log_p - log_q)).sum(-1) * rows.mask
        return each.sum(), each.sum((1, 2))

    expected, kl = jax.grad(loss, has_aux=True)(jax.tree.map(jnp.asarray, own))
    zero = tuning_steps.no_sums(own)
    found = tuning_steps.add_gradients(model.params, model.config, own, rows, zero, step=4)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-4)
    assert float(found.tokens) == np.asarray(rows.mask).sum()
    for one, other in zip(jax.tree.leaves(found.gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.abs(other).max()))


@struct.dataclass
class Rotated(Intervention):
    """The stream inside of the last block, turned by a matrix."""

    matrix: Any
    layer: int = struct.field(pytree_node=False)

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset({"hook_resid_mid"})

    def tap(self, where: Where) -> Tap:
        return Tap(self.kinds, lambda kind, layer, x: jnp.where(layer == self.layer, x @ self.matrix, x))


def test_a_planted_rotation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that write nothing and a stream that is turned in the last one: every translator must turn it."""
    width = 16
    model = random_model(family_config("llama", n_layers=2, d_model=width, vocab_size=90, d_head=8))
    silent = model.params.layers.replace(o=model.params.layers.o * 0, down=model.params.layers.down * 0)
    model = dataclasses.replace(model, params=model.params.replace(layers=silent))
    q = np.linalg.qr(RNG.standard_normal((width, width)))[0].astype(np.float32)
    turn = Rotated(matrix=jnp.asarray(q), layer=1)
    turned = lambda params, config, rows, edits, places: logit_lens.states_at(params, config, rows, turn, places)  # noqa: E731
    monkeypatch.setattr(tuning_steps, "states_at", turned)
    before = lens.read(model, [np.arange(90)], edits=turn).summary[0].kl
    steps = 600
    options = Tuning(steps=steps, batch_tokens=90, held=2, rows=1, context=90, weight_decay=0.0)
    found, _ = tune(
        model, lambda i: np.random.default_rng(i).permutation(90).tolist(), tmp_path / "out", options,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.05, steps)),
    )  # fmt: skip
    for layer in range(2):
        own = np.eye(width) + np.asarray(found.translators.matrix[layer])
        own = own * (own * q).sum() / (own * own).sum()  # the norm makes its length meaningless
        assert np.linalg.norm(own - q) <= 0.02 * np.linalg.norm(q)
    after = lens.read(model, [np.arange(90)], edits=turn, lens=found)
    assert before > 0.5 and max(one.kl for one in after.summary) <= 0.01


def test_another_basis_reads_the_same() -> None:
    """With norms of weight 1, a model whose stream is turned, and a lens that is turned with it."""
    model = random_model(family_config("llama"))
    p, width = model.params, model.config.d_model
    ones = {"attn_norm": jnp.ones_like(p.layers.attn_norm), "mlp_norm": jnp.ones_like(p.layers.mlp_norm)}
    p = p.replace(layers=p.layers.replace(**ones), final_norm=jnp.ones_like(p.final_norm))
    r = jnp.asarray(np.linalg.qr(RNG.standard_normal((width, width)))[0], jnp.float32)
    into = {name: jnp.einsum("de,ld...->le...", r, getattr(p.layers, name)) for name in ("q", "k", "v", "gate", "up")}
    out = {name: getattr(p.layers, name) @ r for name in ("o", "down")}
    turned = p.replace(embed=p.embed @ r, unembed=r.T @ p.unembed, layers=p.layers.replace(**into, **out))
    own = random_lens(model)
    other = Translators(matrix=r.T @ own.translators.matrix @ r, bias=own.translators.bias @ r)
    first = lens.read(dataclasses.replace(model, params=p), TEXTS, lens=own).cells
    second = lens.read(
        dataclasses.replace(model, params=turned), TEXTS, lens=dataclasses.replace(own, translators=other)
    ).cells
    assert first.kl[0].mean() > 0.1
    np.testing.assert_allclose(second.kl, first.kl, atol=2e-4)
    np.testing.assert_allclose(second.entropy, first.entropy, atol=2e-4)


SMALL = Tuning(steps=6, batch_tokens=200, held=4, rows=4, context=32, optimizer="adam", lr_scale=3.0, save_minutes=1e-9)


@pytest.fixture(scope="module")
def organism() -> Any:
    return jaxsteer.load("organism:llama")


@pytest.fixture(scope="module")
def trained(organism: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TunedLens, TunedResult]:
    out = tmp_path_factory.mktemp("tuned") / "lens"
    return out, *tune(organism, documents_of(organism), out, SMALL, data="corpus")


def test_training_helps_at_every_layer_on_other_texts(organism: Any, trained: Any) -> None:
    out, own, result = trained
    options = dataclasses.replace(SMALL, steps=40)
    own, result = tune(organism, documents_of(organism), out.with_name("longer"), options)
    assert [one.place for one in result.layers][:2] == ["hook_embed", "blocks.0.hook_resid_post"]
    assert len(result.layers) == organism.config.n_layers and result.texts == 4
    for one in result.layers:
        assert one.tuned < one.logit and one.change == pytest.approx(one.tuned - one.logit, abs=1e-5)
    table = result.table()
    assert "held out" in table and TunedResult.from_json(result.to_json()) == result


def test_what_was_cut_off_gives_the_same_bytes(
    organism: Any, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def dying(path: Any, row: Any) -> None:
        if row["step"] == 4:
            raise Killed
        append(path, row)

    append, out, said = tuning.append_line, tmp_path / "lens", []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tuning, "append_line", dying)
        tune(organism, documents_of(organism), out, SMALL, data="corpus")
    _, again = tune(organism, documents_of(organism), out, SMALL, data="corpus", say=said.append)
    first, _, result = trained
    assert "going on after step 3 of 6" in said and again == result
    for name in ("lens/params.pt", "lens/config.json", "progress.jsonl", "metrics.json"):
        assert (out / name).read_bytes() == (first / name).read_bytes(), name
    assert not (out / "state.npz").exists()
    _, finished = tune(organism, documents_of(organism), out, SMALL, data="corpus", say=said.append)
    assert finished == result and "nothing to do" in said[-1]
    with pytest.raises(UserError, match="holds another run's files"):
        tune(organism, documents_of(organism), out, dataclasses.replace(SMALL, steps=7), data="corpus")


def test_on_several_devices(organism: Any, trained: Any, tmp_path: Path) -> None:
    mesh = make_mesh(prompts=4, model=2)
    spread = dataclasses.replace(organism, mesh=mesh, params=shard_params(organism.params, organism.config, mesh))
    own, _ = tune(spread, documents_of(organism), tmp_path / "lens", SMALL, data="corpus")
    assert own.translators.matrix.sharding.spec[-1] == "model"
    matrix = np.asarray(trained[1].translators.matrix)
    np.testing.assert_allclose(own.translators.matrix, matrix, atol=0.05 * np.abs(matrix).max())


def test_files_of_tuned_lens(tmp_path: Path) -> None:
    model = random_model(family_config("gemma3", n_layers=3))
    own = random_lens(model)
    again = load_lens(save_lens(own, tmp_path / "ours", model), model)
    for one, other in zip(jax.tree.leaves(again.translators), jax.tree.leaves(own.translators), strict=True):
        np.testing.assert_array_equal(one, other)
    state = read_torch(tmp_path / "ours" / "params.pt")
    assert sorted(state) == sorted(f"{i}.{part}" for i in range(3) for part in ("weight", "bias"))
    x = RNG.standard_normal((5, 24)).astype(np.float32)  # torch's Linear: x W^T + b, added to x
    linear = x + x @ state["1.weight"].T + state["1.bias"]
    np.testing.assert_allclose(
        translated(jnp.asarray(x), jax.tree.map(lambda a: a[1], again.translators)), linear, atol=1e-5
    )
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    config = {
        "base_model_name_or_path": "x", "d_model": 24, "num_hidden_layers": 3, "bias": False,
        "base_model_revision": None, "unembed_hash": unembed_hash(model), "lens_type": "linear_tuned_lens",
    }  # fmt: skip
    write_json(theirs / "config.json", config)
    write_torch(theirs / "params.pt", {name: array for name, array in state.items() if name.endswith("weight")})
    bare = load_lens(theirs, model)
    assert not np.asarray(bare.translators.bias).any() and bare.name == "theirs"
    np.testing.assert_array_equal(bare.translators.matrix, own.translators.matrix)


def test_lenses_that_are_refused(tmp_path: Path) -> None:
    model = random_model(family_config("llama"))
    folder = save_lens(random_lens(model), tmp_path / "lens", model)
    other = dataclasses.replace(random_model(family_config("llama"), 1), fingerprint="1" * 64)
    with pytest.raises(UserError, match="was trained on random .* not on the weights of random"):
        load_lens(folder, other)
    assert load_lens(folder, other, any_weights=True).fingerprint == other.fingerprint
    with pytest.raises(UserError, match="has 3 translators of width 24; random has 2 layers"):
        load_lens(folder, random_model(family_config("llama", n_layers=2)), any_weights=True)
    own = dataclasses.replace(random_lens(model), fingerprint="", unembed_hash="0" * 64)
    with pytest.raises(UserError, match="made for another unembedding .* another model, another revision or another"):
        own.check(model)
    for sites in ("blocks.1.hook_resid_mid", "blocks.1.attn.hook_result", "blocks.1.hook_mlp_out"):
        with pytest.raises(UserError, match="has no translator for blocks.1"):
            lens.read(model, TEXTS, lens=random_lens(model), sites=sites)
    state = read_torch(folder / "params.pt")
    for changes, message in (
        ({"0.weight": np.full((24, 24), np.nan)}, "0.weight must be finite numbers of shape"),
        ({"0.weight": np.ones((24, 23))}, "0.weight must be finite"),
        ({"9.weight": np.ones((24, 24))}, "has '9.weight', which no lens of 3 layers has"),
    ):
        write_torch(folder / "params.pt", state | changes)
        with pytest.raises(UserError, match=message):
            load_lens(folder, model)
    write_json(folder / "config.json", {"lens_type": "other"})
    with pytest.raises(UserError, match="a lens of type 'other'"):
        load_lens(folder, model)
    (folder / "params.pt").unlink()
    with pytest.raises(UserError, match="is no tuned lens.*goes on with one that was cut off"):
        load_lens(folder, model)


def test_trainings_that_are_refused(organism: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--held must be at least 2"):
        Tuning(held=1)
    with pytest.raises(UserError, match="5 documents are too few: 4 are held out"):
        tune(organism, documents_of(organism), tmp_path / "lens", SMALL, count=5)
