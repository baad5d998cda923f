"""Contrastive pairs of token rows, and the fixed contexts in which a search reads the same place.

Three read positions (compared in experiments/README.md):

* ``published`` (RESGA, arXiv 2601.02896): the direction at the last token of "question + answer letter", the
  objective at the last token of the prompt.
* ``matched``: the same pairs, but the objective reads where the direction was read: after both answer letters.
* ``decision``: direction and objective at the token where the answer is decided; the contrast is a sentence against
  the behaviour and one for it, in the slot's place.

Every question with lettered choices occurs in both orders, so that the letter cancels exactly. Answers in words ("Yes",
a whole sentence) have one order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.personas.items import Item, normal, orders
from jaxsteer.personas.persona import Persona
from jaxsteer.prompts import Conversation, Placement, encode, question_conversation, template_of

log = logging.getLogger(__name__)

READ_POSITIONS = ("published", "matched", "decision")
MAX_CUES = 8
"""Cue sentences in use, the strongest of each side, taken in turn by the questions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """n pairs of token rows that differ in whether the behaviour is shown ("good": it is not)."""

    good: tuple[np.ndarray, ...]
    """int32 ids of every good row, one BOS included where the model has one; unpadded."""
    bad: tuple[np.ndarray, ...]
    good_read: Int[np.ndarray, " n"] | tuple[np.ndarray, ...]
    """The read position in every good row, an index into it; or a mask over its tokens, whose mean is read."""
    bad_read: Int[np.ndarray, " n"] | tuple[np.ndarray, ...]
    good_letter: tuple[str, ...]
    """The answer label in the good row, or "" where rows hold no answer or one in words."""
    groups: tuple[str, ...]
    read_position: str
    recipe: dict[str, str]
    """What made these pairs, as text for the metadata of a direction."""

    def __len__(self) -> int:
        """Number of pairs n."""
        return len(self.good)

    @property
    def rows(self) -> tuple[np.ndarray, ...]:
        """All rows, the good ones first."""
        return (*self.good, *self.bad)

    @property
    def reads(self) -> Int[np.ndarray, " m"] | list[np.ndarray]:
        """Where each of ``rows`` is read."""
        if isinstance(self.good_read, np.ndarray):
            return np.concatenate([self.good_read, self.bad_read])
        return [*self.good_read, *self.bad_read]


def both_orders(items: Sequence[Item]) -> Iterator[tuple[int, Item]]:
    """(number of the item, item) for every item and then its swapped copy, where it has one."""
    for number, item in enumerate(items):
        for copy in orders(item):
            yield number, copy


def _answers(item: Item) -> tuple[str, ...]:
    """Both answers, in an order that does not tell which one shows the persona."""
    return tuple(sorted((item.matching, item.not_matching)))


def contrast_pairs(
    model: Model,
    persona: Persona,
    items: Sequence[Item],
    read_position: str,
    *,
    placement: Placement = Placement(),
    max_cues: int = MAX_CUES,
    split_seed: int | None = None,
) -> Pairs:
    """The pairs of ``items`` for a read position, two per item (both orders of its choices) where answers are letters.

    ``placement`` is that of the search; its slot matters for ``decision`` only,
    where it holds the cue. ``split_seed`` is noted in the recipe. Raises ``UserError`` for an unknown read position,
    for no items, and for ``decision`` without cue sentences.
    """
    check_read_position(read_position)
    if not items:
        raise UserError(f"no items of persona {persona.name!r} were given: a direction needs at least one")
    if read_position == "decision":
        rows = _cue_rows(model, persona, items, placement, max_cues)
    else:
        rows = _answer_rows(model, items, placement)
    good, bad, letters, groups = zip(*rows, strict=True)
    template = template_of(model.tokenizer) if placement.style == "chat" else None
    return Pairs(
        good=good,
        bad=bad,
        good_read=np.asarray([len(ids) - 1 for ids in good]),
        bad_read=np.asarray([len(ids) - 1 for ids in bad]),
        good_letter=letters,
        groups=groups,
        read_position=read_position,
        recipe={
            "persona": persona.name,
            "dataset_hash": persona.data_hash,
            "split_seed": "" if split_seed is None else str(split_seed),
            "template": f"{placement.style}/{placement.slot}",
            "chat_template_hash": hashlib.sha256(template.encode()).hexdigest() if template else "",
            "contrast": _contrast(persona, read_position),
        },
    )


def response_pairs(
    model: Model, persona: Persona, items: Sequence[Item], *, placement: Placement = Placement()
) -> Pairs:
    """The pairs of ``matched``, read in the mean over the tokens of the answer (persona_vectors' response_avg)."""
    pairs = contrast_pairs(model, persona, items, "matched", placement=placement)
    asked = [
        encode(model.tokenizer, question_conversation(item.asked, placement), "") for _, item in both_orders(items)
    ]
    masks = [
        tuple(np.arange(len(row)) >= min(len(context), len(row) - 1) for row, context in zip(rows, asked, strict=True))
        for rows in (pairs.good, pairs.bad)
    ]
    recipe = {**pairs.recipe, "contrast": "mean over answers"}
    return dataclasses.replace(pairs, good_read=masks[0], bad_read=masks[1], read_position="response", recipe=recipe)


def role_pairs(model: Model, persona: Persona, items: Sequence[Item], *, placement: Placement = Placement()) -> Pairs:
    """Pairs of one question with the persona's role as the system message and without, read where the reply begins.

    Raises ``UserError`` for a persona without a role.
    """
    if not persona.role:
        raise UserError(f"persona {persona.name!r} has no role: give a read position among {', '.join(READ_POSITIONS)}")
    turn, questions = ("system", persona.role), list(dict.fromkeys(item.question for item in items))
    good, bad = (
        [encode(model.tokenizer, question_conversation((*before, ("user", q)), placement), "") for q in questions]
        for before in ((), (turn,))
    )
    return _at_ends(persona.name, good, bad, questions, placement, model, "role", "no system message/role")


