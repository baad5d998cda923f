"""Learned vectors: their loss against float64 NumPy, what is trained side by side, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsteer
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import shard_params
from jaxsteer.steer import learning
from jaxsteer.steer.completions import Example, completions_of
from jaxsteer.steer.learning import Learning, learn_vectors, vector_loss
from jaxsteer.steer.selectors import select
from tests.helpers.tiny import tiny_model
from tests.steer.plain import run

SITE = "blocks.1.hook_resid_post"
BOS = tiny_model().tokenizer.bos_token_id
SHORT = Learning(epochs=2, batch=4)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Of both signs, with contexts and completions of different lengths."""
    rng = np.random.default_rng(0)
    draw: Callable[[int], np.ndarray] = lambda n: rng.integers(3, 500, n).astype(np.int32)  # noqa: E731
    return [
        Example(context=draw(3 + i % 4), wanted=draw(1 + i % 3), unwanted=draw(2 + i % 2), sign=1 - 2 * (i % 2))
        for i in range(10)
    ]


def plain_loss(model: Model, examples: list[Example], vector: np.ndarray, amounts: np.ndarray, method: str) -> float:
    """The definition, a text at a time."""

    def log_p(context: np.ndarray, completion: np.ndarray, push: np.ndarray) -> float:
        def change(kind: str, layer: int, value: np.ndarray) -> np.ndarray:
            if (kind, layer) != ("hook_resid_post", 1):
                return value
            return value + np.concatenate([np.zeros((1, len(push))), np.tile(push, (len(value) - 1, 1))])

        logits, _ = run(model.params, model.config, np.concatenate([context, completion]), change)
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        at = len(context) - 1 + np.arange(len(completion))
        return float(table[at, completion].sum())

    losses = []
    for example, amount in zip(examples, amounts, strict=True):
        won, lost = example.wanted, example.unwanted
        won_p = log_p(example.context, won, amount * vector)
        if method == "ntp":
            losses.append(-won_p / len(won))
            continue
        lost_p = log_p(example.context, lost, amount * vector)
        none = np.zeros_like(vector)
        beta = max(0.02 * (log_p(example.context, lost, none) - log_p(example.context, won, none)), 1.0)
        losses.append(np.log1p(np.exp(-(beta * won_p / len(won) - lost_p / len(lost)))))
    return float(np.mean(losses))


@pytest.mark.parametrize("method", ["ntp", "po"])
def test_loss_and_gradient_are_those_of_the_definition_in_float64(
    model: Model, examples: list[Example], method: str
) -> None:
    few, options = examples[:2], Learning(method=method)
    rng = np.random.default_rng(1)
    vector = rng.standard_normal(model.config.d_model)
    amounts = np.asarray([e.sign for e in few]) * rng.uniform(0.2, 1.0, 2)
    program = learning._Program(model.config, options, "hook_resid_post", 1, 1)
    data = completions_of(model, few, options.both, 64)
    loss, slope = jax.value_and_grad(vector_loss)(
        jnp.asarray(vector, jnp.float32), model.params, data, select("all"), jnp.asarray(1),
        jnp.asarray(amounts, jnp.float32), program=program,
    )  # fmt: skip
    exact = lambda v: plain_loss(model, few, v, amounts, method)  # noqa: E731
    np.testing.assert_allclose(loss, exact(vector), rtol=1e-5)
    for entry in (0, 19):
        step = 1e-5 * np.eye(len(vector))[entry]
        slopes = (exact(vector + step) - exact(vector - step)) / 2e-5
        np.testing.assert_allclose(slope[entry], slopes, rtol=2e-4, atol=1e-6)


def test_a_vector_alone_and_among_64_is_the_same(model: Model, examples: list[Example]) -> None:
    sites = [f"blocks.{layer}.hook_resid_post" for layer in range(2)]
    among = learn_vectors(model, examples, sites, learning=SHORT, seeds=range(32))
    assert len(among) == 64 and among[40].sites == (sites[1],) and among[40].metadata["seed"] == "8"
    (alone,) = learn_vectors(model, examples, sites[1], learning=SHORT, seeds=[8])
    np.testing.assert_allclose(alone.arrays[sites[1]], among[40].arrays[sites[1]], rtol=0, atol=1e-6)
    assert np.abs(among[41].arrays[sites[1]] - alone.arrays[sites[1]]).max() > 1e-2  # another seed


