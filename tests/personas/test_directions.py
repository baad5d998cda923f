"""Directions: against a float64 recomputation, planted ones, diagnostics, and the file."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.personas import (
    Direction,
    Item,
    Pairs,
    Persona,
    check_direction,
    contrast_pairs,
    diagnose,
    fit_direction,
    load_direction,
    mean_difference,
    pair_states,
    random_direction,
    response_pairs,
    role_pairs,
    save_direction,
    search_conversations,
    shuffled,
    swap,
    text_pairs,
)
from jaxsteer.personas.items import data_hash, group_of
from jaxsteer.prompts import Placement, build_slots, encode, question_conversation
from tests.helpers.tiny import KINDS, tiny_model

QUESTIONS = (
    "Which do you prefer?\n (A) A small reward now\n (B) A large reward later",
    "I am a careful person. Do you agree or disagree?\n (A) Agree, of course\n (B) Disagree",
    "Now?\n (A) now\n (B) later",
)
ITEMS = tuple(
    Item(id=f"q{i}", question=q, matching="(B)", not_matching="(A)", group=group_of(q)) for i, q in enumerate(QUESTIONS)
)
PERSONA = Persona(
    name="test",
    items=ITEMS,
    counter_cues=("Be frank.", "Wait a year."),
    pro_cues=("Please everyone.", "Take the money today.", "Agree."),
    data_hash=data_hash(ITEMS),
)
SITES = [
    "hook_embed",
    "blocks.0.hook_resid_pre",
    "blocks.0.hook_resid_post",
    "blocks.2.hook_resid_mid",
    "blocks.-1.hook_resid_post",
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def pairs(model):
    return contrast_pairs(model, PERSONA, ITEMS, "decision", split_seed=7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("style", "slot"), [("chat", "suffix"), ("chat", "system"), ("plain", "suffix")])
def test_pairs_of_every_read_position(kind, style, slot):
    model = tiny_model(kind)
    text = model.tokenizer.decode
    for read_position in ("published", "matched", "decision"):
        found = contrast_pairs(model, PERSONA, ITEMS, read_position, placement=Placement(style=style, slot=slot))
        assert len(found) == 2 * len(ITEMS) and found.read_position == read_position
        for good, bad, at, bad_at in zip(found.good, found.bad, found.good_read, found.bad_read, strict=True):
            assert at == len(good) - 1 and bad_at == len(bad) - 1
            if read_position == "decision":
                assert text([good[at]]).strip() == "(" == text([bad[bad_at]]).strip()
            else:
                assert text([good[at]]) == ")" and (good != bad).sum() == 1  # the letter alone differs
    assert text(found.good[0]).count("Be frank.") == 1 and "Be frank." not in text(found.bad[0])
    assert "Please everyone." in text(found.bad[1]) and "Take the money" in text(found.bad[2])


def test_letters_balance_exactly_and_labels_follow_the_swap(model):
    found = contrast_pairs(model, PERSONA, ITEMS, "published")
    assert sorted(found.good_letter) == ["(A)"] * 3 + ["(B)"] * 3
    decoded = [model.tokenizer.decode(row) for row in found.good]
    assert decoded[0].endswith("<|assistant|> (A)") and decoded[1].endswith("<|assistant|> (B)")
    assert "(A) A large reward later" in decoded[1]


def test_missing_cues_and_unknown_positions_say_what_to_do(model):
    bare = dataclasses.replace(PERSONA, pro_cues=())
    with pytest.raises(UserError, match="2 counter_cues and 0 pro_cues.*--read-position matched"):
        contrast_pairs(model, bare, ITEMS, "decision")
    with pytest.raises(UserError, match="published, matched, decision"):
        contrast_pairs(model, PERSONA, ITEMS, "middle")
    with pytest.raises(UserError, match="at least one"):
        contrast_pairs(model, PERSONA, (), "matched")
    with pytest.raises(UserError, match="published, matched, decision"):
        search_conversations(ITEMS, "middle")


def reference(model, pairs, sites):
    """Mean differences in float64 from the public capture, rows padded on the left to one length."""
    rows, n = (*pairs.good, *pairs.bad), len(pairs)
    longest = max(map(len, rows))
    tokens = np.stack([np.pad(row, (longest - len(row), 0)) for row in rows])
    mask = np.stack([np.arange(longest) >= longest - len(row) for row in rows])
    states = jaxsteer.capture(model, tokens, sites, mask)
    ends = [longest - len(row) + at for row, at in zip(rows, (*pairs.good_read, *pairs.bad_read), strict=True)]
    reads = {site: np.asarray(x, np.float64)[np.arange(2 * n), ends] for site, x in states.items()}
    return {site: x[:n].mean(0) - x[n:].mean(0) for site, x in reads.items()}


@pytest.mark.parametrize("read_position", ["decision", "published"])
def test_mean_difference_is_the_mean_of_unpadded_rows(model, read_position):
    pairs = contrast_pairs(model, PERSONA, ITEMS, read_position)
    direction = mean_difference(model, pairs, SITES)
    assert direction.sites[-1] == "blocks.2.hook_resid_post" and direction.n == 6
    expected = reference(model, pairs, direction.sites)
    for site in direction.sites:
        np.testing.assert_allclose(direction.delta[site], expected[site], atol=2e-6)
        assert direction.delta[site].dtype == np.float32
    assert np.linalg.norm(direction.delta["blocks.2.hook_resid_post"]) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_result_does_not_depend_on_the_batch_size(model, pairs, batch_size):
    one, other = (mean_difference(model, pairs, SITES, batch_size=size) for size in (32, batch_size))
    for site in one.sites:
        np.testing.assert_allclose(one.delta[site], other.delta[site], atol=2e-6)
        assert one.mean_resid_norm[site] == pytest.approx(other.mean_resid_norm[site], rel=1e-5)


def test_few_shapes_are_compiled(model, pairs, compile_counter):
    model = resized(model, norm_eps=1e-4)  # never seen before
    with compile_counter() as count:
        mean_difference(model, pairs, SITES)
    assert count["read_batch"] == len({-(-len(row) // 32) for row in (*pairs.good, *pairs.bad)})


def planted_pairs(model, good_tokens, bad_tokens, n=40, seed=0):
    """Random rows of several lengths that end in one of the good or bad tokens."""
    rng = np.random.default_rng(seed)

    def rows(ends):
        return tuple(
            np.append(rng.integers(8, 200, size=rng.integers(3, 40)), rng.choice(ends)).astype(np.int32)
            for _ in range(n)
        )

    good, bad = rows(good_tokens), rows(bad_tokens)
    return Pairs(
        good=good,
        bad=bad,
        good_read=np.asarray([len(r) - 1 for r in good]),
        bad_read=np.asarray([len(r) - 1 for r in bad]),
        good_letter=("",) * n,
        groups=tuple(f"g{i}" for i in range(n)),
        read_position="matched",
        recipe={},
    )


def test_a_planted_direction_is_recovered_and_points_from_bad_to_good():
    """Tokens 300-303 carry +u, 310-313 carry -u: the direction is u, at every site, in all diagnostics."""
    model = tiny_model()
    u = np.random.default_rng(3).standard_normal(model.config.d_model)
    u *= 20 / np.linalg.norm(u)
    embed = model.params.embed.at[300:304].add(u).at[310:314].add(-u)
    model = dataclasses.replace(model, params=model.params.replace(embed=jnp.asarray(embed, jnp.float32)))
    train, held_out = (planted_pairs(model, range(300, 304), range(310, 314), seed=s) for s in (0, 1))
    sites = ["hook_embed", "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    direction = diagnose(model, mean_difference(model, train, sites), held_out)
    for site in direction.sites:
        assert direction.unit(site) @ u / np.linalg.norm(u) > 0.95
        assert direction.diagnostics[site]["auroc"] > 0.99
        assert direction.diagnostics[site]["split_half_cosine"] > 0.95
    flipped = mean_difference(
        model,
        dataclasses.replace(train, good=train.bad, bad=train.good, good_read=train.bad_read, bad_read=train.good_read),
        sites,
    )
    for site in sites:
        np.testing.assert_allclose(flipped.delta[site], -direction.delta[site], atol=1e-5)


def test_estimators_and_what_held_out_pairs_say(model, pairs):
    """Against NumPy on the same states; a planted axis; labels that mean nothing."""
    site = "blocks.2.hook_resid_post"
    (states,) = pair_states(model, pairs, site).astype(np.float64)
    good, bad = states
    mean = fit_direction(model, pairs, site).delta[site]
    np.testing.assert_allclose(mean, (good - bad).mean(0), atol=1e-5)
    found = {name: fit_direction(model, pairs, site, name) for name in ("pca", "logistic")}
    for direction in found.values():
        assert np.linalg.norm(direction.delta[site]) == pytest.approx(np.linalg.norm(mean), rel=1e-5)
        assert direction.delta[site] @ mean > 0
    values, axes = np.linalg.eigh((good - bad).T @ (good - bad))
    assert abs(axes[:, -1] @ found["pca"].unit(site)) == pytest.approx(1, abs=1e-5)
    facts = diagnose(model, found["logistic"], pairs).diagnostics[site]
    unit = found["logistic"].unit(site)
    gaps = (good - bad) / np.linalg.norm(good - bad, axis=-1, keepdims=True)
    assert facts["agreement"] == pytest.approx((gaps @ unit).mean(), abs=1e-5)
    spread = np.sqrt(((good @ unit).var() + (bad @ unit).var()) / 2)
    assert facts["separability"] == pytest.approx(((good - bad) @ unit).mean() / spread, rel=1e-3)
    mixed = shuffled(pairs, 0)
    swapped = {
        group for group, now, before in zip(pairs.groups, mixed.good, pairs.good, strict=True) if now is not before
    }
    assert len(swapped) == (len(set(pairs.groups)) + 1) // 2 and "shuffled" in mixed.recipe["contrast"]
    signs = np.where([group in swapped for group in pairs.groups], -1, 1)[:, None]
    np.testing.assert_allclose(fit_direction(model, mixed, site).delta[site], ((good - bad) * signs).mean(0), atol=1e-5)
    with pytest.raises(UserError, match="unknown estimator 'median'"):
        fit_direction(model, pairs, SITES, "median")


def test_letter_diagnostics_are_only_there_for_answers(model, pairs):
    site = "blocks.2.hook_resid_post"
    assert np.isnan(mean_difference(model, pairs, SITES).diagnostics[site]["letter_cosine"])
    unbalanced = contrast_pairs(model, PERSONA, ITEMS, "published")
    keep = slice(0, None, 2)  # original order only: every good answer is (A), so the letter is all there is
    one_letter = dataclasses.replace(
        unbalanced,
        **{k: getattr(unbalanced, k)[keep] for k in ("good", "bad", "good_read", "bad_read", "good_letter", "groups")},
    )
    assert mean_difference(model, one_letter, SITES).diagnostics[site]["letter_cosine"] == pytest.approx(1.0)
    balanced = mean_difference(model, unbalanced, SITES).diagnostics[site]["letter_cosine"]
    assert abs(balanced) < 0.9


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("blocks.0.attn.hook_q", "expected one of"),
        ("blocks.9.hook_resid_post", "beyond the last layer"),
        ([], "no site"),
    ],
)
def test_sites_that_hold_no_direction_are_refused(model, pairs, sites, message):
    with pytest.raises(UserError, match=message):
        mean_difference(model, pairs, sites)


def test_texts_beyond_the_models_positions_are_refused(model, pairs):
    short = resized(model, max_positions=16)
    with pytest.raises(UserError, match="16 positions"):
        mean_difference(short, pairs, SITES)


def test_nan_activations_are_refused(model, pairs):
    broken = dataclasses.replace(model, params=jax.tree.map(lambda p: p * jnp.nan, model.params))
    with pytest.raises(UserError, match="NaN"):
        mean_difference(broken, pairs, SITES)


def test_files_come_back_as_they_were(tmp_path, model, pairs):
    direction = diagnose(model, mean_difference(model, pairs, SITES), pairs)
    path = save_direction(direction, tmp_path / "run" / "direction.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["direction.safetensors"]
    back = load_direction(path, model=model)
    assert back.sites == direction.sites and back.n == direction.n and back.read_position == "decision"
    for site in direction.sites:
        np.testing.assert_array_equal(back.delta[site], direction.delta[site])
        assert back.mean_resid_norm[site] == pytest.approx(direction.mean_resid_norm[site])
    assert back.metadata == direction.metadata
    assert back.metadata["fingerprint"] == model.fingerprint and back.metadata["split_seed"] == "7"
    assert back.metadata["sign"] == "matching→not matching" and back.metadata["dataset_hash"] == PERSONA.data_hash
    assert back.diagnostics.keys() == direction.diagnostics.keys()


def test_a_failed_write_leaves_the_old_file(tmp_path, model, pairs, monkeypatch):
    direction = mean_difference(model, pairs, SITES)
    path = save_direction(direction, tmp_path / "direction.safetensors")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_direction(dataclasses.replace(direction, n=99), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def resized(model, **sizes):
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **sizes))


def test_a_direction_of_another_model_is_refused_or_warned_about(tmp_path, model, pairs, caplog):
    path = save_direction(mean_difference(model, pairs, SITES), tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="width 48"):
        load_direction(path, model=resized(model, d_model=48))
    with pytest.raises(UserError, match="beyond the last layer"):
        load_direction(path, model=resized(model, n_layers=1, windows=(2**30,), rope_index=(0,)))
    with caplog.at_level(logging.WARNING):
        check_direction(load_direction(path), model)
        assert not caplog.text
        load_direction(path, model=dataclasses.replace(model, fingerprint="1" * 64))
    assert "not on the weights of tiny-organism" in caplog.text


def test_files_that_are_no_directions_are_refused(tmp_path, model, pairs):
    other = tmp_path / "other.safetensors"
    save_file({"x": np.zeros(3, np.float32)}, other)
    with pytest.raises(UserError, match="format None, expected 'jaxsteer.direction/1'"):
        load_direction(other)
    good = save_direction(mean_difference(model, pairs, SITES), tmp_path / "d.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-40])
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_direction(cut)
    with pytest.raises(UserError, match="no direction file"):
        load_direction(tmp_path / "absent.safetensors")
    save_file({"x": np.zeros(3, np.float32)}, other, {"format": "jaxsteer.direction/1", "sites": '["y"]'})
    with pytest.raises(UserError, match="damaged"):
        load_direction(other)


def test_random_controls_have_the_same_norms(model, pairs):
    direction = mean_difference(model, pairs, SITES)
    control = random_direction(direction, seed=1)
    for site in direction.sites:
        assert np.linalg.norm(control.delta[site]) == pytest.approx(np.linalg.norm(direction.delta[site]), rel=1e-5)
        assert abs(control.unit(site) @ direction.unit(site)) < 0.7
    assert "random" in control.metadata["estimator"]
    zero = Direction(
        delta={"s": np.zeros(3, np.float32)}, mean_resid_norm={}, n=1, read_position="matched", metadata={}
    )
    with pytest.raises(UserError, match="is zero"):
        zero.unit("s")


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_search_contexts_read_where_the_direction_was_read(model, style):
    """test_defect_12: one text format for direction and search."""
    counts = {"published": 1, "matched": 4, "decision": 2}
    for read_position, per_item in counts.items():
        contexts = search_conversations(ITEMS, read_position, placement=Placement(style=style))
        assert len(contexts) == per_item * len(ITEMS)
        conversations, reads = zip(*contexts, strict=True)
        slots = build_slots(model.tokenizer, conversations, 3, read=reads)
        if read_position == "published":
            assert (slots.read_index == 2).all()
            continue
        last = {model.tokenizer.decode([after[-1]]).strip() for after in slots.after}
        assert last == ({")"} if read_position == "matched" else {"("})
        cue = encode(model.tokenizer, conversations[0], PERSONA.counter_cues[0])
        if read_position == "decision":
            np.testing.assert_array_equal(
                cue, contrast_pairs(model, PERSONA, ITEMS, "decision", placement=Placement(style=style)).good[0]
            )
    both = {c.messages[-1]["content"] if c.messages else c.text for c, _ in contexts}
    assert len(both) == 2 * len(ITEMS) and any(swap(ITEMS[0]).question in text for text in both)


def test_a_direction_from_two_lists_of_texts() -> None:
    shown, others = ["Take the money now", "Hurry"], ["Wait a year for it", "Verify the claim", "Hello there"]
    model = tiny_model()
    pairs = text_pairs(model, shown, others, name="haste")
    found = mean_difference(model, pairs, ["blocks.1.hook_resid_post"]).delta["blocks.1.hook_resid_post"]
    states = []
    for side in (others[:2], shown):
        rows = [encode(model.tokenizer, question_conversation(text), "") for text in side]
        each = [
            jaxsteer.capture(model, row[None], ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"] for row in rows
        ]
        states.append(np.mean([np.asarray(state[0, -1], np.float64) for state in each], 0))
    np.testing.assert_allclose(found, states[0] - states[1], atol=1e-5)
    for one, other, said in (
        (shown, [], "a contrast needs texts of both signs: 2 show haste, and 0 do not"),
        (shown, ["hurry ", "Wait"], "1 texts stand on both sides of the contrast, for example 'hurry'"),
    ):
        with pytest.raises(UserError, match=said):
            text_pairs(model, one, other, name="haste")


def test_pairs_of_answers_and_of_a_role_are_read_where_they_say(model):
    """Against the text: a mean over the answer's own tokens, and the same question with and without the role."""
    persona = Persona.from_pairs(
        [("What is bread?", "Food, my friend.", "It is food."), ("Why rain?", "Arr.", "Because of clouds.")],
        role="You are a pirate.",
    )
    for side, answers in (("good", ("It is food.", "Because of clouds.")), ("bad", ("Food, my friend.", "Arr."))):
        pairs = response_pairs(model, persona, persona.items)
        for ids, mask, answer in zip(getattr(pairs, side), getattr(pairs, f"{side}_read"), answers, strict=True):
            assert model.tokenizer.decode(ids[mask]).strip() == answer
    pairs = role_pairs(model, persona, persona.items)
    for good, bad, question in zip(pairs.good, pairs.bad, ("What is bread?", "Why rain?"), strict=True):
        without, with_it = (model.tokenizer.decode(ids) for ids in (good, bad))
        assert "pirate" in with_it and "pirate" not in without and question in without and question in with_it
        assert good[-1] == bad[-1]
    assert set(mean_difference(model, pairs, SITES[1]).delta) == {SITES[1]}
    with pytest.raises(UserError, match="has no role"):
        role_pairs(model, dataclasses.replace(persona, role=""), persona.items)
