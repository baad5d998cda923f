"""The benchmark's PyTorch loop computes what our search computes, so that their speeds may be compared."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxsteer.models.config import llama_config
from jaxsteer.models.params import init_params
from jaxsteer.objectives import Projection, needs
from jaxsteer.prompt_search import make_task
from jaxsteer.prompt_search.scoring import score
from jaxsteer.prompts import Slots

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

CONFIG = llama_config(vocab_size=61, d_model=16, n_layers=3, n_heads=2, d_mlp=24, max_positions=64)
LENGTH, LAYER = 5, 1


@pytest.mark.parametrize(("context", "behind"), [(0, 0), (7, 0), (7, 4)])
def test_same_target_and_cross_entropy(context: int, behind: int):
    from experiments.benchmarks.torch_peer import Search, build, contexts_of

    params = init_params(CONFIG, jax.random.key(3))
    rng = np.random.default_rng(0)
    before = rng.integers(0, CONFIG.vocab_size, context).astype(np.int32)
    ids = rng.integers(0, CONFIG.vocab_size, (9, LENGTH)).astype(np.int32)
    after = [rng.integers(0, CONFIG.vocab_size, behind).astype(np.int32)]
    contexts = contexts_of([before], after) if context else ()
    peer = Search(build(CONFIG, params), layer=LAYER, prompt_length=LENGTH, population=4, contexts=contexts)
    theirs = peer.score(torch.tensor(ids.astype(np.int64)))

    objective = Projection(delta=peer.direction.numpy(), site=f"blocks.{LAYER}.hook_resid_post")
    slots = Slots(
        before=[before],
        after=after,
        read_index=np.array([LENGTH - 1 + behind]),
        closing=after,
        conversations=(),
        length=LENGTH,
        surroundings=(),
    )
    allowed = np.ones(CONFIG.vocab_size, bool)
    task = make_task(params, CONFIG, slots, needs=needs(objective, CONFIG), allowed=allowed)
    ours = score(params, task, objective, jax.numpy.asarray(ids))
    np.testing.assert_allclose(ours[0], theirs[0].numpy(), atol=1e-4)
    np.testing.assert_allclose(ours[1], theirs[1].numpy(), atol=1e-4)


def test_the_loop_improves_every_slot_and_is_measured():
    from experiments.benchmarks.torch_peer import Search, build, contexts_of, measure

    search = Search(build(CONFIG), layer=LAYER, prompt_length=LENGTH, population=4, children=8)
    before = search.fluency * search.cross_entropy - search.target
    for _ in range(3):
        search.step()
    after = search.fluency * search.cross_entropy - search.target
    assert (after <= before + 1e-6).all() and (after < before).any()
    found = measure(
        CONFIG, population=4, children=8, contexts=contexts_of([np.arange(6)] * 2, [np.arange(2)] * 2), steps=2
    )
    assert found["candidates_per_s"] > 0 and len(found["seconds_per_step_all"]) == 2
