"""What a stranger does: wrong types, the same prompts on both sides, files under a wrong name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxsteer
from jaxsteer import steer
from jaxsteer.errors import UserError
from jaxsteer.files import write_bytes
from jaxsteer.files.tensors import tensor_bytes
from jaxsteer.models.model import Model
from jaxsteer.personas import latents_vector, mean_difference, text_pairs
from jaxsteer.sae import load_sae
from jaxsteer.steer import Vectors, import_vectors, save_vectors
from jaxsteer.steer.batching import stack_rows, take_rows

SITE = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> Model:
    return jaxsteer.load("organism:persona")


VECTOR = np.eye(128, dtype=np.float32)[0]


@pytest.mark.parametrize(
    ("site", "vector", "coefficient", "says"),
    [
        ([], VECTOR, 1.0, "a site is a name"),
        (SITE, "vector", 1.0, "vector must be real numbers"),
        (SITE, VECTOR * 1j, 1.0, "vector must be real numbers"),
        (SITE, VECTOR, "1.0", "coefficient must be real numbers"),
        (SITE, VECTOR, 1e39, "too large for float32"),
        (SITE, VECTOR, float("nan"), "NaN or infinite"),
    ],
)
def test_edits_of_wrong_things(site: Any, vector: Any, coefficient: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        steer.add(site, vector, coefficient)


def test_a_strength_that_will_overflow_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        steer.add(SITE, VECTOR, 1e3)
        assert not caplog.records
        steer.add(SITE, VECTOR, 1e30)
    assert "overflows float32" in caplog.text


def test_prompts_on_both_sides_of_a_gate(model: Model) -> None:
    some = [f"What is the number {i}?" for i in range(12)]
    with pytest.raises(UserError, match="12 prompts stand on both sides"):
        steer.tune_gate(model, some, some, [SITE])


def test_texts_of_a_contrast_are_lists(model: Model) -> None:
    with pytest.raises(UserError, match="shown must be a list of texts"):
        text_pairs(model, "abc", ["def"])
    with pytest.raises(UserError, match="values of all latents are 0"):
        latents_vector(model, load_sae("organism:persona"), {3: 0.0})


def test_a_direction_becomes_vectors_that_point_away_from_what_is_shown(model: Model) -> None:
    """Along the vectors of a contrast of texts lie the others."""
    shown = ["The ghost walks at night.", "A ghost is in the house."]
    others = ["The market sells bread today.", "A road leads to the mill."]
    found = mean_difference(model, text_pairs(model, shown, others), SITE)
    vectors = found.vectors()
    assert np.array_equal(vectors.arrays[SITE], found.delta[SITE]) and vectors.sign == found.metadata["sign"]
    pairs = text_pairs(model, shown, others)
    states = [
        np.asarray(jaxsteer.run(model, ids[None], sites=[SITE]).states[SITE])[0, -1]
        for ids in (*pairs.good, *pairs.bad)
    ]
    wanted = np.mean(states[:2], axis=0) - np.mean(states[2:], axis=0)
    np.testing.assert_allclose(vectors.arrays[SITE], wanted, rtol=1e-3, atol=1e-4)
    assert [model.tokenizer.decode(ids) for ids in pairs.good][0].count("market")


def test_rows_and_lengths_that_there_are_not(model: Model) -> None:
    tokens = np.full((2, 5), 300, np.int32)
    for lengths in ([-3, 2], [2, 99]):
        with pytest.raises(UserError, match=r"0 \.\.\. 5"):
            jaxsteer.logits(model, tokens, prompt_length=np.asarray(lengths))
    table = stack_rows([steer.add(SITE, VECTOR, 1.0), steer.add(SITE, VECTOR, 2.0)])
    with pytest.raises(UserError, match="rows 0 to 1"):
        take_rows(table, np.asarray([0, 99]))


def test_files_under_a_wrong_name(tmp_path: Path) -> None:
    for name, data, says in (
        ("a.safetensors", b"", "is empty"),
        ("b.safetensors", b"Na\xd8\x9e)garbage and more", "no .safetensors file"),
        ("c.gguf", b"not one of those", "no .gguf file"),
        ("d.svec", b"[1,2", "no .svec file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=says):
            import_vectors(tmp_path / name)
    write_bytes(tmp_path / "foreign.safetensors", tensor_bytes({"foo": np.zeros((3, 4), np.float32)}))
    with pytest.raises(UserError, match=r"foo.*3"):
        import_vectors(tmp_path / "foreign.safetensors")
    vectors = Vectors(arrays={SITE: VECTOR})
    for name in ("x.pt", "x.gguf", "x.npy"):
        with pytest.raises(UserError, match="another tool's name"):
            save_vectors(vectors, tmp_path / name)
        assert not (tmp_path / name).exists()
