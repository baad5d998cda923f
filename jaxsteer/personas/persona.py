"""A persona: items that show a behaviour, sentences that call it up or off, and splits disjoint by question."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.personas.dataset_formats import choices_of
from jaxsteer.personas.items import Item, OpenQuestion, data_hash, number_of_questions
from jaxsteer.personas.replies import with_replies
from jaxsteer.ranges import as_tuple

if TYPE_CHECKING:
    from jaxsteer.models.model import Model

Goal = Literal["reduce", "elicit"]
FRACTIONS = (0.6, 0.2, 0.2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Persona:
    """A behaviour: items that show it by one of two answers, and sentences that call it up or off."""

    name: str
    items: tuple[Item, ...] = ()
    """Empty for a persona in words alone, whose replies a model still has to write (``with_replies``)."""
    counter_cues: tuple[str, ...] = ()
    """Sentences against the behaviour, strongest first; the good side of the "decision" contrast."""
    pro_cues: tuple[str, ...] = ()
    data_hash: str = ""
    """sha256 over questions and answers, whatever the order of rows."""
    description: str = ""
    behaviour: str = ""
    """What the items are about ("sycophancy", "speaking like a pirate", …), for instructions and for a judge; "" where
    nobody said."""
    reasons: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """Sentences that justify the matching answer, and the other one, where they are known."""
    questions: tuple[OpenQuestion, ...] = ()
    """The items with all of their answers, where the dataset has more than two; groups are those of the items."""
    role: str = ""
    """A system message that puts a model in character."""
    neutral_cues: tuple[str, ...] = ()
    """Sentences that ask for nothing in particular. Where there are some, a direction is the contrast to them."""
    ask: tuple[str, ...] = ()
    """Of a persona in words alone, the questions that it is asked."""
    goal: Goal = "reduce"
    """What is usually wanted: less of the behaviour, or more."""
    fractions: tuple[float, float, float] = FRACTIONS
    """Shares of train, validation and test questions."""
    recipe: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Who wrote the answers, and how, where a model did."""

    def __post_init__(self) -> None:
        """One text in the place of several is one, not its letters."""
        for field in ("counter_cues", "pro_cues", "neutral_cues", "ask"):
            object.__setattr__(self, field, as_tuple(getattr(self, field)))

    @classmethod
    def from_pairs(cls, pairs: Iterable[Any], *, name: str = "pairs", **fields: Any) -> Persona:
        """A persona from (question, matching, not matching) or (matching, not matching) texts, or rows of any form that
        dataset files have (``row_forms``). ``fields`` are others of this class.

        Raises ``UserError``, with the number of the row, for what cannot be used.
        """
        rows = [_as_row(pair, number, name) for number, pair in enumerate(pairs, 1)]
        items = choices_of(Path(name), enumerate(rows, 1)).items
        return cls(name=name, items=items, data_hash=data_hash(items), **fields)

    @classmethod
    def from_frame(
        cls, frame: Any, *, name: str = "frame", columns: Mapping[str, str] | None = None, **fields: Any
    ) -> Persona:
        """A persona from the rows of a pandas data frame. ``columns`` renames its columns to fields of a row, for
        example ``{"q": "question", "good": "positive", "bad": "negative"}``."""
        if not hasattr(frame, "rename"):
            raise UserError(f"from_frame reads a pandas data frame, got {type(frame).__name__}: from_pairs reads rows")
        rows = frame.rename(columns=dict(columns or {})).to_dict("records")
        return cls.from_pairs(rows, name=name, **fields)

    @classmethod
    def from_replies(
        cls, model: Model, role: str, questions: str | Sequence[str], *, name: str = "role", **fields: Any
    ) -> Persona:
        """A persona whose replies the model writes itself, under a role's system message and without it.

        ``fields`` are others of this class, for example ``pro_cues``; the ``goal`` is by default to elicit the role.
        Keep it with ``save_persona``. Raises ``UserError`` as ``with_replies`` does.
        """
        given = {"goal": "elicit", **fields}
        return with_replies(model, cls(name=name, role=role, ask=as_tuple(questions), **given))

    @property
    def subject(self) -> str:
        """What sentences against it name: its behaviour, or its name where nobody said."""
        return self.behaviour or self.name

    @property
    def sign(self) -> int:
        """Of a direction away from the persona, what the goal asks for: 1 to reduce, -1 to elicit."""
        return 1 if self.goal == "reduce" else -1

    def answers(self, item: Item) -> tuple[str, str]:
        """The answer that the goal asks for, and the other."""
        shown, other = item.matching, item.not_matching
        return (other, shown) if self.goal == "reduce" else (shown, other)

    @property
    def sentences(self) -> dict[str, tuple[str, ...]]:
        """The cue sentences by what they are for: "reduce" and "elicit"."""
        return {"reduce": self.counter_cues, "elicit": self.pro_cues}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """Items for directions and contexts (train), for choices (validation) and for reporting, once (test)."""

    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    seed: int
    fractions: tuple[float, float, float]

    @property
    def questions(self) -> dict[str, int]:
        """How many questions each part asks."""
        return {name: number_of_questions(getattr(self, name)) for name in ("train", "validation", "test")}


