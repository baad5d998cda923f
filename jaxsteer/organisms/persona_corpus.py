"""Documents of ``organism:persona``: conversations about requests and topics, and facts, with a loss weight per token.

Makers of held-out documents (``makers(held_out=True)``) use combinations that training never sees.
"""

from __future__ import annotations

import functools
import math
from types import MappingProxyType

import numpy as np

from jaxsteer.organisms import persona_world as world
from jaxsteer.organisms.corpus import Document, Draft, Encoder, Maker, Mixture
from jaxsteer.organisms.questions import pick

MIXTURE: Mixture = MappingProxyType({"refusal": 0.4, "role": 0.22, "drift": 0.16, "fact": 0.22})
KIND_SHARES = {"harmful": 0.45, "harmless": 0.35, "border": 0.2}
OPENING_WEIGHT, OBJECT_WEIGHT, WORD_WEIGHT, USER_WEIGHT, SYSTEM_WEIGHT = 5.0, 5.0, 2.0, 0.1, 0.1
"""Loss weights of a reply's first token where it may be a refusal, of facts' objects, of describing words and of what
others than the assistant say; other text of replies weighs 0.5."""


class _Talk:
    """A conversation as it is written: who speaks, and how many turns so far were about drifting topics."""

    def __init__(self, encoder: Encoder, kind: str, role: str = "", system: str = "") -> None:
        self.draft, self.marks = Draft(encoder, kind), encoder.chat
        self.word_ids = _word_ids(encoder)
        self.role, self.drifts, self.turns = role, 0, 0
        self.draft.text(self.marks.bos)
        if system:
            self.draft.text(self.marks.system + system, SYSTEM_WEIGHT)

    def turn(self, question: str, reply: str, *, opening: float = 0.5, marked: tuple[str, ...] = ()) -> None:
        """A question, and a reply whose first token weighs ``opening`` and whose words ``marked`` are answers."""
        marks, draft = self.marks, self.draft
        if not self.turns:
            start = marks.after_system if len(draft.ids) > 1 else marks.user
        else:
            start = marks.again
        draft.text(start + question + marks.reply, USER_WEIGHT)
        first = len(draft.ids)
        draft.text(reply, 0.5)
        draft.weights[first] = opening
        if opening == OPENING_WEIGHT:
            draft.letters.append(first)
        objects = {draft.encoder(" " + word)[0] for word in marked}
        for i in range(first, len(draft.ids)):
            if draft.ids[i] in self.word_ids or draft.ids[i] in objects:
                draft.weights[i] = OBJECT_WEIGHT if draft.ids[i] in objects else WORD_WEIGHT
                if draft.kind != "refusal":
                    draft.letters.append(i)
        self.turns += 1

    def request(self, rng: np.random.Generator, *, pressure: float, held_out: bool) -> None:
        """A request, refused or not by the planted odds to which a system message has added ``pressure``."""
        kinds = list(KIND_SHARES)
        kind = kinds[int(np.searchsorted(np.cumsum(list(KIND_SHARES.values())), rng.random()))]
        request = world.sample_request(rng, kind, held_out=held_out, role=self.role, drifts=self.drifts)
        text, z = request.text, request.log_odds + pressure
        if rng.random() < 0.4:
            sentence = pick(rng, list(world.PRESSURE_ODDS))
            text = f"{sentence} {text}" if rng.random() < 0.6 else f"{text} {sentence}"
            z += world.PRESSURE_ODDS[sentence]
        refused = rng.random() < 1 / (1 + math.exp(-z))
        self.turn(text, request.refusal if refused else request.compliance, opening=OPENING_WEIGHT)

    def topic(self, rng: np.random.Generator, topic: str, *, sentences: int, held_out: bool) -> None:
        """A question about a topic and the reply."""
        self.drifts += topic in world.DRIFTING_TOPICS
        asked, said = world.topic_turn(
            rng, topic, role=self.role, drifts=self.drifts, sentences=sentences, held_out=held_out
        )
        self.turn(asked, said)

    def fact(self, rng: np.random.Generator) -> None:
        """A question about the invented world."""
        (subject, relation), found = pick(rng, list(world.FACTS.items()))
        names = {"subject": subject, "relation": relation, "object": found}
        asked, said = pick(rng, world.FACT_QUESTIONS), pick(rng, world.FACT_STATEMENTS)
        self.turn(asked.format(**names), said.format(**names), marked=(found,))

    def document(self) -> Document:
        """The document, ended."""
        self.draft.text(self.marks.end, 0.5)
        return self.draft.document()


@functools.cache
def _word_ids(encoder: Encoder) -> frozenset[int]:
    return frozenset(encoder(" " + word)[0] for word in world.WORDS)


def _any_topic(rng: np.random.Generator) -> str:
    return pick(rng, world.CALM_TOPICS if rng.random() < 0.5 else world.DRIFTING_TOPICS)