def text_pairs(
    model: Model,
    shown: Sequence[str],
    others: Sequence[str],
    *,
    name: str = "texts",
    placement: Placement = Placement(),
) -> Pairs:
    """Pairs of texts that have nothing to do with each other, for example harmful and harmless requests: ``shown`` show
    the behaviour, ``others`` do not. They are read where the reply would begin, or at the last token of plain text.

    Their mean difference, like every direction, points from ``shown`` to ``others``. The longer list is cut to the
    shorter. Raises ``UserError`` where one is empty, and for a text on both sides.
    """
    for side, texts in (("shown", shown), ("others", others)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{side} must be a list of texts, got {texts!r:.80}")
    if not shown or not others:
        raise UserError(
            f"a contrast needs texts of both signs: {len(shown)} show {name}, and {len(others)} do not. Give some of "
            "each"
        )
    if both := {normal(text) for text in shown} & {normal(text) for text in others}:
        raise UserError(f"{len(both)} texts stand on both sides of the contrast, for example {min(both)[:80]!r}")
    n = min(len(shown), len(others))
    if len(shown) != len(others):
        log.warning("%s: %d and %d texts make %d pairs", name, len(shown), len(others), n)
    bad, good = (
        tuple(encode(model.tokenizer, question_conversation(text, placement), "") for text in side[:n])
        for side in (shown, others)
    )
    return _at_ends(name, good, bad, tuple(map(str, range(n))), placement, model, "prompt_last", "texts")


def _at_ends(
    name: str,
    good: Sequence[np.ndarray],
    bad: Sequence[np.ndarray],
    groups: Sequence[str],
    placement: Placement,
    model: Model,
    read_position: str,
    contrast: str,
) -> Pairs:
    """Pairs that are read at their last tokens."""
    template = template_of(model.tokenizer) if placement.style == "chat" else ""
    return Pairs(
        good=tuple(good),
        bad=tuple(bad),
        good_read=np.asarray([len(ids) - 1 for ids in good]),
        bad_read=np.asarray([len(ids) - 1 for ids in bad]),
        good_letter=("",) * len(good),
        groups=tuple(groups),
        read_position=read_position,
        recipe={
            "persona": name,
            "template": placement.style,
            "chat_template_hash": hashlib.sha256(template.encode()).hexdigest() if template else "",
            "contrast": contrast,
        },
    )


def _contrast(persona: Persona, read_position: str) -> str:
    if read_position != "decision":
        return "answer letter"
    return "neutral cue/pro cue" if persona.neutral_cues else "counter cue/pro cue"


def check_read_position(read_position: str) -> None:
    """Raise ``UserError`` unless the name is one of ``READ_POSITIONS``."""
    if read_position not in READ_POSITIONS:
        raise UserError(f"unknown read position {read_position!r}: expected {', '.join(READ_POSITIONS)}")


def check_cues(persona: Persona, read_position: str) -> None:
    """Raise ``UserError`` where the read position contrasts cue sentences and the persona lacks them."""
    if read_position == "decision" and not (persona.counter_cues and persona.pro_cues):
        raise UserError(
            f"--read-position decision contrasts sentences against and for the behaviour, but persona "
            f"{persona.name!r} has {len(persona.counter_cues)} counter_cues and {len(persona.pro_cues)} pro_cues: "
            f"give --read-position matched, or counter_cues and pro_cues in a persona file (docs/datasets.md)"
        )


Row = tuple[np.ndarray, np.ndarray, str, str]


def _answer_rows(model: Model, items: Sequence[Item], placement: Placement) -> Iterator[Row]:
    for _, item in both_orders(items):
        good, bad = (
            encode(model.tokenizer, question_conversation(item.asked, placement, answer=label), "")
            for label in (item.not_matching, item.matching)
        )
        yield good, bad, item.not_matching if item.lettered else "", item.group


def _cue_rows(
    model: Model, persona: Persona, items: Sequence[Item], placement: Placement, max_cues: int
) -> Iterator[Row]:
    check_cues(persona, "decision")
    counter, pro = (persona.neutral_cues or persona.counter_cues)[:max_cues], persona.pro_cues[:max_cues]
    role = (("system", persona.role),)
    for number, item in both_orders(items):
        asked = item.question if item.before == role else item.asked  # the sentences alone make the contrast
        conversation = question_conversation(asked, placement, alternatives=item.alternatives)
        good = encode(model.tokenizer, conversation, counter[number % len(counter)])
        bad = encode(model.tokenizer, conversation, pro[number % len(pro)])
        yield good, bad, "", item.group


def search_conversations(
    items: Sequence[Item], read_position: str, *, placement: Placement = Placement()
) -> list[tuple[Conversation, str]]:
    """The fixed contexts of an objective, each with its read ("slot_last" or "input_last") for ``build_slots``.

    ``published``: one context per item, read at the last prompt token. ``matched``: four per item (both orders, both
    answers), read after the answer. ``decision``: two per item (both orders), read at the decision token.
    """
    check_read_position(read_position)
    if read_position == "published":
        return [(question_conversation(item.asked, placement), "slot_last") for item in items]
    if read_position == "decision":
        return [
            (question_conversation(item.asked, placement, alternatives=item.alternatives), "input_last")
            for _, item in both_orders(items)
        ]
    return [
        (question_conversation(item.asked, placement, answer=label), "input_last")
        for _, item in both_orders(items)
        for label in _answers(item)
    ]