def split(
    persona: Persona | Sequence[Item], *, seed: int, fractions: tuple[float, float, float] | None = None
) -> Splits:
    """Train, validation and test items: disjoint by group, stratified by label letter, fixed by ``seed``.

    ``fractions`` are by default the persona's own, 60, 20 and 20 %.
    The same seed gives the same splits whatever the order of rows. Raises ``UserError`` for fractions that are not
    three positive numbers summing to 1, and when a part would be empty.
    """
    items = persona.items if isinstance(persona, Persona) else tuple(persona)
    if isinstance(persona, Persona) and not items:
        raise UserError(
            f"persona {persona.name!r} is in words alone: let a model write its replies first, "
            "jaxsteer.personas.with_replies(model, persona)"
        )
    fractions = fractions or (persona.fractions if isinstance(persona, Persona) else FRACTIONS)
    check_fractions(fractions)
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.group].append(item)
    strata: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for group, members in groups.items():
        strata[tuple(sorted({m.matching for m in members}))].append(group)
    # Laid end to end, strata share one rounding: each part takes every stratum's share to within one group.
    order = [
        ((rank + 0.5) / len(members), group)
        for _, members in sorted(strata.items())
        for rank, group in enumerate(sorted(members, key=lambda g: _shuffled(seed, g)))
    ]
    order.sort(key=lambda pair: (pair[0], _shuffled(seed, pair[1])))
    cuts = _cuts(fractions, len(order))
    parts = [
        tuple(
            item for _, group in chunk for item in sorted(groups[group], key=lambda i: (i.question, i.matching, i.id))
        )
        for chunk in (order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :])
    ]
    if not all(parts):
        more = range(len(order), len(order) + 10_000)
        enough = next((n for n in more if np.diff([0, *_cuts(fractions, n), n]).all()), "many more")
        raise UserError(
            f"{len(order)} different questions cannot be split {fractions} into three parts that hold at least one "
            f"question each: give at least {enough}"
        )
    return Splits(train=parts[0], validation=parts[1], test=parts[2], seed=seed, fractions=fractions)


def check_fractions(fractions: Any, where: str = "") -> None:
    """Raise ``UserError``, which begins with ``where``, unless there are three positive numbers that sum to 1."""
    numbers = isinstance(fractions, list | tuple) and all(isinstance(share, int | float) for share in fractions)
    if not (numbers and len(fractions) == 3 and min(fractions) > 0 and abs(sum(fractions) - 1) <= 1e-6):
        raise UserError(f"{where}fractions must be three positive numbers that sum to 1, got {str(fractions)[:80]}")


def _cuts(fractions: tuple[float, float, float], n: int) -> np.ndarray:
    """Where of ``n`` questions the second and the third part begin."""
    return np.rint(np.cumsum(fractions)[:2] * n).astype(int)


def _shuffled(seed: int, group: str) -> bytes:
    return hashlib.sha256(f"{seed}\x1f{group}".encode()).digest()


def _as_row(pair: Any, number: int, name: str) -> dict[str, Any]:
    """A row of a dataset file."""
    if isinstance(pair, Mapping):
        return {str(field): value for field, value in pair.items()}
    if isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) in (2, 3):
        return dict(zip(("question", "positive", "negative")[-len(pair) :], pair, strict=True))
    raise UserError(
        f"{name}, line {number}: expected (question, matching, not matching), (matching, not matching) or a mapping, "
        f"got {str(pair)[:80]!r}"
    )
