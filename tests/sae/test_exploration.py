"""Exploration: the strongest moments are those of a direct search, and the numbers are right."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer import UserError, capture
from jaxsteer.models.model import Model
from jaxsteer.sae import SAE, Detail, SAEConfig, encode, explore
from jaxsteer.sae.exploration import BINS
from jaxsteer.sae.texts import Rows, Sample, documents_of

SITE = "blocks.0.hook_resid_post"
D, F, T, ROWS = 32, 24, 24, 4


def make_sae(**changes: object) -> SAE:
    rng = np.random.default_rng(0)
    W_enc, W_dec = rng.standard_normal((D, F)), rng.standard_normal((F, D))
    b_enc = np.zeros(F)
    b_enc[3] = -1e6
    config = SAEConfig(**({"activation": "relu", "site_in": SITE, "site_out": SITE, "model": "tiny"} | changes))
    arrays = (jnp.asarray(a, jnp.float32) for a in (W_enc, W_dec, b_enc, np.zeros(D)))
    return SAE(*arrays, config=config)


def test_snippets_are_the_strongest_moments(model: Model, texts: Path):
    sae, documents = make_sae(), documents_of(model, [texts])
    found = explore(
        sae,
        model,
        documents,
        [7, 3],
        sample=Sample(tokens=150, context=T, rows=ROWS),
        detail=Detail(snippets=3, around=2, top=4),
    )
    bos = model.tokenizer.bos_token_id
    rows = Rows(documents_of(model, [texts]), rows=ROWS, length=T, bos=bos)
    moments, active, seen, every = [], 0, 0, []
    while seen < 150:
        ids, mask, _ = rows.next()
        codes = np.asarray(encode(sae, capture(model, ids, [SITE], mask)[SITE]))
        codes = np.where((mask & (np.arange(T) > 0) & (ids != bos))[..., None], codes, 0)
        every.append(codes.reshape(-1, F))
        code = codes[..., 7]
        seen += int((mask & (np.arange(T) > 0) & (ids != bos)).sum())
        active += int((code > 0).sum())
        for row in range(ROWS):
            at = int(code[row].argmax())
            piece = ids[row, max(0, at - 2) : min(int(mask[row].sum()), at + 3)]
            moments.append((float(code[row, at]), tuple(piece.tolist())))
    best = sorted(dict((text, value) for value, text in sorted(moments)).items(), key=lambda item: -item[1])[:3]
    seven, three = found.latents
    assert (found.tokens, found.site, seven.latent) == (seen, SITE, 7)
    assert seven.density == pytest.approx(active / seen)
    for snippet, (text, value) in zip(seven.snippets, best, strict=True):
        assert snippet.activations[snippet.peak] == max(snippet.activations) == pytest.approx(value, rel=1e-5)
        assert snippet.tokens == tuple(model.tokenizer.decode([token]) for token in text)
    assert seven.largest == pytest.approx(best[0][1], rel=1e-5)
    assert (three.density, three.largest, three.snippets) == (0.0, 0.0, ())
    scores = np.asarray(sae.W_dec[7] * model.params.final_norm @ model.params.unembed, np.float64)
    order = [int(i) for i in np.argsort(-scores) if i < len(model.tokenizer)][:4]
    assert seven.promotes == tuple(model.tokenizer.decode([token]) for token in order)
    lowest = [int(i) for i in np.argsort(scores) if i < len(model.tokenizer)][:4]
    assert seven.suppresses == tuple(model.tokenizer.decode([token]) for token in lowest)
    values = np.concatenate(every)
    np.testing.assert_array_equal(
        seven.histogram, np.histogram(values[:, 7][values[:, 7] > 0], BINS, (0, seven.largest))[0]
    )
    assert sum(seven.histogram) == active and three.histogram == ()
    units = np.asarray(sae.W_dec, np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    cosines = units @ units[7]
    close = [int(i) for i in np.argsort(-cosines) if i != 7][:8]
    assert [near.latent for near in seven.near] == close
    for near in seven.near:
        assert near.cosine == pytest.approx(cosines[near.latent], abs=1e-5)
        together = (values[:, near.latent] > 0)[values[:, 7] > 0].mean()
        assert near.together == pytest.approx(together)


def test_sampled_moments_reach_from_strong_to_weak(model: Model, texts: Path):
    """Of all rows in which a latent is active, those at even steps by strength."""
    sae = make_sae()
    sample, detail = Sample(tokens=400, context=T, rows=ROWS), Detail(sampled=4, around=T)
    (found,) = explore(sae, model, documents_of(model, [texts]), [7], sample=sample, detail=detail).latents
    (whole,) = explore(
        sae, model, documents_of(model, [texts]), [7], sample=sample, detail=Detail(sampled=1000, around=T)
    ).latents
    peaks = [max(snippet.activations) for snippet in whole.sampled]
    assert peaks == sorted(peaks, reverse=True) and len(peaks) > 12
    expected = [peaks[int((step + 0.5) / 4 * len(peaks))] for step in range(4)]
    assert [max(snippet.activations) for snippet in found.sampled] == expected


def test_latents_that_do_not_write_into_the_stream_promote_nothing(model: Model, texts: Path):
    place = "blocks.1.attn.hook_z"
    sae = make_sae(site_in=place, site_out=place)
    found = explore(sae, model, documents_of(model, [texts]), [1], sample=Sample(tokens=40, context=T, rows=ROWS))
    assert found.latents[0].promotes == () and found.latents[0].snippets


def test_unknown_latents_are_refused(model: Model, texts: Path):
    for latents in ([], [F], [-1]):
        with pytest.raises(UserError, match="latents 0 to 23"):
            explore(make_sae(), model, documents_of(model, [texts]), latents)