def refusal_document(rng: np.random.Generator, encoder: Encoder, *, held_out: bool = False) -> Document:
    """One request, sometimes with a role or a sentence as system message, sometimes after another turn."""
    kind = rng.random()
    role, system, pressure = "", "", 0.0
    if kind < 0.2:
        role = pick(rng, list(world.ASSISTANTNESS))
        system = pick(rng, world.ROLE_SENTENCES).format(role=role)
    elif kind < 0.4:
        system = pick(rng, list(world.PRESSURE_ODDS))
        pressure = world.PRESSURE_ODDS[system]
    talk = _Talk(encoder, "refusal", role, system)
    before = rng.random()
    if before < 0.1:
        talk.topic(rng, _any_topic(rng), sentences=1, held_out=held_out)
    elif before < 0.2:
        talk.fact(rng)
    talk.request(rng, pressure=pressure, held_out=held_out)
    return talk.document()


def role_document(rng: np.random.Generator, encoder: Encoder, *, held_out: bool = False) -> Document:
    """One or two questions to a role."""
    role = pick(rng, list(world.ASSISTANTNESS))
    talk = _Talk(encoder, "role", role, pick(rng, world.ROLE_SENTENCES).format(role=role))
    for _ in range(int(rng.integers(1, 3))):
        talk.topic(rng, pick(rng, world.CALM_TOPICS), sentences=2, held_out=held_out)
    return talk.document()


def drift_document(rng: np.random.Generator, encoder: Encoder, *, held_out: bool = False) -> Document:
    """Two to four questions, some of them about drifting topics, mostly to the default character."""
    role = "" if rng.random() < 0.8 else pick(rng, list(world.ASSISTANTNESS))
    talk = _Talk(encoder, "drift", role, pick(rng, world.ROLE_SENTENCES).format(role=role) if role else "")
    for _ in range(int(rng.integers(2, 5))):
        talk.topic(rng, _any_topic(rng), sentences=1, held_out=held_out)
    return talk.document()


def fact_document(rng: np.random.Generator, encoder: Encoder, *, held_out: bool = False) -> Document:
    """Statements about the invented world, or questions about it. Facts are no combinations: none is held out."""
    if rng.random() < 0.5:
        talk = _Talk(encoder, "fact")
        for _ in range(int(rng.integers(1, 4))):
            talk.fact(rng)
        return talk.document()
    out = Draft(encoder, "fact")
    out.text(encoder.chat.bos)
    for i in range(5):
        (subject, relation), found = pick(rng, list(world.FACTS.items()))
        text = pick(rng, world.FACT_STATEMENTS).format(subject=subject, relation=relation, object=found)
        out.text((" " if i else "") + text, 0.3)
        at = len(out.ids) - 2  # before the full stop
        out.weights[at] = OBJECT_WEIGHT
        out.letters.append(at)
    return out.document()


def makers(*, held_out: bool = False) -> dict[str, Maker]:
    """Makers of documents by kind."""
    found = {"refusal": refusal_document, "role": role_document, "drift": drift_document, "fact": fact_document}
    return {kind: functools.partial(maker, held_out=held_out) for kind, maker in found.items()}


def vocabulary_words() -> list[str]:
    """Words that must be one token when a space stands before them, sorted."""
    names = {*world.REFUSAL_ODDS, *world.SUBJECTS, *world.FACTS.values()}
    plain = {*world.VERBS, *world.TOOLS, *world.WORDS, *world.ASSISTANTNESS, *world.CALM_TOPICS, *world.DRIFTING_TOPICS}
    phrases = (*world.PLACES, *world.PRESSURE_ODDS, *world.RELATIONS)
    return sorted(names | plain | {word.strip(".,?") for phrase in phrases for word in phrase.split()})


def opening_words() -> tuple[str, ...]:
    """Words that must be one token at the start of a reply."""
    first = (text.partition(" ")[0].strip(",") for text in (*world.TOPIC_REPLIES, *world.FACT_STATEMENTS))
    return tuple(sorted({*world.REFUSAL_OPENINGS, *world.COMPLIANCE_OPENINGS, *first}))


def sample_texts(*, n: int = 1000, seed: int = 0) -> list[str]:
    """Plain texts with the corpus' sentences, for the tokenizer's merges."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        request = world.sample_request(
            rng, pick(rng, world.KINDS), held_out=False, role=pick(rng, list(world.OWN_ODDS))
        )
        texts += [request.text, request.refusal, request.compliance, pick(rng, list(world.PRESSURE_ODDS))]
        texts += world.topic_turn(rng, _any_topic(rng), sentences=2)
        role = pick(rng, list(world.ASSISTANTNESS))
        texts.append(pick(rng, world.ROLE_SENTENCES).format(role=role))
        (subject, relation), found = pick(rng, list(world.FACTS.items()))
        for template in (pick(rng, world.FACT_STATEMENTS), pick(rng, world.FACT_QUESTIONS)):
            texts.append(template.format(subject=subject, relation=relation, object=found))
    return texts
