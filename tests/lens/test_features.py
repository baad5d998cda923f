"""Features: values are the model's own, strongest moments are those of a direct search, names mean what they say."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer import UserError, capture
from jaxsteer.lens.attribution import attribute_logits
from jaxsteer.lens.features import FeatureOptions, feature_examples, find_feature
from jaxsteer.models.model import Model
from jaxsteer.models.sites import parse_site
from jaxsteer.objectives import Projection, Reads
from jaxsteer.prompts import Conversation, build_slots
from jaxsteer.sae.texts import Rows, Sample, documents_of
from jaxsteer.steer import Vectors, save_vectors
from jaxsteer.study.named_objectives import Contexts, named_objective
from tests.helpers.tiny import CORPUS, tiny_model

SAMPLE = Sample(tokens=150, context=24, rows=4)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "texts.txt"
    path.write_text("\n".join(line for text in CORPUS for line in text.split("\n")))
    return path


@pytest.fixture(scope="module")
def vector_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vector = np.random.default_rng(1).standard_normal(32).astype(np.float32)
    arrays = {f"blocks.{i}.hook_resid_post": vector * (1 + i) for i in (0, 1)}
    return save_vectors(Vectors(arrays=arrays), tmp_path_factory.mktemp("v") / "v.safetensors")


def values(model: Model, ids: np.ndarray, name: str, vector_file: Path) -> np.ndarray:
    """float64 [B, T] of the feature, from the definition of its kind."""
    if name == "m1.n5":
        return np.asarray(capture(model, ids, ["blocks.1.mlp.hook_post"])["blocks.1.mlp.hook_post"][..., 5], np.float64)
    if name.startswith("a2.h3"):
        token = model.tokenizer(" river", add_special_tokens=False)["input_ids"][0]
        result = np.asarray(capture(model, ids, ["blocks.2.attn.hook_result"])["blocks.2.attn.hook_result"], np.float64)
        along = np.asarray(model.params.unembed[:, token] * model.params.final_norm, np.float64)
        return result[:, :, 3] @ along
    vector = np.random.default_rng(1).standard_normal(32).astype(np.float32).astype(np.float64) * 2
    return (
        np.asarray(capture(model, ids, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"], np.float64) @ vector
    )


def test_strongest_moments_are_those_of_a_direct_search(texts: Path, vector_file: Path):
    model = tiny_model()
    names = ["m1.n5", "a2.h3: river", f"{vector_file}:blocks.1.hook_resid_post"]
    features = [find_feature(model, name) for name in names]
    options = FeatureOptions(examples=3, around=2, controls=2)
    found = feature_examples(model, documents_of(model, [texts]), features, options, sample=SAMPLE)
    rows, moments, seen = Rows(documents_of(model, [texts]), rows=4, length=24, bos=model.tokenizer.bos_token_id), {}, 0
    while seen < 150:
        ids, mask, _ = rows.next()
        keep = mask & (np.arange(24) > 0) & (ids != model.tokenizer.bos_token_id)
        seen += int(keep.sum())
        for name in names:
            moments.setdefault(name, []).append((values(model, ids, name, vector_file), keep, ids))
    assert found.tokens == seen
    for name, one in zip(names, found.features, strict=True):
        counted = np.concatenate([value[keep] for value, keep, _ in moments[name]])
        assert one.mean == pytest.approx(counted.mean(), abs=1e-4)
        assert one.deviation == pytest.approx(counted.std(), rel=1e-3)
        assert one.largest == pytest.approx(counted.max(), rel=1e-4) and one.largest_z > 0 and one.control > 0
        tops = sorted(
            (np.where(k, v, -np.inf).max() for vs, ks, _ in moments[name] for v, k in zip(vs, ks)), reverse=True
        )
        assert one.examples[0].values[one.examples[0].peak] == pytest.approx(tops[0], rel=1e-4)
        best = [each.values[each.peak] for each in one.examples]
        assert best == sorted(best, reverse=True) and set(np.round(best, 3)) <= set(np.round(tops, 3))


def test_promoted_tokens_are_those_of_what_is_written():
    model = tiny_model()
    feature = find_feature(model, "m1.n5")
    assert feature.writes == pytest.approx(np.asarray(model.params.layers.down[1, 5]))
    texts = documents_of_words()
    found = feature_examples(model, texts, [feature], FeatureOptions(top=4, controls=0), sample=SAMPLE).features[0]
    logits = np.asarray(feature.writes * model.params.final_norm @ model.params.unembed)[: len(model.tokenizer)]
    assert found.promotes == tuple(model.tokenizer.decode([int(i)]) for i in np.argsort(-logits)[:4])
    low = FeatureOptions(top=4, controls=0, lowest=True)
    turned = feature_examples(model, texts, [feature], low, sample=SAMPLE).features[0]
    assert turned.promotes == found.suppresses and turned.mean == pytest.approx(-found.mean) and turned.name == "-m1.n5"


def documents_of_words():
    rng = np.random.default_rng(0)
    rows = [rng.integers(300, 500, 40).tolist() for _ in range(16)]
    return lambda i: rows[i % 16]


def test_a_head_adds_to_a_token_what_attribution_says():
    """The feature's value, divided by the last norm's scale, is the head's part of the logit."""
    model, text = tiny_model(), "the old town past the"
    feature = find_feature(model, "a1.h2: river")
    ids = np.asarray(model.tokenizer(text)["input_ids"])[None]
    seen = capture(model, ids, [feature.site, "ln_final.hook_scale"])
    value = np.asarray(seen[feature.site][0, -1]).ravel() @ feature.reads / float(seen["ln_final.hook_scale"][0, -1, 0])
    assert attribute_logits(model, [text], " river").heads[0, 1, 2] == pytest.approx(value, abs=1e-5)


