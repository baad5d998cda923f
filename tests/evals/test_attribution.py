"""Attribution against the generator's known cue words, and against its definition."""

import numpy as np
import pytest

import jaxsteer
from jaxsteer import organisms
from jaxsteer.errors import UserError
from jaxsteer.evals.attribution import attribute
from jaxsteer.evals.choice import choice_eval
from jaxsteer.personas import load_persona
from jaxsteer.prompts import allowed_tokens, prompt_text


@pytest.fixture(scope="module")
def case():
    model = jaxsteer.load("organism:llama")
    items = load_persona("myopic").items[:4]
    words = [" the", " patient", " of", " steady"]
    assert organisms.cue_words("myopic")["patient"] < 0 and organisms.cue_words("myopic")["steady"] < 0
    ids = [i for word in words for i in model.tokenizer.encode(word, add_special_tokens=False)]
    assert len(ids) == len(words)
    allowed = allowed_tokens(model.tokenizer, model.config.vocab_size, word_initial=True)
    return model, items, ids, allowed, attribute(model, items, ids, allowed=allowed, replacements=2, seed=3)


def test_the_cue_words_carry_the_effect(case):
    found = case[-1]
    assert found.margin < found.without_prompt - 2
    for effects in map(np.asarray, (found.leave_one_out, found.replacement)):
        cues, rest = effects[[1, 3]], np.delete(effects, [1, 3])
        assert cues.max() < -1 and abs(rest).max() < abs(cues).min()


def test_effects_are_differences_of_mean_log_odds(case):
    model, items, ids, _, found = case
    texts = [prompt_text(model.tokenizer, row) for row in (ids, ids[:2] + ids[3:])]
    full, without = (float(result.margin.mean()) for result in choice_eval(model, items, texts))
    np.testing.assert_allclose(found.leave_one_out[2], full - without, atol=1e-4)
    np.testing.assert_allclose(found.margin, full, atol=1e-4)
    assert found.rows == 8 and len(found.replacement_sd) == 4


def test_what_cannot_be_attributed(case):
    model, items, ids, allowed, _ = case
    with pytest.raises(UserError, match="0 tokens"):
        attribute(model, items, [], allowed=allowed)
    with pytest.raises(UserError, match="0 allowed"):
        attribute(model, items, ids, allowed=np.zeros_like(allowed))
