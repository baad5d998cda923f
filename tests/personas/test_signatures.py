"""SAE signatures against float64 NumPy, their controls, and the objective that they make."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.objectives import Reads, needs
from jaxsteer.personas import Pairs, load_signature, random_signature, sae_signature, save_signature
from jaxsteer.personas.signatures import FORMAT
from jaxsteer.sae import SAE, SAEConfig, encode, latents_objective, promoted_tokens
from tests.helpers.tiny import tiny_model

SITE = "blocks.1.hook_resid_post"
LATENTS = 40


def model() -> Model:
    return Model(**vars(tiny_model()))


def make_sae(**changes: object) -> SAE:
    rng = np.random.default_rng(0)
    d = model().config.d_model
    fields: dict[str, object] = {"activation": "jumprelu", "site_in": SITE, "model": model().name}
    config = SAEConfig(**(fields | changes))  # type: ignore[arg-type]
    return SAE(
        W_enc=jnp.asarray(rng.normal(size=(d, LATENTS)), jnp.float32),
        W_dec=jnp.asarray(rng.normal(size=(LATENTS, d)) / d, jnp.float32),
        b_enc=jnp.asarray(rng.normal(size=LATENTS), jnp.float32),
        b_dec=jnp.asarray(rng.normal(size=d), jnp.float32),
        threshold=jnp.full(LATENTS, 0.3) if config.activation == "jumprelu" else None,
        config=config,
    )


def make_pairs(n: int = 5) -> Pairs:
    rng = np.random.default_rng(1)
    draw = lambda: tuple(rng.integers(10, 500, size).astype(np.int32) for size in rng.integers(4, 12, n))  # noqa: E731
    good, bad = draw(), draw()
    return Pairs(
        good=good,
        bad=bad,
        good_read=np.asarray([len(row) - 1 for row in good]),
        bad_read=np.asarray([len(row) - 2 for row in bad]),
        good_letter=("",) * n,
        groups=tuple(map(str, range(n))),
        read_position="decision",
        recipe={"persona": "made up"},
    )


def reference(sae: SAE, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Codes of good and of bad rows, row by row from the public capture, in float64."""
    sides = []
    for rows, reads in ((pairs.good, pairs.good_read), (pairs.bad, pairs.bad_read)):
        codes = []
        for ids, read in zip(rows, reads, strict=True):
            x = np.asarray(jaxsteer.capture(model(), ids[None], [SITE])[SITE], np.float64)[0, read]
            p = x @ np.asarray(sae.W_enc, np.float64) + np.asarray(sae.b_enc, np.float64)
            codes.append(np.where(p > np.asarray(sae.threshold, np.float64), np.maximum(p, 0), 0))
        sides.append(np.asarray(codes))
    return sides[0], sides[1]


def test_the_signature_is_the_largest_contrasts() -> None:
    sae, pairs = make_sae(), make_pairs()
    good, bad = reference(sae, pairs)
    delta = good.mean(0) - bad.mean(0)
    found = sae_signature(model(), sae, pairs, latents=6, batch_size=4)
    np.testing.assert_allclose(found.delta, delta, atol=1e-4)
    expected = np.argsort(-np.abs(delta))[:6]
    assert list(found.indices) == list(expected)
    np.testing.assert_allclose(found.weights, delta[expected], atol=1e-4)
    assert found.l0_good == pytest.approx((good != 0).sum(1).mean()) and found.n == 5 and found.fvu > 0
    assert found.site == SITE and found.read_position == "decision" and found.metadata["persona"] == "made up"
    assert list(found.keep(3).indices) == list(expected[:3])
    assert len(sae_signature(model(), sae, pairs).indices) == 1  # 1 % of 40, at least one


def test_zeros_are_no_part_of_a_signature() -> None:
    sae = make_sae()
    dead = sae.replace(threshold=jnp.where(jnp.arange(LATENTS) < 38, jnp.inf, sae.threshold))
    found = sae_signature(model(), dead, make_pairs(), latents=10)
    assert 1 <= len(found.indices) <= 2 and set(found.indices) <= {38, 39}
    with pytest.raises(UserError, match="no latent tells"):
        sae_signature(model(), sae.replace(threshold=jnp.full(LATENTS, jnp.inf)), make_pairs())


def test_controls_and_files(tmp_path: Path) -> None:
    found = sae_signature(model(), make_sae(), make_pairs(), latents=6)
    control = random_signature(found, 3)
    assert not set(control.indices) & set(found.indices) and list(control.weights) == list(found.weights)
    assert list(random_signature(found, 3).indices) == list(control.indices)
    with pytest.raises(UserError, match="use fewer latents"):
        random_signature(found.keep(30), 0)
    path = save_signature(found, tmp_path / "signature.safetensors")
    again = load_signature(path)
    for name, value in vars(found).items():
        np.testing.assert_array_equal(getattr(again, name), value, err_msg=name)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="not a readable"):
        load_signature(path)
    with pytest.raises(UserError, match="there is no signature"):
        load_signature(path.with_name("none"))


def test_an_sae_of_another_place_is_refused() -> None:
    with pytest.raises(UserError, match="width"):
        sae_signature(model(), make_sae(site_in="blocks.0.mlp.hook_post"), make_pairs())


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_the_objective_reads_these_latents_and_no_others(activation: str) -> None:
    sae = make_sae(activation=activation, k=7 if activation == "topk" else None)
    indices, weights = np.array([5, 31, 2], np.int32), np.array([1.0, -2.0, 0.5], np.float32)
    objective = latents_objective(sae, indices, weights, SITE)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(6, sae.d_in)), jnp.float32)
    expected = np.asarray(encode(sae, x), np.float64)[:, indices] @ weights
    assert (expected != 0).sum() > 2
    np.testing.assert_allclose(objective(Reads({SITE: x})), expected, rtol=1e-5, atol=1e-5)
    assert needs(objective, model().config).sites == (SITE,)
    wide = f"6,{LATENTS}]" in str(jax.make_jaxpr(lambda o, x: o(Reads({SITE: x})))(objective, x))
    assert wide == (activation == "topk")


def test_promoted_tokens_are_the_largest_logits() -> None:
    sae, tiny = make_sae(), model()
    unembed = tiny.params.embed.T if tiny.params.unembed is None else tiny.params.unembed
    logits = np.asarray(sae.W_dec[7] * tiny.params.final_norm, np.float64) @ np.asarray(unembed, np.float64)
    order = np.argsort(-logits[: len(tiny.tokenizer)])[:4]
    (found,) = promoted_tokens(tiny, sae, [7], top=4)
    assert found == tuple(tiny.tokenizer.decode([int(token)]) for token in order)


def test_an_entry_that_is_missing_is_named(tmp_path: Path) -> None:
    save_file({"indices": np.zeros(1, np.int32)}, tmp_path / "s.safetensors", {"format": FORMAT})
    with pytest.raises(UserError, match=r"do not fit together \(there is no 'site'\)"):
        load_signature(tmp_path / "s.safetensors")