def test_random_features_are_of_the_same_kind():
    model, rng = tiny_model(), np.random.default_rng(0)
    neuron, head = find_feature(model, "m0.n3"), find_feature(model, "a0.h1: river")
    drawn = neuron.random(rng)
    assert drawn[3] == 0 and (drawn != 0).sum() == 1 and drawn.max() == 1
    drawn = head.random(rng)
    assert set(np.flatnonzero(drawn)) <= set(range(8, 16))
    assert np.linalg.norm(drawn) == pytest.approx(np.linalg.norm(head.reads), rel=1e-5)


def test_a_search_can_be_asked_for_a_feature(vector_file: Path):
    model = tiny_model()
    slots = build_slots(model.tokenizer, [Conversation(text="the {prompt}")], 2)
    contexts = Contexts(model=model, slots=slots, answers=())
    for name in ("m1.n5", "a2.h3: river", f"{vector_file}:blocks.0.hook_resid_post"):
        made = named_objective(f"feature:{name}").make(contexts)
        feature = find_feature(model, name)
        assert isinstance(made, Projection) and made.site == feature.site
        site = parse_site(made.site, 3)
        shape = {"mlp.hook_post": (64,), "attn.hook_z": (4, 8), "hook_resid_post": (32,)}[site.kind]
        value = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
        scores = made(Reads({made.site: jnp.asarray(value)}))
        np.testing.assert_allclose(scores, value.reshape(2, -1) @ feature.reads, rtol=1e-4)


def test_result_survives_json_and_shows_itself(vector_file: Path):
    model = tiny_model()
    found = feature_examples(
        model, documents_of_words(), [find_feature(model, "m1.n5")], FeatureOptions(controls=1), sample=SAMPLE
    )
    assert type(found).from_json(found.to_json()) == found
    assert ">>" in found.table() and "promotes" in found.table() and "random ones reach" in found.table()
    assert len(found.to_rows()) == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m9.n1", "layers 0 to 2"),
        ("m0.n64", "neurons 0 to 63"),
        ("a0.h4: river", "heads 0 to 3"),
        ("a0.h1", "names no feature"),
        ("neuron 3", "names no feature"),
    ],
)
def test_bad_names(name: str, message: str):
    with pytest.raises(UserError, match=message):
        find_feature(tiny_model(), name)


def test_a_file_of_several_vectors_needs_a_site(vector_file: Path):
    with pytest.raises(UserError, match="holds vectors at 2 sites"):
        find_feature(tiny_model(), str(vector_file))
    with pytest.raises(UserError, match="no feature was given"):
        feature_examples(tiny_model(), documents_of_words(), [])
