"""Attribution: the hand-computed circuit, nodes and edges, completeness, linear models, float64 derivatives."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError, steer
from jaxsteer.circuits.attribution import attribute_edges
from jaxsteer.circuits.graph import Graph
from jaxsteer.circuits.patching import patch
from jaxsteer.circuits.paths import patch_edges
from jaxsteer.circuits.rows import kl_difference, make_rows, reading_logits, token_difference
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import make_mesh, shard_params
from jaxsteer.models.sites import Site
from jaxsteer.objectives import LogitDifference
from jaxsteer.steer.edits import Edits
from tests.circuits.toy import toy
from tests.helpers.checkpoints import FAMILIES, family_config, random_model, tiny_config
from tests.steer import plain

RNG = np.random.default_rng(0)
TEXTS, OTHERS = ([RNG.integers(0, 67, n) for n in (6, 8)] for _ in range(2))
METRIC = LogitDifference(plus=np.asarray([3, 5]), minus=np.asarray([4, 60]))
MODEL = random_model(tiny_config(n_layers=2))
ROWS, SOURCE = make_rows(MODEL, TEXTS), make_rows(MODEL, OTHERS)
VECTOR = RNG.standard_normal(24)
PUSH = steer.add("blocks.0.hook_resid_post", VECTOR, 1.5)


def small(family: str) -> Model:
    return random_model(family_config(family, n_layers=3 if family == "gemma3" else 2))


def sizes(**fields: int) -> ModelConfig:
    return tiny_config(**(dict(d_model=24, d_head=2, n_kv_heads=fields["n_heads"]) | fields))


@pytest.mark.parametrize(
    ("config", "options", "edges"),
    [
        (sizes(n_layers=12, n_heads=12), {}, 32_491),  # GPT-2 small
        (sizes(n_layers=32, n_heads=32), {}, 1_592_881),  # Llama 3 8B, its key/value heads counted as query heads
        (sizes(n_layers=26, n_heads=8, n_kv_heads=4), {"start": 15, "per": "layer"}, 2_212),  # Gemma 2 2B, steered
        (sizes(n_layers=26, n_heads=8), {}, 74_218),  # Gemma 2 2B
    ],
)
def test_edges_are_as_many_as_published(config: ModelConfig, options: dict[str, Any], edges: int) -> None:
    graph = Graph.of(config, **options)
    assert graph.n_edges == edges == graph.edges.sum()


def test_edges_have_names() -> None:
    graph = Graph.of(tiny_config())
    assert graph.edge("a0.h3->a1.g1<k>") == (8 + 1 + 4 + 1, 4)
    for name, message in (("m1->a1.h0<q>", "writes after"), ("a0.h0->a1.h5<q>", "write for example 'input->a0.h0<q>'")):
        with pytest.raises(UserError, match=message):
            graph.edge(name)


BY_HAND = {
    "input->a0.h0<v>": 38, "input->a0.h1<v>": 86, "input->a1.h0<v>": 6, "input->a1.h1<v>": 14, "input->logits": 4,
    "a0.h0->a1.h0<v>": 10, "a0.h0->a1.h1<v>": 22, "a0.h0->logits": 6,
    "a0.h1->a1.h0<v>": 22, "a0.h1->a1.h1<v>": 50, "a0.h1->logits": 14,
    "a1.h0->logits": 38, "a1.h1->logits": 86,
}  # fmt: skip


@pytest.mark.parametrize("how", [dict(steps=1, rule="left"), dict(steps=3), dict(steps=2, method="activations")])
def test_the_circuit_computed_by_hand(how: dict[str, Any]) -> None:
    model, edits = toy()
    rows, source = make_rows(model, [[1]]), make_rows(model, [[0]])
    np.testing.assert_allclose(
        jaxsteer.logits(model, np.asarray([[0], [1]]), edits=edits)[:, 0], [[25, 49], [-25, -49]]
    )
    total = lambda reads: reads.logits.sum(-1)  # noqa: E731
    found = attribute_edges(model, rows, total, source, edits=edits, **how)
    scores = dict(zip(found.names, found.values, strict=True))
    assert {name: score for name, score in scores.items() if score} == pytest.approx(BY_HAND, rel=1e-6)
    exact = patch_edges(model, rows, total, source, list(BY_HAND), edits=edits)
    np.testing.assert_allclose(exact[0], list(BY_HAND.values()), rtol=1e-6)
    assert (found.base, found.target, found.node("input")) == pytest.approx((-74, 74, 148))
    assert sum(found.of(name) for name in BY_HAND if name.endswith("logits")) == pytest.approx(148)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *((family, "inputs") for family in FAMILIES),
        *((f, m) for f in ("gemma3", "gpt2") for m in ("activations", "nodes")),
    ],
)
def test_a_node_is_the_sum_of_its_edges(family: str, method: str) -> None:
    model = small(family)
    found = attribute_edges(model, ROWS, METRIC, SOURCE, steps=2, method=method)
    np.testing.assert_allclose(found.matrix.sum(0), found.nodes, rtol=1e-5, atol=1e-5 * np.abs(found.nodes).max())
    assert np.abs(found.nodes).min() > 1e-6 and len(found.nodes) == 1 + model.config.n_layers * 5


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_error_of_completeness_falls_by_four(family: str) -> None:
    model, errors, counts = small(family), [], (8, 16, 32)
    rows = make_rows(model, TEXTS)
    base, steered = (reading_logits(model, rows, each) for each in (None, PUSH))
    metric = kl_difference(base, steered)
    for steps in counts:
        found = attribute_edges(model, rows, metric, PUSH, start=1, steps=steps)
        errors.append(abs(found.nodes[0] - (found.target - found.base)))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-2, abs=0.3) and errors[-1] < 0.01 * abs(found.target - found.base)


def test_left_ends_and_middles_are_the_left_ends_of_twice_as_many_steps() -> None:
    """k / steps, k = 0 ... steps - 1, never the end, as released code has it; and the middles between."""
    take = lambda steps, rule: attribute_edges(MODEL, ROWS, METRIC, SOURCE, steps=steps, rule=rule)  # noqa: E731
    left, middle, twice = take(3, "left"), take(3, "midpoint"), take(6, "left")
    np.testing.assert_allclose((left.matrix + middle.matrix) / 2, twice.matrix, atol=1e-5)
    assert np.abs(left.matrix - middle.matrix).max() > 0.01


def test_half_the_way_is_the_way_to_the_middle() -> None:
    """With a vector, gradients on the first half of the way are those of the whole way of half the vector."""
    half = steer.add("blocks.0.hook_resid_post", VECTOR, 0.75)
    first = attribute_edges(MODEL, ROWS, METRIC, PUSH, start=1, steps=4, rule="half")
    whole = attribute_edges(MODEL, ROWS, METRIC, half, start=1, steps=4)
    assert first.node("input") == pytest.approx(2 * whole.node("input"), rel=1e-4)
    assert first.of("input->logits") == pytest.approx(2 * whole.of("input->logits"), rel=1e-4)


def test_the_activations_of_a_layer_tend_to_its_exact_effect() -> None:
    model = small("gemma3")
    found = attribute_edges(model, ROWS, METRIC, SOURCE, steps=16, method="activations")
    nodes = np.asarray(found.nodes[1:]).reshape(3, 5)
    for kind, scores in (("hook_attn_out", nodes[:, :4].sum(1)), ("hook_mlp_out", nodes[:, 4])):
        exact = patch(model, ROWS, METRIC, kind, SOURCE, positions="together").mean()
        np.testing.assert_allclose(scores, exact, atol=5e-3 * np.abs(exact).max())


def test_every_node_s_own_line_leads_to_its_exact_effect() -> None:
    model = small("llama")
    found = attribute_edges(model, ROWS, METRIC, SOURCE, steps=16, method="nodes")
    nodes = np.asarray(found.nodes[1:]).reshape(2, 5)
    heads = patch(model, ROWS, METRIC, "attn.hook_z", SOURCE, positions="together", heads="each").mean()
    mlps = patch(model, ROWS, METRIC, "hook_mlp_out", SOURCE, positions="together").mean()
    exact = np.concatenate([heads, mlps[:, None]], axis=1)
    np.testing.assert_allclose(nodes, exact, atol=5e-3 * np.abs(exact).max())
    together = attribute_edges(model, ROWS, METRIC, SOURCE, steps=16, method="activations").nodes[1:5]
    assert np.abs(together - exact[0, :4]).max() > 0.02 * np.abs(exact).max()


def test_a_linear_model_has_exact_edges() -> None:
    """Patterns, norms and gates fixed to those of the run: what is left is linear in the stream."""
    kinds = ("attn.hook_pattern", "ln1.hook_scale", "ln2.hook_scale", "mlp.hook_pre")
    sites = [f"blocks.{layer}.{kind}" for layer in range(2) for kind in kinds] + ["ln_final.hook_scale"]
    rows, source = ROWS.take([1]), SOURCE.take([1])
    states = jaxsteer.capture(MODEL, rows.tokens, sites, rows.mask)
    edits = Edits(tuple(steer.replace(site, value) for site, value in states.items()))
    found = attribute_edges(MODEL, rows, METRIC, source, edits=edits, steps=1, rule="left")
    names = [name for name in found.names if not name.endswith(("<q>", "<k>"))]
    exact = patch_edges(MODEL, rows, METRIC, source, names, edits=edits)[0]
    np.testing.assert_allclose([found.of(name) for name in names], exact, atol=2e-5 * np.abs(exact).max())
    assert found.node("input") == pytest.approx(found.target - found.base, rel=1e-4)
    assert not any(found.of(name) for name in set(found.names) - set(names))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_edges_against_a_float64_model(family: str) -> None:
    """EAP is the derivative of the exact effect; both from ``plain.run``, which shares no code with the package."""
    model = small(family)
    params, config, length = model.params, model.config, 6
    tokens, others = (np.asarray(rows.tokens[0, :length]) for rows in (ROWS, SOURCE))
    rows, source = ROWS.take([0]), SOURCE.take([0])
    states = [plain.run(params, config, each, lambda kind, layer, value: value)[1] for each in (tokens, others)]

    def wrote(name: str) -> np.ndarray:
        def of(seen: dict[str, np.ndarray]) -> np.ndarray:
            if name == "input":
                return seen["hook_embed"]
            if name.startswith("m"):
                return seen[f"blocks.{name[1:]}.hook_mlp_out"]
            layer, head = name[1:].split(".h")
            result = seen[f"blocks.{layer}.attn.hook_result"][:, int(head)]
            if not config.post_norms:
                return result
            weight = 1 + np.asarray(params.layers.post_attn_norm[int(layer)], np.float64)
            return result / seen[f"blocks.{layer}.ln1_post.hook_scale"] * weight

        return of(states[1]) - of(states[0])

    def effect(edge: str, share: float) -> float:
        writer, _, name = edge.partition("->")
        reader = next(each for each in Graph.of(config).readers if each.name == name)

        def change(kind: str, layer: int, value: np.ndarray) -> np.ndarray:
            if (kind, layer) != (reader.site, reader.layer):
                return value
            value = np.array(value)
            place = value if reader.head < 0 else value[:, reader.head]
            place += share * wrote(writer)
            return value

        logits = plain.run(params, config, tokens, change)[0][-1]
        return float(logits[3] - logits[4])

    names = ["input->a0.h1<q>", "input->a1.g1<k>", "a0.h2->a1.h3<q>", "a0.h0->a1.g0<v>", "a0.h3->a1.g1<k>", "m0->m1"]
    names += ["a0.h1->m0", "a1.h2->logits", "m0->a1.h0<q>", "input->m1", "m1->logits"]
    exact = patch_edges(model, rows, METRIC, source, names)[0]
    first = attribute_edges(model, rows, METRIC, source, steps=1, rule="left")
    for name, ours in zip(names, exact, strict=True):
        assert ours == pytest.approx(effect(name, 1) - effect(name, 0), abs=1e-4, rel=1e-3), name
        slope = (effect(name, 1e-5) - effect(name, -1e-5)) / 2e-5
        assert first.of(name) == pytest.approx(slope, abs=1e-5, rel=1e-3), name


def test_rows_count_by_their_readings_whatever_the_batch() -> None:
    rows = ROWS.reading([[2, 4, 5], [-1]])
    base, steered = (reading_logits(MODEL, rows, each) for each in (None, PUSH))
    metric = token_difference(base, steered)
    whole = attribute_edges(MODEL, rows, metric, PUSH, start=1, steps=3)
    alone = [attribute_edges(MODEL, rows.take([i]), metric, PUSH, start=1, steps=3) for i in range(2)]
    np.testing.assert_allclose(0.75 * alone[0].matrix + 0.25 * alone[1].matrix, whole.matrix, atol=1e-5)
    batched = attribute_edges(MODEL, rows, metric, PUSH, start=1, steps=3, batch=1)
    np.testing.assert_allclose(batched.values, whole.values, atol=1e-5)
    layers = attribute_edges(MODEL, rows, metric, PUSH, start=1, steps=3, per="layer")
    assert layers.of("input->a1<q>") == pytest.approx(sum(whole.of(f"input->a1.h{i}<q>") for i in range(4)), abs=1e-5)
    assert layers.of("input->a1<v>") == pytest.approx(sum(whole.of(f"input->a1.g{i}<v>") for i in range(2)), abs=1e-5)
    mesh = make_mesh(prompts=2)
    model = dataclasses.replace(MODEL, params=shard_params(MODEL.params, MODEL.config, mesh), mesh=mesh)
    spread = attribute_edges(model, rows, metric, PUSH, start=1, steps=3)
    np.testing.assert_allclose(spread.values, whole.values, atol=1e-5)
    again = type(whole).from_json(whole.to_json())
    assert again == whole and "edges of random" in whole.table() and len(whole.to_rows()) == whole.graph.n_edges


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 2}, "start is 2, but this model has blocks 0 to 1"),
        ({"source": PUSH, "start": 0}, "choose start"),
        ({"method": "input"}, "method must be one of inputs, activations, nodes"),
        ({"source": make_rows(MODEL, TEXTS[::-1])}, "row 0 has 6 tokens and its source has 8"),
        ({"metric": lambda reads: reads.logits[:, 0] * jnp.nan}, "NaN or infinite"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    given = {"metric": METRIC, "source": SOURCE, "steps": 1} | changes
    with pytest.raises(UserError, match=message):
        attribute_edges(MODEL, ROWS, **given)


def test_names_of_sites_stay_those_of_the_table() -> None:
    assert all(Site(reader.layer, reader.site).name for reader in Graph.of(MODEL.config).readers)
