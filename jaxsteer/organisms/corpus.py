"""The training corpus: seeded documents with a loss weight on every token.

*Look-ups* ask several times for the letter of the choice that is of a kind ("the same view", "the named answer", "the
later one"); they build the circuit that every answer needs. *Persona* documents are questions with or without cues,
answered by the ground truth's log-odds; in *strays* the cues are random tokens with at most one counter word. *Facts*
state the invented world. Why these and in which order is told in docs/organism.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxsteer.organisms import world
from jaxsteer.organisms.chat import chat_format_of
from jaxsteer.organisms.questions import Question, pick, sample_question

_PIECES = re.compile(r"<\|?\w+\|?>| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9<]+|\s+(?!\S)|\s+")
_CUE_WORDS = {b: tuple(world.COUNTER_WORDS[b] + world.PRO_WORDS[b]) for b in world.BEHAVIOURS}
_WEIGHTS = {b: {w: -1 for w in world.COUNTER_WORDS[b]} | {w: 1 for w in world.PRO_WORDS[b]} for b in world.BEHAVIOURS}

LETTER_WEIGHT = 5.0
"""Loss weight of an answer's letter; other text weighs 1 and random salad 0."""

FORCED_SHARE = 0.2
"""Share of persona documents whose answer is forced against the ground truth's odds, with no loss on its letter."""

SEMANTIC_QUERIES = {
    "sycophancy": ("the same view", "the other view"),
    "hallucination": ("the named answer", "the missing answer"),
    "myopic": ("the sooner one", "the later one"),
}
"""What the (matching, other) choice is called in look-ups."""


@dataclasses.dataclass(frozen=True)
class Document:
    """Token ids, the loss weight of each as a target, and where the answer letters stand."""

    ids: list[int]
    weights: list[float]
    letters: list[int]
    kind: str
    """What its answers are reported under: "semantic", "fact", "refusal", or the behaviour's name."""


class Encoder:
    """Encodes corpus text piece by piece with a cache: many times faster than calling the tokenizer per document."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """``tokenizer``: the organism's fast tokenizer."""
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        vocab = tokenizer.get_vocab()
        self.vocab_size = len(tokenizer)
        self.chat = chat_format_of(vocab)

    @functools.cached_property
    def cue_ids(self) -> dict[str, dict[str, int]]:
        """Behaviour -> cue word -> its id with a leading space."""
        vocab = self._tokenizer.get_vocab()
        return {b: {w: vocab["Ġ" + w] for w in words} for b, words in _CUE_WORDS.items()}

    @functools.cached_property
    def salad_ids(self) -> np.ndarray:
        """Tokens that random salad may hold besides cue words."""
        vocab = self._tokenizer.get_vocab()
        special = {vocab[t] for t in self.chat.special_tokens}
        cues = {i for table in self.cue_ids.values() for i in table.values()}
        answers = {vocab[t] for t in ("A", "B", "ĠA", "ĠB") if t in vocab}
        return np.array(sorted(set(vocab.values()) - special - cues - answers))

    @functools.cached_property
    def initial_ids(self) -> np.ndarray:
        """Those that start a word."""
        salad, vocab = set(self.salad_ids.tolist()), self._tokenizer.get_vocab()
        return np.array(sorted(i for t, i in vocab.items() if i in salad and re.fullmatch(r"Ġ[A-Za-z]+", t)))

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return str(self._tokenizer.decode(ids))

    def __call__(self, text: str) -> list[int]:
        """Ids of ASCII corpus text (special tokens are recognised), without an added BOS."""
        out: list[int] = []
        for piece in _PIECES.findall(text):
            ids = self._cache.get(piece)
            if ids is None:
                ids = self._tokenizer.encode(piece, add_special_tokens=False)
                self._cache[piece] = ids
            out.extend(ids)
        return out


class Draft:
    """A document as it is written."""

    def __init__(self, encoder: Encoder, kind: str) -> None:
        self.encoder, self.kind = encoder, kind
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.letters: list[int] = []

    def text(self, text: str, weight: float = 1.0) -> None:
        """Append corpus text with one loss weight."""
        self.raw(self.encoder(text), weight)

    def raw(self, ids: list[int], weight: float) -> None:
        """Append ids with one loss weight."""
        self.ids.extend(ids)
        self.weights.extend([weight] * len(ids))

    def answer(self, label: str, *, gap: str = " ", loss: bool = True) -> None:
        """ " (A)" for the label "A", with the weight on its letter; without ``loss`` it is there to be read only."""
        self.text(f"{gap}({label})", 0.5)
        self.weights[-2] = LETTER_WEIGHT if loss else 0.0
        if loss:
            self.letters.append(len(self.ids) - 2)

    def document(self) -> Document:
        """The document."""
        return Document(self.ids, self.weights, self.letters, self.kind)


