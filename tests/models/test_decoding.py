"""Rows that join and leave a running batch: each gets the tokens that it gets alone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsteer.models.decoding import Batch, State, admit, decode, evict, grow, idle
from jaxsteer.models.model import Model
from jaxsteer.models.sampling import Decoding, Sampling, make_sampling
from tests.helpers.checkpoints import WINDOW, family_config, random_model
from tests.models.test_generation import push, run

WIDTH, SLOTS, PLACES = 16, 40, 3
SETTINGS = (dict(temperature=0.0), dict(seed=3), dict(seed=4, temperature=0.7, top_k=9, stop=[5]), dict(top_p=0.8))


def batch_of(prompt: np.ndarray, limit: int) -> Batch:
    """One row, padded on the left."""
    tokens = np.zeros((1, WIDTH), np.int32)
    tokens[0, WIDTH - len(prompt) :] = prompt
    mask = np.arange(WIDTH)[None] >= WIDTH - len(prompt)
    numbers = dict(groups=jnp.asarray([0]), rows=jnp.asarray([0]), limit=jnp.asarray([limit]))
    return Batch(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), **numbers)


def requests(model: Model, count: int) -> list[tuple[np.ndarray, int, Sampling, np.ndarray]]:
    """(prompt, limit, settings, tokens that it gets alone) of every request."""
    rng = np.random.default_rng(2)
    found = []
    for number in range(count):
        prompt = rng.integers(0, 67, rng.integers(3, WIDTH + 1)).astype(np.int32)
        limit, options = int(rng.integers(1, SLOTS - len(prompt) + 1)), SETTINGS[number % len(SETTINGS)]
        alone = run(model, [prompt], new=limit, **options)[0]
        found.append((prompt, limit, make_sampling(model, Decoding(**options)), alone[alone >= 0]))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_come_and_go_and_none_notices(family: str, compile_counter: type) -> None:
    """A batch of three places, whose ring of slots goes round many times, serves twelve requests; two end early."""
    model = random_model(family_config(family))
    waiting = list(enumerate(requests(model, 12)))
    state, rng = idle(model.params, model.config, PLACES, slots=SLOTS), np.random.default_rng(5)
    held: dict[int, int] = {}
    cut, steps = {4: 3, 9: 6}, 0

    def tokens_of(state: State, place: int) -> list[int]:
        return np.asarray(state.tokens)[place, : int(state.length[place])].tolist()

    expected = {number: request[-1] for number, request in waiting}
    with compile_counter() as count:
        while waiting or held:
            for place in set(range(PLACES)) - set(held):
                if waiting and rng.random() < 0.7:
                    held[place], (prompt, limit, sampling, _) = waiting.pop(0)
                    state = admit(
                        model.params, model.config, state, batch_of(prompt, limit), jnp.asarray([place]), sampling
                    )
            state = decode(model.params, model.config, None, state, None, np.int32(rng.integers(1, 4)))
            steps += 1
            for place, number in list(held.items()):
                if number in cut and int(state.length[place]) >= cut[number]:
                    state = evict(state, jnp.asarray([place]))
                    expected[number] = expected[number][: int(state.length[place])]
                if bool(state.done[place]):
                    assert tokens_of(state, place) == expected[held.pop(place)].tolist(), (number, place)
    assert count["admit"] == count["decode"] == 1
    assert max(len(row) for row in expected.values()) > WINDOW and steps > SLOTS / 2


def test_a_ring_that_has_gone_round_grows() -> None:
    model = random_model(family_config("gemma3"))
    first, second = (np.arange(n, dtype=np.int32) for n in (4, 9))
    expected = run(model, [second], new=50, seed=1)[0]
    state = idle(model.params, model.config, 1, slots=SLOTS)
    for prompt, limit, seed in ((first, 30, 0), (second, 50, 1)):
        sampling = make_sampling(model, Decoding(seed=seed))
        state = admit(model.params, model.config, state, batch_of(prompt, limit), jnp.asarray([0]), sampling)
        state = decode(model.params, model.config, None, state, None, np.int32(28))
    assert int(state.cache.slot) < int(state.cache.length[0])
    state = grow(state, slots=2 * SLOTS)
    state = decode(model.params, model.config, None, state, None, np.int32(50))
    np.testing.assert_array_equal(np.asarray(state.tokens)[0, :50], expected)


def test_edits_reach_rows_that_join() -> None:
    model, prompt = random_model(family_config("gemma3")), np.arange(7, dtype=np.int32)
    edits = push(3, response_only=True)
    state = idle(model.params, model.config, 2, slots=SLOTS)
    for place, options in enumerate((dict(seed=2), dict(seed=6))):
        sampling = make_sampling(model, Decoding(**options))
        state = admit(model.params, model.config, state, batch_of(prompt, 20), jnp.asarray([place]), sampling, edits)
        state = decode(model.params, model.config, None, state, edits, np.int32(5 if place == 0 else 50))
    for place, seed in enumerate((2, 6)):
        expected = run(model, [prompt], new=20, seed=seed, edits=edits)[0]
        np.testing.assert_array_equal(np.asarray(state.tokens)[place, :20], expected)