def test_on_a_mesh_it_is_the_same(model: Model, examples: list[Example]) -> None:
    mesh = jaxsteer.make_mesh(model=2)
    spread = dataclasses.replace(model, params=shard_params(model.params, model.config, mesh), mesh=mesh)
    for one, other in zip(
        learn_vectors(model, examples, SITE, learning=SHORT, seeds=range(3)),
        learn_vectors(spread, examples, SITE, learning=SHORT, seeds=range(3)),
        strict=True,
    ):
        np.testing.assert_allclose(one.arrays[SITE], other.arrays[SITE], rtol=0, atol=1e-5)


def test_it_learns_and_says_so(model: Model, examples: list[Example]) -> None:
    for method in ("ntp", "po"):
        (vector,) = learn_vectors(model, examples, SITE, learning=Learning(method=method, batch=5, epochs=30))
        assert float(vector.metadata["loss_last"]) < float(vector.metadata["loss_first"]) - 0.1
        np.testing.assert_allclose(vector.coefficient, vector.norm(SITE) / vector.stream_norm(SITE), rtol=1e-6)
        tokens = np.arange(4, 16).reshape(2, 6)
        assert (
            jaxsteer.logits(model, tokens, edits=vector.edits(coefficient=0)) == jaxsteer.logits(model, tokens)
        ).all()


class Stop(Exception):
    """The end of a training that goes on later."""


def test_a_training_that_was_cut_off_goes_on_to_the_same_vectors(
    model: Model, examples: list[Example], tmp_path: Path
) -> None:
    file, options = tmp_path / "state.safetensors", Learning(epochs=8, batch=4)
    whole = learn_vectors(model, examples, SITE, learning=options, seeds=(0, 1))

    def stop(done: int, total: int, loss: float) -> Iterator[None]:
        if done < total:
            raise Stop

    with pytest.raises(Stop):
        learn_vectors(model, examples, SITE, learning=options, seeds=(0, 1), state=file, progress=stop)
    with pytest.raises(UserError, match="another training"):
        learn_vectors(model, examples, SITE, learning=options, seeds=(0, 2), state=file)
    again = learn_vectors(model, examples, SITE, learning=options, seeds=(0, 1), state=file)
    for one, other in zip(whole, again, strict=True):
        assert one.arrays[SITE].tobytes() == other.arrays[SITE].tobytes() and one.metadata == other.metadata
    assert not file.exists()


def test_other_data_of_the_same_sizes_compile_nothing(model: Model, examples: list[Example]) -> None:
    learn_vectors(model, examples, SITE, learning=SHORT)
    before = learning._advance._cache_size()
    turned = [dataclasses.replace(e, sign=-e.sign) for e in examples]
    learn_vectors(model, turned, SITE, learning=SHORT, seeds=[5])
    assert learning._advance._cache_size() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"examples": []}, "no examples were given"),
        ({"sites": ["blocks.0.hook_resid_post", "blocks.0.hook_mlp_out"]}, "one kind of site"),
        ({"sites": "hook_embed"}, "one kind of site in blocks"),
        ({"sites": "blocks.9.hook_resid_post"}, "beyond the last layer"),
        ({"unwanted": None}, "no unwanted completion"),
        ({"unwanted": np.asarray([5], np.int32), "wanted": np.asarray([5], np.int32)}, "the same completion"),
        ({"wanted": np.zeros(0, np.int32)}, "0 of what is wanted"),
        ({"sign": 2}, "sign 2"),
        ({"wanted": np.asarray([BOS, 5], np.int32)}, "begins with BOS"),
        ({"seeds": (0, 0)}, "different whole numbers"),
        ({"seeds": ()}, "at least one"),
        ({"context": np.arange(4000, dtype=np.int32) % 500}, "positions"),
        ({"learning": Learning(rate=-1.0)}, "above 0"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    model: Model, examples: list[Example], change: dict[str, object], said: str
) -> None:
    given: dict[str, object] = {"examples": examples[:2], "sites": SITE, "learning": Learning(), "seeds": (0,)}
    of_example = {name: value for name, value in change.items() if name not in given}
    given |= {name: value for name, value in change.items() if name in given}
    if of_example:
        given["examples"] = [dataclasses.replace(examples[0], **of_example)]
    with pytest.raises(UserError, match=said):
        learn_vectors(model, given["examples"], given["sites"], learning=given["learning"], seeds=given["seeds"])