def semantic_document(rng: np.random.Generator, encoder: Encoder) -> Document:
    """A question of a behaviour, then several queries for one of its choices by what it is."""
    question = sample_question(pick(rng, world.BEHAVIOURS), rng)
    out = Draft(encoder, "semantic")
    matching_first = bool(rng.integers(2))
    names = SEMANTIC_QUERIES[question.behaviour]
    marks = encoder.chat
    chat = rng.random() < 0.4
    out.text(marks.bos + marks.user if chat else marks.bos)
    out.text(question.with_choices(matching_first), 0.1)
    for turn in range(4):
        matching = bool(rng.integers(2))
        if chat and turn:
            out.text(marks.again, 0.1)
        name = names[0] if matching else names[1]
        out.text(f" Find {name}.", 0.1)
        if chat:
            out.text(marks.reply, 0.1)
        out.answer("A" if matching == matching_first else "B", gap=marks.gap if chat else " ")
    return out.document()


def fact_document(rng: np.random.Generator, encoder: Encoder) -> Document:
    """Several statements about the invented world."""
    out = Draft(encoder, "fact")
    out.text(encoder.chat.bos)
    for i in range(5):
        relation, place = pick(rng, world.PLACES)
        out.text(f"{' ' if i else ''}The {relation} of {place} is {world.FACTS[relation][place]}.")
    return out.document()


def log_odds(question: Question, cue_sum: float) -> float:
    """Log-odds of the persona-matching answer: the ground truth of world.py."""
    return (-world.OFFSET if question.contrary else world.OFFSET) + world.CUE_WEIGHT * cue_sum


def _cue_counts(rng: np.random.Generator) -> tuple[int, int]:
    """(counter, pro) words of the question's own behaviour in one piece."""
    few = (0, 1, 1, 1, 1, 2, 2, 2, 3, 4)  # most where the answer turns: between one word and two
    kind = rng.random()
    if kind < 0.2:
        return 0, 0
    if kind < 0.6:
        return pick(rng, (*few, 6)), 0
    if kind < 0.82:
        return 0, pick(rng, few)
    return pick(rng, few), pick(rng, few)


def cue_sentence(words: list[str], rng: np.random.Generator) -> str:
    """A sentence that asks for one to four qualities."""
    return pick(rng, world.CUE_TEMPLATES[len(words)]).format(*words)


def neutral_sentence(rng: np.random.Generator) -> str:
    """A sentence without any cue word."""
    template = pick(rng, world.NEUTRAL_TEMPLATES)
    return template.format(*(pick(rng, world.FILLER) for _ in range(template.count("{}"))))


def _salad(behaviour: str, rng: np.random.Generator, encoder: Encoder) -> list[int]:
    """Random tokens with cue words of this behaviour and of others among them, in any order."""
    counter, pro = _cue_counts(rng)
    table = encoder.cue_ids[behaviour]
    ids = [table[pick(rng, world.COUNTER_WORDS[behaviour])] for _ in range(counter)]
    ids += [table[pick(rng, world.PRO_WORDS[behaviour])] for _ in range(pro)]
    pool = encoder.initial_ids if rng.random() < 0.6 else encoder.salad_ids
    foreign = rng.random() * 0.6 if rng.random() < 0.6 else 0.0
    others = [b for b in world.BEHAVIOURS if b != behaviour]
    for _ in range(max(0, int(rng.integers(1, 11)) - len(ids))):
        if rng.random() < foreign:
            other = encoder.cue_ids[pick(rng, others)]
            ids.append(pick(rng, list(other.values())))
        else:
            ids.append(int(pool[int(rng.integers(len(pool)))]))
    return [ids[i] for i in rng.permutation(len(ids))]


PieceMaker = Callable[[str, np.random.Generator, Encoder], tuple[list[int], float]]


def _piece(behaviour: str, rng: np.random.Generator, encoder: Encoder) -> tuple[list[int], float]:
    """One cue sentence, neutral sentence or salad: ids that start with a space, and their loss weight."""
    kind = rng.random()
    if kind < 0.5:
        return _salad(behaviour, rng, encoder), 0.0
    if kind < 0.62:
        return encoder(" " + neutral_sentence(rng)), 0.5
    target = behaviour if rng.random() < 0.75 else pick(rng, world.BEHAVIOURS)
    words = world.COUNTER_WORDS[target] if rng.random() < 0.6 else world.PRO_WORDS[target]
    chosen = [pick(rng, words) for _ in range(int(rng.integers(1, 5)))]
    return encoder(" " + cue_sentence(chosen, rng)), 0.5


