"""Evaluation against direct computation; the SAE that ships."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxsteer import UserError, capture, load, load_sae, logits
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention, Tap, Where
from jaxsteer.organisms import organism_sae_dir
from jaxsteer.sae import SAE, SAEConfig, decode, encode, evaluate_sae
from jaxsteer.sae.texts import Rows, Sample, documents_of

D, F, T, ROWS = 32, 64, 16, 4


def random_sae(site: str, target: str | None = None, seed: int = 0) -> SAE:
    rng = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape) / D**0.5, jnp.float32)  # noqa: E731
    config = SAEConfig(activation="relu", site_in=site, site_out=target or site, model="tiny")
    b_enc = array(F).at[:5].set(-1e6)  # five latents that never fire
    return SAE(array(D, F), array(F, D), b_enc, array(D), config=config)


@struct.dataclass
class Written(Intervention):
    """Writes given values at one site."""

    value: jnp.ndarray
    layer: int = struct.field(pytree_node=False)
    kind: str = struct.field(pytree_node=False)

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset({self.kind})

    def tap(self, where: Where) -> Tap:
        return Tap(self.kinds, lambda kind, layer, value: jnp.where(layer == self.layer, self.value, value))


def entropies(model: Model, ids: np.ndarray, mask: np.ndarray, counted: np.ndarray, edits: Written | None) -> float:
    """Summed negative log-probability of the counted next tokens, in float64."""
    scores = np.asarray(logits(model, ids, mask, edits=edits), np.float64)[:, :-1]
    log_probs = (
        scores
        - np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - scores.max(-1, keepdims=True)
    )
    taken = np.take_along_axis(log_probs, ids[:, 1:, None], -1)[..., 0]
    return -float(taken[counted].sum())


@pytest.mark.parametrize(("place", "target"), [("hook_resid_post", "hook_resid_post"), ("mlp.hook_in", "hook_mlp_out")])
def test_every_number_is_the_one_computed_directly(place: str, target: str, model: Model, texts: Path):
    site, out = f"blocks.1.{place}", f"blocks.1.{target}"
    sae = random_sae(site, out)
    found = evaluate_sae(sae, model, documents_of(model, [texts]), sample=Sample(tokens=60, context=T, rows=ROWS))
    rows = Rows(documents_of(model, [texts]), rows=ROWS, length=T, bos=model.tokenizer.bos_token_id)
    batches, ys, errors, codes = [], [], [], []
    while sum(map(len, ys)) < 60:
        ids, mask, _ = rows.next()
        values = {name: np.asarray(v) for name, v in capture(model, ids, [site, out], mask).items()}
        f = np.asarray(encode(sae, values[site]))
        y_hat = np.asarray(decode(sae, f, x=values[site]))
        keep = mask & (np.arange(T) > 0) & (ids != model.tokenizer.bos_token_id)
        batches.append((ids, mask, keep, values[out], y_hat))
        ys.append(values[out][keep].astype(np.float64))
        errors.append((values[out] - y_hat)[keep].astype(np.float64))
        codes.append(f[keep])
    y, error, f = np.concatenate(ys), np.concatenate(errors), np.concatenate(codes)
    assert found.tokens == len(y) and found.outliers == 0
    assert found.fvu == pytest.approx(np.sum(error**2) / np.sum((y - y.mean(0)) ** 2), rel=1e-4)
    assert found.l0 == pytest.approx(np.mean(np.sum(f != 0, 1)), rel=1e-6)
    assert found.dead == np.mean(~(f != 0).any(0)) and found.dead >= 5 / F
    totals, count = np.zeros(3), 0
    for ids, mask, keep, value, y_hat in batches:
        counted = keep[:, :-1] & mask[:, 1:]
        count += counted.sum()
        mean = np.broadcast_to(y.mean(0), value.shape)
        for i, new in enumerate((None, y_hat, mean)):
            edits = (
                None
                if new is None
                else Written(jnp.asarray(np.where(keep[..., None], new, value), jnp.float32), 1, target)
            )
            totals[i] += entropies(model, ids, mask, counted, edits)
    plain, patched, ablated = totals / count
    assert found.cross_entropy == pytest.approx(plain, rel=1e-5)
    assert found.cross_entropy_patched == pytest.approx(patched, rel=1e-5)
    assert found.cross_entropy_ablated == pytest.approx(ablated, rel=1e-5)
    assert found.recovered == pytest.approx((ablated - patched) / (ablated - plain), rel=1e-2)


def test_a_perfect_sae_recovers_all_and_a_constant_one_nothing(model: Model, texts: Path):
    eye = jnp.eye(D)
    config = SAEConfig(activation="relu", site_in="blocks.1.hook_resid_post", model="tiny")
    W_enc = jnp.concatenate([eye, -eye], 1)
    perfect = SAE(W_enc, W_enc.T, jnp.zeros(F), jnp.zeros(D), config=config)
    sample = Sample(tokens=60, context=T, rows=ROWS)
    found = evaluate_sae(perfect, model, documents_of(model, [texts]), sample=sample)
    assert found.recovered == pytest.approx(1, abs=1e-5) and found.fvu < 1e-10
    rows = Rows(documents_of(model, [texts]), rows=ROWS, length=T, bos=model.tokenizer.bos_token_id)
    kept: list[np.ndarray] = []
    while sum(map(len, kept)) < 60:
        ids, mask, _ = rows.next()
        x = np.asarray(capture(model, ids, [config.site_in], mask)[config.site_in])
        kept.append(x[mask & (np.arange(T) > 0) & (ids != model.tokenizer.bos_token_id)])
    constant = SAE(W_enc, 0 * W_enc.T, jnp.zeros(F), jnp.asarray(np.concatenate(kept).mean(0)), config=config)
    found = evaluate_sae(constant, model, documents_of(model, [texts]), sample=sample)
    assert found.recovered == pytest.approx(0, abs=1e-3) and found.fvu == pytest.approx(1, abs=1e-4)


def test_a_transcoder_between_layers_is_refused(model: Model, texts: Path):
    sae = random_sae("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")
    with pytest.raises(UserError, match="needs both in one layer"):
        evaluate_sae(sae, model, documents_of(model, [texts]), sample=Sample(tokens=10))


ORGANISMS = {"llama": 2, "qwen2": 2, "gemma3": 3}
"""Organism -> the layer of its SAE."""


@pytest.fixture(scope="module", params=ORGANISMS)
def organism(request: pytest.FixtureRequest) -> Model:
    return load(f"organism:{request.param}")


def test_the_shipped_sae_stands_in_for_its_site(organism: Model):
    sae, name = load_sae(organism.name), organism.name.removeprefix("organism:")
    assert sae.config.site_in == f"blocks.{ORGANISMS[name]}.hook_resid_post" and sae.config.model == organism.name
    assert sum(path.stat().st_size for path in organism_sae_dir(name).iterdir()) <= 3_000_000
    np.testing.assert_allclose(np.linalg.norm(sae.W_dec, axis=1), 1.0, atol=1e-3)
    found = evaluate_sae(
        sae, organism, documents_of(organism, seed=99), sample=Sample(tokens=1000, context=80, rows=32)
    )
    assert found.recovered >= 0.95
    assert found.fvu < 0.03
    assert 15 < found.l0 < 35


@pytest.mark.slow
def test_the_shipped_sae_passes_its_gates(organism: Model):
    documents = documents_of(organism, seed=98)
    found = evaluate_sae(load_sae(organism.name), organism, documents, sample=Sample(context=80))
    assert found.recovered >= 0.95 and found.dead <= 0.1


def test_an_organism_without_an_sae_says_so():
    with pytest.raises(UserError, match="there is one with: gemma3, llama, persona, qwen2"):
        load_sae("organism:other")
