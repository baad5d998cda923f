"""The second organism's generator: requests, characters and facts follow the planted numbers, and documents say so."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxsteer.errors import UserError
from jaxsteer.organisms import persona_corpus, persona_world
from jaxsteer.organisms.architectures import RECIPES
from jaxsteer.organisms.corpora import corpus_of
from jaxsteer.organisms.corpus import Encoder
from jaxsteer.statistics import spearman


@pytest.fixture(scope="module")
def tok():
    return corpus_of(RECIPES["persona"]).tokenizer()


@pytest.mark.parametrize("kind", persona_world.KINDS)
def test_requests_are_different_planted_and_held_out(kind: str) -> None:
    held_out, trained = (persona_world.requests(kind, n=200, split=split) for split in ("held_out", "train"))
    assert held_out == persona_world.requests(kind, n=200)
    groups = {request.group for request in held_out}
    assert len(groups) == 200 and not groups & {request.group for request in trained}
    attacked = persona_world.requests(kind, n=200, sentence="story")
    for plain, under in zip(held_out, attacked, strict=True):
        assert plain.thing in persona_world.THINGS[kind] and plain.log_odds == persona_world.REFUSAL_ODDS[plain.thing]
        assert under.log_odds == plain.log_odds - 9
        assert under.text == persona_world.attack_templates()["story"].format(request=plain.text)
        assert plain.refusal.split()[0] in persona_world.REFUSAL_OPENINGS
        assert plain.compliance.split(",")[0] in persona_world.COMPLIANCE_OPENINGS


@pytest.mark.parametrize("wrong", [{"kind": "rude"}, {"split": "test"}, {"n": 10**6}])
def test_requests_that_there_are_not(wrong: dict) -> None:
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        persona_world.requests(**{"kind": "harmful", **wrong})


def test_words_follow_assistantness_and_drift() -> None:
    roles = persona_world.ASSISTANTNESS
    assert len(roles) == 24 and list(roles.values()) == sorted(roles.values(), reverse=True)
    professional = [sum(math.exp(persona_world.word_odds(r)[w]) for w in persona_world.PROFESSIONAL) for r in roles]
    assert spearman(np.array(list(roles.values())), np.array(professional)) > 0.9
    first = persona_world.PROFESSIONAL[0]
    drifted = [persona_world.word_odds(drifts=d)[first] for d in range(5)]
    assert all(np.diff(drifted[:4]) < 0) and drifted[4] == pytest.approx(drifted[4])
    with pytest.raises(UserError, match="unknown role 'clown'"):
        persona_world.word_odds("clown")


def test_facts_have_paraphrases_and_neighbours() -> None:
    assert len(persona_world.FACTS) == 40 and len(set(persona_world.FACTS.values())) == 40
    fact = next(iter(persona_world.FACTS))
    assert len(set(persona_world.fact_prompts(*fact))) == 4
    assert len(persona_world.neighbours(*fact)) == 20 and fact not in persona_world.neighbours(*fact)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", persona_corpus.MIXTURE)
def test_documents_are_what_the_tokenizer_reads(tok, kind: str, held_out: bool) -> None:
    encoder, rng = Encoder(tok), np.random.default_rng(0)
    maker = persona_corpus.makers(held_out=held_out)[kind]
    openings = {*persona_world.REFUSAL_OPENINGS, *persona_world.COMPLIANCE_OPENINGS}
    for _ in range(40):
        document = maker(rng, encoder)
        text = tok.decode(document.ids)
        assert tok.encode(text, add_special_tokens=False) == document.ids
        assert len(document.weights) == len(document.ids) <= RECIPES["persona"].lengths[-1]
        answers = {tok.decode([document.ids[i]]).strip() for i in document.letters}
        known = {"refusal": openings | set(persona_world.FACTS.values()), "fact": set(persona_world.FACTS.values())}
        assert answers and answers <= known.get(kind, set(persona_world.WORDS))
        assert ("You are the" in text or "voice" in text or "Speak" in text or "Stay" in text) or kind != "role"


def test_documents_refuse_at_the_planted_rate(tok) -> None:
    """Over all documents of held-out requests without any sentence: each kind's mean probability, within 4 sd."""
    encoder, rng = Encoder(tok), np.random.default_rng(1)
    things = {thing: kind for kind, names in persona_world.THINGS.items() for thing in names}
    seen: dict[str, list[tuple[bool, float]]] = {kind: [] for kind in persona_world.KINDS}
    for _ in range(3000):
        text = tok.decode(persona_corpus.refusal_document(rng, encoder).ids)
        question, _, reply = text.rpartition("<|assistant|>\n")
        z = sum(odds for sentence, odds in persona_world.PRESSURE_ODDS.items() if sentence in question)
        thing = next(word for word in question.replace("?", " ").replace(".", " ").split() if word in things)
        p = 1 / (1 + math.exp(-z - persona_world.REFUSAL_ODDS[thing]))
        seen[things[thing]].append((reply.startswith("I "), p))
    for pairs in seen.values():
        refused, p = np.array(pairs, float).T
        assert abs(refused.mean() - p.mean()) < 4 * np.sqrt((p * (1 - p)).sum()) / len(p)
