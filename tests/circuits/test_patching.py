"""Exact patching: against one forward per patch, its own values, and other devices; what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import jaxsteer
from jaxsteer import UserError, steer
from jaxsteer.circuits.patching import Mean, patch
from jaxsteer.circuits.rows import Rows, kl_difference, make_rows, reading_logits, token_difference
from jaxsteer.models.params import Params
from jaxsteer.models.sharding import make_mesh, shard_params
from jaxsteer.models.sites import KINDS, Site
from jaxsteer.objectives import LogitDifference, Projection, TargetLogProb
from tests.helpers.checkpoints import family_config, random_model

CONFIG = family_config("gemma3", n_layers=3)
MODEL = random_model(CONFIG)
RNG = np.random.default_rng(0)
TEXTS, OTHERS = ([RNG.integers(0, 67, n) for n in (7, 9)] for _ in range(2))
ROWS, SOURCE = make_rows(MODEL, TEXTS), make_rows(MODEL, OTHERS)
METRIC = LogitDifference(plus=np.asarray([3, 5]), minus=np.asarray([4, 60]))


def logit_differences(model: Any, rows: Rows, edits: Any = None) -> np.ndarray:
    """``METRIC`` of the last token of every row, one plain forward."""
    logits = np.asarray(jaxsteer.logits(model, rows.tokens, rows.mask, edits=edits), np.float64)
    last = logits[np.arange(len(logits)), rows.lengths - 1]
    return last[np.arange(len(last)), METRIC.plus] - last[np.arange(len(last)), METRIC.minus]


SWEEPS = [(kind, "each", "together") for kind in ("hook_resid_pre", "hook_mlp_out", "mlp.hook_post", "ln1.hook_scale")]
SWEEPS += [(kind, "each", "each") for kind in ("attn.hook_z", "attn.hook_v", "hook_k_input", "attn.hook_pattern")]
SWEEPS += [("attn.hook_result", "together", "each"), ("hook_embed", "each", "together")]
SWEEPS += [("ln_final.hook_normalized", "each", "together")]


@pytest.mark.parametrize(("kind", "positions", "heads"), SWEEPS)
def test_a_sweep_is_one_forward_per_patch(kind: str, positions: str, heads: str) -> None:
    found = patch(MODEL, ROWS, METRIC, kind, SOURCE, positions=positions, heads=heads, at_once=8)
    assert found.axes == ("row", "layer", *["position"] * (positions == "each"), *["head"] * (heads == "each"))
    np.testing.assert_allclose(found.base, logit_differences(MODEL, ROWS), atol=1e-4)
    np.testing.assert_allclose(found.other, logit_differences(MODEL, SOURCE), atol=1e-4)
    effects = found.effects if heads == "each" else found.effects[..., None]
    effects = effects if positions == "each" else effects[:, :, None]
    sites = [Site(layer, kind).name for layer in found.layers]
    own, states = (jaxsteer.capture(MODEL, rows.tokens, sites, rows.mask) for rows in (ROWS, SOURCE))
    rng, checked = np.random.default_rng(1), 0
    for index in rng.permutation(effects[0].size)[:8]:
        layer, position, head = np.unravel_index(index, effects.shape[1:])
        value, one = states[sites[layer]], int(head) if heads == "each" else None
        at = [int(position)] if positions == "each" else slice(0, None)
        if KINDS[kind].over_keys:  # the run's own pattern but for one head's query
            mixed = np.array(own[sites[layer]])
            mixed[:, one, position] = value[:, one, position]
            edit = steer.replace(sites[layer], mixed)
        else:
            edit = steer.replace(sites[layer], value if one is None else value[:, :, one], positions=at, head=one)
        expected = logit_differences(MODEL, ROWS, edit) - logit_differences(MODEL, ROWS)
        seen, there = effects[:, layer, position, head], position < ROWS.lengths
        np.testing.assert_allclose(seen[there], expected[there], atol=2e-4)
        assert np.isnan(seen[~there]).all()
        checked += np.abs(expected).max() > 1e-3
    assert checked


@pytest.mark.parametrize("kind", ["hook_resid_mid", "attn.hook_z", "attn.hook_pattern", "hook_q_input"])
@pytest.mark.parametrize("at_once", [4, 64])
def test_its_own_values_change_no_bit(kind: str, at_once: int) -> None:
    steered = steer.add("blocks.0.hook_resid_post", np.ones(CONFIG.d_model), 0.5)
    heads = "each" if KINDS[kind].heads else "together"
    for edits, source in ((None, ROWS), (steered, ROWS), (steered, steered)):
        found = patch(MODEL, ROWS, METRIC, kind, source, edits=edits, heads=heads, at_once=at_once)
        assert not np.nan_to_num(found.effects).any()


def test_all_positions_of_the_steered_stream_are_the_whole_effect() -> None:
    edit = steer.add("blocks.0.hook_resid_post", np.ones(CONFIG.d_model), 0.5)
    base, steered = (reading_logits(MODEL, ROWS, each) for each in (None, edit))
    for metric in (METRIC, token_difference(base, steered), kl_difference(base, steered)):
        found = patch(MODEL, ROWS, metric, "hook_resid_pre", edit, layers=[1, 2], positions="together")
        whole = np.asarray(found.other) - np.asarray(found.base)
        np.testing.assert_allclose(found.effects, np.repeat(whole[:, None], 2, 1), atol=1e-4)
        assert np.abs(whole).max() > 0.1


def test_the_last_mlp_under_a_fixed_norm_is_its_direct_logit_attribution() -> None:
    last, scale = "blocks.2.hook_mlp_out", "ln_final.hook_scale"
    own, other = (jaxsteer.capture(MODEL, rows.tokens, [last, scale], rows.mask) for rows in (ROWS, SOURCE))
    effects = []
    for row in range(2):  # the fixed norm is each row's own
        fixed = steer.replace(scale, own[scale][row])
        one = {"layers": [2], "positions": "together", "edits": fixed}
        effects += patch(MODEL, ROWS.take([row]), METRIC, "hook_mlp_out", SOURCE.take([row]), **one).values
    at = np.arange(2), ROWS.lengths - 1
    change = (np.asarray(other[last], np.float64) - own[last])[at] / np.asarray(own[scale])[at]
    table = np.asarray(MODEL.params.embed, np.float64)
    direction = (1 + np.asarray(MODEL.params.final_norm)) * (table[METRIC.plus] - table[METRIC.minus])
    np.testing.assert_allclose(effects, (change * direction).sum(-1), atol=1e-5)
    assert np.abs(effects).min() > 1e-3


def test_alone_and_among_others() -> None:
    whole = patch(MODEL, ROWS, METRIC, "attn.hook_z", SOURCE, heads="each")
    some = patch(MODEL, ROWS, METRIC, "attn.hook_z", SOURCE, layers=[2, 0], positions=[6, 2], heads=[3])
    np.testing.assert_allclose(some.effects, whole.effects[:, [2, 0]][:, :, [6, 2]][..., [3]], atol=1e-5)
    for row in range(2):
        alone = patch(MODEL, ROWS.take([row]), METRIC, "attn.hook_z", SOURCE.take([row]), heads="each")
        np.testing.assert_allclose(alone.effects[0], whole.effects[row][:, : ROWS.lengths[row]], atol=1e-5)


def test_one_device_and_eight() -> None:
    one = patch(MODEL, ROWS, METRIC, "attn.hook_z", SOURCE, heads="each")
    mesh = make_mesh(prompts=8)
    model = dataclasses.replace(MODEL, params=shard_params(MODEL.params, CONFIG, mesh), mesh=mesh)
    eight = patch(model, ROWS, METRIC, "attn.hook_z", SOURCE, heads="each")
    np.testing.assert_allclose(eight.effects, one.effects, atol=1e-5)


def test_one_program_whatever_the_layers_and_the_values(compile_counter: Any) -> None:
    given = dict(heads="each", at_once=10)  # of a size that no other test has
    with compile_counter() as count:
        patch(MODEL, ROWS, METRIC, "attn.hook_z", SOURCE, layers=[1], **given)
    assert count["walk_on"] == 1
    other = LogitDifference(plus=np.asarray([1, 2]), minus=np.asarray([7, 8]))
    with compile_counter() as count:
        patch(MODEL, SOURCE, other, "attn.hook_z", ROWS, **given)
    assert count["walk_on"] == 0


def test_nothing_below_the_patched_layer_is_run_again() -> None:
    """Layers of NaN weights below the patched one would show: the walk of a patch begins with the stream above them."""
    from jaxsteer.circuits import patching

    spans: list[tuple[int, int]] = []
    walk = patching.walk_on
    try:
        patching.walk_on = lambda *args, **more: (spans.append(tuple(map(int, args[7]))), walk(*args, **more))[1]
        patch(MODEL, ROWS, METRIC, "hook_resid_pre", SOURCE, layers=[2], at_once=8)
    finally:
        patching.walk_on = walk
    assert spans[0] == (0, 2) and spans[1] == (0, 3) and set(spans[2:]) == {(2, 3), (3, 3)}


def test_zero_and_means() -> None:
    zero = patch(MODEL, ROWS, METRIC, "hook_mlp_out", "zero", positions="together")
    base = logit_differences(MODEL, ROWS)
    expected = [logit_differences(MODEL, ROWS, steer.scale(f"blocks.{i}.hook_mlp_out", 0.0, positions="every")) - base
                for i in range(3)]  # fmt: skip
    np.testing.assert_allclose(zero.effects, np.stack(expected, 1), atol=2e-4)
    assert np.isnan(zero.other).all()
    states = jaxsteer.capture(MODEL, SOURCE.tokens, [f"blocks.{i}.hook_mlp_out" for i in range(3)], SOURCE.mask)
    values = np.stack([np.asarray(v) for v in states.values()])
    for per_position in (False, True):
        mean = Mean.over(MODEL, SOURCE, "hook_mlp_out", per_position=per_position)
        weights = SOURCE.mask / (SOURCE.mask.sum(0).clip(1) if per_position else SOURCE.mask.sum())
        expected = np.einsum("lbtd,bt->ltd" if per_position else "lbtd,bt->ld", values, weights)
        np.testing.assert_allclose(mean.values, expected, atol=1e-5)
        found = patch(MODEL, ROWS, METRIC, "hook_mlp_out", mean, positions="together", layers=[1])
        value = expected[1] if per_position else np.repeat(expected[1][None], ROWS.tokens.shape[1], 0)
        one = logit_differences(MODEL, ROWS, steer.replace("blocks.1.hook_mlp_out", value)) - base
        np.testing.assert_allclose(found.effects[:, 0], one, atol=2e-4)


def test_metrics_read_sites_and_answers() -> None:
    delta = RNG.standard_normal(CONFIG.d_model).astype(np.float32)
    found = patch(MODEL, ROWS, Projection(delta, "blocks.1.hook_resid_post"), "hook_resid_pre", SOURCE)
    assert not np.nan_to_num(found.effects[:, 2]).any() and np.abs(np.nan_to_num(found.effects[:, 1])).max() > 0.01
    rows = make_rows(MODEL, TEXTS, answers=[[1, 2], [3]])
    found = patch(MODEL, rows, TargetLogProb(), "hook_mlp_out", "zero", positions="together")
    logits = np.asarray(jaxsteer.logits(MODEL, rows.tokens, rows.mask), np.float64)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.base, [log[0, 6, 1] + log[0, 7, 2], log[1, 8, 3]], atol=1e-4)
    with pytest.raises(UserError, match="give answers to make_rows"):
        patch(MODEL, ROWS, TargetLogProb(), "hook_mlp_out", "zero")


def test_the_result_shows_itself() -> None:
    found = patch(MODEL, ROWS, METRIC, "attn.hook_z", SOURCE, heads="each")
    again = type(found).from_json(found.to_json())
    np.testing.assert_array_equal(again.effects, found.effects)
    rows = found.to_rows()
    assert len(rows) == 3 * 4 * (7 + 9) and set(rows[0]) == {"row", "layer", "position", "head", "effect", "metric"}
    assert "attn.hook_z of random" in found.table()
    plot = found.heat_map(head=1)
    assert "<svg" in plot.svg() and len(plot.rows) == 3 * len(found.positions)
    assert plot.rows[1]["effect"] == pytest.approx(np.nanmean(found.effects[:, 0, 1, 1]), abs=1e-6)
    with pytest.raises(UserError, match="choose one of the heads"):
        found.heat_map()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "attn.hook_zz"}, "did you mean 'attn.hook_z'"),
        ({"source": make_rows(MODEL, TEXTS[::-1])}, "row 0 has 7 tokens and its source has 9"),
        ({"source": "mean"}, "did you mean 'zero'"),
        ({"layers": [3]}, "different ones from 0 to 2"),
        ({"positions": [1, 1]}, "different ones from 0 to 8"),
        ({"positions": "all"}, "may be 'each', 'together' or a list"),
        ({"heads": "each"}, "there are no heads at hook_resid_pre"),
        ({"metric": lambda reads: reads.logits}, "one float per row"),
        ({"metric": lambda reads: reads.logits[:, 0] * np.nan}, "NaN or infinite without any patch"),
        ({"edits": steer.stack_rows([steer.add("blocks.0.hook_resid_post", np.ones(24))] * 2)}, "serve all rows"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    given = {"metric": METRIC, "kind": "hook_resid_pre", "source": SOURCE} | changes
    with pytest.raises(UserError, match=message):
        patch(MODEL, ROWS, **given)


def test_readings_are_checked() -> None:
    with pytest.raises(UserError, match="row 0 has 7 tokens and is to be read at"):
        ROWS.reading([[7], [0]])
    assert isinstance(MODEL.params, Params) and jax.tree.leaves(ROWS)[0].shape == (2, 12)
