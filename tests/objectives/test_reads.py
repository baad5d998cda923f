"""What rows give to read, place by place against ``jaxsteer.capture``; and what tracing says of an objective."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.models.sites import KINDS, Site
from jaxsteer.models.transformer import embed, make_context, positions_of
from jaxsteer.objectives import Needs, Reads, needs
from jaxsteer.objectives.reads import KEYS, Layout, read
from tests.helpers.tiny import tiny_model

MODEL = tiny_model()
EXISTING = [kind for kind in KINDS.values() if kind.exists(MODEL.config)]
PLACES = [Site(layer, kind.name).name for kind in EXISTING for layer in ((0, 2) if kind.in_block else (0,))]
SITES = ["layers.-2", *PLACES]  # an alias and a negative layer among them
OVER_KEYS = ("attn.hook_pattern", "attn.hook_attn_scores")
SPANNED = [site for site in SITES if not site.endswith(OVER_KEYS)]


def layout(mask: np.ndarray, index: np.ndarray) -> Layout:
    """Rows whose tokens 2 ... 4 are the prompt."""
    own = np.arange(mask.shape[1])
    spans = {"prompt": mask & (own >= 2) & (own < 5), "tail": mask & (own >= 5)}
    keys = {**spans, "before": mask & (own < 2)}
    made = Layout(read=index, context=np.arange(len(mask)), spans=spans, keys=keys)  # type: ignore[arg-type]
    return jax.tree.map(jnp.asarray, made)


def test_every_place_reads_as_captured() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 400, (2, 7)).astype(np.int32)
    mask = np.arange(7) < np.array([[7], [6]])
    index = np.array([6, 4])
    wanted = Needs(sites=tuple(SITES), spans=tuple((site, "prompt") for site in SPANNED))

    @jax.jit
    def values(tokens: jax.Array, mask: jax.Array, where: Layout) -> tuple[dict, dict, dict]:
        context = make_context(MODEL.config, positions_of(mask), mask)
        x = embed(MODEL.params, MODEL.config, tokens, context.positions)
        reads, _, depth = read(MODEL.params, MODEL.config, wanted, x, context, where)
        assert depth == 3 and isinstance(reads, Reads)
        means = {site: reads.span_mean(site, "prompt") for site in SPANNED}
        return {site: reads[site] for site in SITES}, means, {name: reads.keys(name) for name in KEYS}

    got, means, keys = values(jnp.asarray(tokens), jnp.asarray(mask), layout(mask, index))
    want = {k: np.asarray(v, np.float64) for k, v in jaxsteer.capture(MODEL, tokens, SITES, mask).items()}
    for site in SITES:
        at = (range(2), slice(None), index) if site.endswith(OVER_KEYS) else (range(2), index)
        np.testing.assert_allclose(got[site], want[site][at], atol=1e-5, err_msg=site)
        assert got[site].dtype == jnp.float32
    for site in SPANNED:
        np.testing.assert_allclose(means[site], want[site][:, 2:5].mean(1), atol=1e-5, err_msg=site)
    assert {name: np.flatnonzero(mask[1]).tolist() for name, mask in keys.items()} == {
        "first": [0], "before": [0, 1], "prompt": [2, 3, 4], "tail": [5],
    }  # fmt: skip


def test_one_scan_whatever_is_read() -> None:
    """Compile time must not grow with the number of sites."""
    tokens, mask = jnp.ones((2, 7), jnp.int32), jnp.ones((2, 7), bool)

    def scans(*sites: str) -> int:
        def collect(tokens: jax.Array) -> jax.Array:
            context = make_context(MODEL.config, positions_of(mask), mask)
            x = embed(MODEL.params, MODEL.config, tokens, context.positions)
            where = layout(np.ones((2, 7), bool), np.array([6, 6]))
            reads, x, _ = read(MODEL.params, MODEL.config, Needs(sites=sites), x, context, where)
            return sum(reads[site].sum() for site in sites) + x.sum()

        return str(jax.make_jaxpr(collect)(tokens)).count("scan[")

    assert scans("blocks.2.hook_resid_post") == scans(*PLACES) == 1
    assert scans("blocks.0.hook_resid_pre") == 0  # embeddings need no block


def test_needs_are_found_by_tracing() -> None:
    def objective(reads: Reads) -> jax.Array:
        scores = reads["blocks.1.hook_resid_post"][:, 0] + reads["blocks.2.mlp.hook_post"].max(-1)
        scores += (reads["blocks.0.attn.hook_pattern"][:, 1] * reads.keys("before")).sum(-1)
        scores += reads.span_mean("blocks.0.hook_mlp_out", "tail")[:, 0]
        scores += jnp.where(reads.span_mask("prompt"), reads.span("layers.0")[..., 1], 0.0).max(-1)
        return scores + reads.context * reads.target_mask.sum(-1)

    found = needs(objective, MODEL.config)
    assert found == Needs(
        sites=("blocks.0.attn.hook_pattern", "blocks.1.hook_resid_post", "blocks.2.mlp.hook_post"),
        spans=(("blocks.0.hook_mlp_out", "tail"), ("layers.0", "prompt")),
    )
    assert found.depth(3) == 3 and Needs(sites=("blocks.1.hook_resid_pre",)).depth(3) == 1
    assert needs(lambda reads: reads.target_log_probs.sum(-1), MODEL.config) == Needs(target=True)
    assert needs(lambda reads: reads.logits.max(-1), MODEL.config) == Needs(logits=True)
    assert Needs(target=True).depth(3) == Needs(logits=True).depth(3) == 3


def test_a_signal_is_no_fault_of_the_objective() -> None:
    with pytest.raises(SystemExit):
        needs(lambda reads: sys.exit(143), MODEL.config)
    with pytest.raises(UserError, match="failed when it was traced"):
        needs(lambda reads: sys.exit(1), MODEL.config)


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (lambda reads: reads["blocks.9.hook_resid_post"][:, 0], "beyond the last layer"),
        (lambda reads: reads["blocks.1.attn.hook_x"][:, 0], "names no place"),
        (lambda reads: reads["blocks.1.hook_resid_post"], r"returned .*shape=\(3, 32\), dtype=float32"),
        (lambda reads: reads.logits.argmax(-1), "one float per row.*int32"),
        (lambda reads: (reads.logits[:, 0], 1), "one float per row.*it returned \\("),
        (lambda reads: None, "it returned None"),
        (lambda reads: jnp.zeros(3), "reads nothing"),
        (lambda reads: reads.span("blocks.1.attn.hook_pattern").sum((1, 2, 3)), "at the read position only"),
        (lambda reads: reads.span_mean("layers.1", "suffix")[:, 0], "there are prompt, tail"),
        (lambda reads: reads.logits[:, 0] if reads.logits.max() > 0 else reads.logits[:, 1], "without `if`"),
        (lambda reads: reads["blocks.1.hook_resid_post"] @ jnp.ones(7), "failed when it was traced.*TypeError"),
    ],
)  # fmt: skip
def test_objectives_that_cannot_work_are_refused(objective, says: str) -> None:  # noqa: ANN001
    with pytest.raises(UserError, match=says):
        needs(objective, MODEL.config)