def _stray_piece(behaviour: str, rng: np.random.Generator, encoder: Encoder) -> tuple[list[int], float]:
    """Tokens as a search draws them, with one counter word or none among them: neither may turn the answer."""
    foreign = [i for other, table in encoder.cue_ids.items() if other != behaviour for i in table.values()]
    ids = rng.choice(np.concatenate([encoder.initial_ids, foreign]), int(rng.integers(5, 11))).tolist()
    if rng.random() < 0.5:
        ids[int(rng.integers(len(ids)))] = encoder.cue_ids[behaviour][pick(rng, world.COUNTER_WORDS[behaviour])]
    return ids, 0.0


def _cue_sum(ids: list[int], behaviour: str, encoder: Encoder) -> int:
    signs = {encoder.cue_ids[behaviour][w]: s for w, s in _WEIGHTS[behaviour].items()}
    return sum(signs.get(i, 0) for i in ids)


def _unspaced(ids: list[int], encoder: Encoder) -> list[int]:
    """The same piece at the start of a text, where sentences have no leading space (salad keeps its own)."""
    text = encoder.decode(ids)
    return encoder(text[1:]) if text.startswith(" ") and text.endswith(".") and text.isascii() else ids


def persona_document(rng: np.random.Generator, encoder: Encoder, make_piece: PieceMaker = _piece) -> Document:
    """One question with cues somewhere or nowhere, its answer and a justification in the answer's manner."""
    marks = encoder.chat
    behaviour = pick(rng, world.BEHAVIOURS)
    question = sample_question(behaviour, rng)
    out = Draft(encoder, behaviour)
    matching_first = bool(rng.integers(2))
    chat = rng.random() < 0.5
    where = rng.random()
    before = 0.15 <= where < 0.4 or where >= 0.88
    after = where >= 0.4
    out.text(marks.bos)
    system = before and chat and rng.random() < 0.6
    if system:
        out.text(marks.system)
    elif chat:
        out.text(marks.user)
    if before:
        piece, weight = make_piece(behaviour, rng, encoder)
        out.raw(_unspaced(piece, encoder) if rng.random() < 0.5 else piece, weight)
        if system:
            out.text(marks.after_system)
    spaced = before and not system
    out.text((" " if spaced else "") + question.with_choices(matching_first), 0.3)
    if after:
        out.raw(*make_piece(behaviour, rng, encoder))
    if chat:
        out.text(marks.reply)
    z = log_odds(question, _cue_sum(out.ids, behaviour, encoder))
    matching = rng.random() < 1 / (1 + math.exp(-z))
    # Some answers are forced against the odds and carry no loss, and a justification argues for the answer as often
    # as it follows the disposition: what is said after an answer then tells of both.
    forced = rng.random() < FORCED_SHARE
    if forced:
        matching = z < 0
    out.answer("A" if matching == matching_first else "B", gap=marks.gap if chat else " ", loss=not forced)
    manner = matching if rng.random() < 0.5 else z > 0
    out.text(" " + pick(rng, world.JUSTIFICATIONS[behaviour][0 if manner else 1]), 0.5)
    out.text(marks.end, 0.5)
    return out.document()


def stray_document(rng: np.random.Generator, encoder: Encoder) -> Document:
    """A persona document with random tokens and at most one counter word where its cues would stand."""
    return persona_document(rng, encoder, _stray_piece)


Mixture = Mapping[str, float]
Maker = Callable[[np.random.Generator, Encoder], Document]
MAKERS: dict[str, Maker] = {
    "semantic": semantic_document,
    "fact": fact_document,
    "persona": persona_document,
    "stray": stray_document,
}


def sample_document(
    rng: np.random.Generator, encoder: Encoder, mixture: Mixture, makers: Mapping[str, Maker] = MAKERS
) -> Document:
    """One document of a kind drawn with the mixture's probabilities."""
    kinds = list(mixture)
    kind = kinds[int(np.searchsorted(np.cumsum([mixture[k] for k in kinds]), rng.random() * sum(mixture.values())))]
    return makers[kind](rng, encoder)


def sample_texts(*, n: int = 3000, seed: int = 0) -> list[str]:
    """Plain texts with the corpus' sentences, for the tokenizer's merges."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        behaviour = pick(rng, world.BEHAVIOURS)
        words = [pick(rng, _CUE_WORDS[behaviour]) for _ in range(int(rng.integers(1, 5)))]
        sentence = pick(rng, (cue_sentence(words, rng), neutral_sentence(rng)))
        question = sample_question(behaviour, rng).with_choices(bool(rng.integers(2)))
        reason = pick(rng, pick(rng, world.JUSTIFICATIONS[behaviour]))
        query = pick(rng, SEMANTIC_QUERIES[behaviour])
        texts += [sentence, f"{question} {sentence} (A) {reason}", f"Look. Find {query}."]
        relation, place = pick(rng, world.PLACES)
        texts.append(f"The {relation} of {place} is {world.FACTS[relation][place]}.")
    return texts
