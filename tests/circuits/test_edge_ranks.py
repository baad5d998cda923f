"""How well attribution ranks edges on the organism: against exact effects of all of them, with the values measured."""

from __future__ import annotations

import numpy as np
import pytest

import jaxsteer
from jaxsteer import steer
from jaxsteer.circuits.attribution import attribute_edges
from jaxsteer.circuits.paths import patch_edges
from jaxsteer.circuits.rows import make_rows
from jaxsteer.evals.refusal import opening_ids, refusal_score
from jaxsteer.models.reading import read_rows
from jaxsteer.models.sites import parse_site
from jaxsteer.organisms import persona_world
from jaxsteer.statistics import spearman

SITE = "blocks.3.hook_resid_post"


@pytest.mark.slow
def test_ranks_of_the_largest_edges() -> None:
    """The refusal vector of block 3, x 1.2, 32 harmless requests, the 110 edges from block 4 on, of them the largest
    tenth. Along half of every layer's own line the rank correlation is above 0.9, along whole lines it is not."""
    model = jaxsteer.load("organism:persona")
    openings = opening_ids(model, persona_world.REFUSAL_OPENINGS)
    metric = lambda reads: refusal_score(reads.logits, openings)  # noqa: E731
    asked = lambda requests: make_rows(model, [[{"role": "user", "content": r.text}] for r in requests])  # noqa: E731

    def mean_stream(kind: str) -> np.ndarray:
        rows = asked(persona_world.requests(kind, n=128, seed=0, split="train"))
        ids = [row[:length] for row, length in zip(rows.tokens, rows.lengths, strict=True)]
        return np.concatenate([s[0] for _, s in read_rows(model, ids, rows.read[:, 0], [parse_site(SITE)])]).mean(0)

    push = steer.add(SITE, mean_stream("harmful") - mean_stream("harmless"), 1.2)
    rows = asked(persona_world.requests("harmless", n=32, seed=20_000))
    exact = top = None
    found = {}
    for name, how in {
        "EAP": dict(steps=1, rule="left"),
        "EAP-IG": dict(steps=10),
        "activations": dict(steps=5, method="activations"),
        "activations, half": dict(steps=5, method="activations", rule="half"),
    }.items():
        scores = attribute_edges(model, rows, metric, push, start=4, **how)
        if exact is None:
            exact = patch_edges(model, rows, metric, push, scores.names, start=4).mean(0)
            top = np.argsort(-np.abs(exact))[:11]
        values = np.asarray(scores.values)[top]
        found[name] = spearman(exact[top], values), float((np.sign(exact[top]) == np.sign(values)).mean())
    assert len(exact) == 110
    ranks = {name: rank for name, (rank, _) in found.items()}
    golden = {"EAP": 0.755, "EAP-IG": 0.745, "activations": 0.845, "activations, half": 0.964}
    assert ranks == pytest.approx(golden, abs=0.02)
    assert ranks["activations, half"] >= 0.9
    assert [sign for _, sign in found.values()] == pytest.approx([10 / 11, 1, 1, 1])
