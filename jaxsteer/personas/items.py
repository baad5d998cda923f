"""Items of a persona dataset: a question with two answers, swapped copies, and splits disjoint by question."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence

from jaxsteer.errors import UserError
from jaxsteer.prompts.conversation import Turns

LABELS = ("(A)", "(B)")
"""Labels as stored: stripped. Spacing is settled where text is built (``jaxsteer.prompts.join_answer``)."""
SWAPPED = "~swapped"
REPLY_WORDS = 4
"""Answers that have this many words, the longer of the two, are replies."""
_LABEL_AT_LINE_START = re.compile(r"^[ \t]*\(([A-Z])\)[ \t]*", re.MULTILINE)
_OTHER_LABELS = tuple(
    re.compile(rf"^[ \t]*{label}(?=[ \t]+\S)", re.MULTILINE)
    for label in (r"\(([a-z1-9])\)", r"([A-Za-z1-9])\)", r"([A-Za-z1-9])\.")
)
FIRST_LABELS = ("A", "a", "1")
_LABEL_ANYWHERE = re.compile(r"(?<!\S)\(([A-Z])\)[ \t]*")
_END_OF_CHOICE = re.compile(
    r"\n\n"
    r"|\n[^\w\n]*(?:(?:please|now|my|your|the|i)[ ,]+)*(?:answer|reply|respond|choose|choice|select|pick|which)\b",
    re.IGNORECASE,
)
"""A blank line, or a line that says how to answer: what follows is no part of a choice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One question with two answers: labels "(A)" and "(B)" of choices in its text, or answers in words ("Yes")."""

    id: str
    question: str
    matching: str
    """The answer that shows the persona."""
    not_matching: str
    group: str
    """Equal for items that ask the same thing, in whatever order of choices; splits never separate them."""
    line: int = 0
    """Where the item stood in its file (0: it comes from no file)."""
    before: Turns = ()
    """The turns before the question, as (role, text): a system message, a conversation so far."""

    @property
    def asked(self) -> str | Turns:
        """The question as ``question_conversation`` takes it: with the turns before it."""
        return (*self.before, ("user", self.question)) if self.before else self.question

    @property
    def replies(self) -> bool:
        """Whether the answers are replies of several words, which are compared per token."""
        longest = max(len(answer.split()) for answer in (self.matching, self.not_matching))
        return not self.lettered and longest >= REPLY_WORDS

    @property
    def alternatives(self) -> tuple[str, ...]:
        """Both answers where one token decides between them, in an order that does not tell which shows the persona;
        none for replies, which begin where the conversation ends."""
        return () if self.replies else tuple(sorted((self.matching, self.not_matching)))

    @property
    def lettered(self) -> bool:
        """Whether the answers are labels of choices in the question, which can then be exchanged."""
        return self.matching in LABELS and self.not_matching in LABELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenQuestion:
    """A question with any number of right and wrong answers (TruthfulQA), or with none (to be answered freely)."""

    id: str
    question: str
    group: str
    best: str = ""
    """The best right answer; it is among ``correct``."""
    correct: tuple[str, ...] = ()
    incorrect: tuple[str, ...] = ()
    line: int = 0


@dataclasses.dataclass(frozen=True)
class Choices:
    """A question taken apart: ``stem + label + first + between + label + second + tail``."""

    stem: str
    labels: tuple[str, str]
    texts: tuple[str, str]
    between: str
    tail: str


def plain_labels(question: str) -> str:
    """The question with its choices labelled (A), (B), ..., where each begins a line with a), (a), 1), (1), A) or A."""
    if not _label_run(question) and (run := _label_run(question, _OTHER_LABELS)):
        for number, match in reversed(list(enumerate(run))):
            at = match.end() - len(match[0].lstrip())
            question = f"{question[:at]}({chr(ord('A') + number)}){question[match.end() :]}"
    return question


def mostly_replies(items: Sequence[Item]) -> bool:
    """Whether more than half of the items have replies: then all of their answers are compared per token."""
    return 2 * sum(item.replies for item in items) > len(items)


def count_choices(question: str) -> int:
    """How many choices a question offers, labelled (A), (B), … in a row at its end."""
    return len(_label_run(question))


def _label_run(
    question: str, patterns: Sequence[re.Pattern[str]] = (_LABEL_AT_LINE_START, _LABEL_ANYWHERE)
) -> list[re.Match[str]]:
    """The last run of labels A, B, C … of a question: at line starts, or else anywhere."""
    for pattern in patterns:
        run: list[re.Match[str]] = []
        for match in pattern.finditer(question):
            if match[1] in FIRST_LABELS:
                run = [match]
            elif run and ord(match[1]) == ord(run[0][1]) + len(run):
                run.append(match)
        if len(run) > 1:
            return run
    return []


def parse_choices(question: str) -> Choices:
    """The two choices of this question, in its own wording. Raises ``UserError`` unless there are exactly two."""
    run = _label_run(question)
    if len(run) != 2:
        raise UserError(f"expected a question with two choices, (A) and (B), but found {len(run)}: {question[-200:]!r}")
    first, second = run
    middle, rest = question[first.end() : second.start()], question[second.end() :]
    text_a, text_b = _choice_text(middle), _choice_text(rest)
    return Choices(
        stem=question[: first.start()],
        labels=(first[0], second[0]),
        texts=(text_a, text_b),
        between=middle[len(text_a) :],
        tail=rest[len(text_b) :],
    )


def _choice_text(text: str) -> str:
    """The choice that a text begins with, without last lines that end in a colon: wherever it stands, the same."""
    found = _END_OF_CHOICE.split(text, maxsplit=1)[0].rstrip()
    while found.endswith(":") and "\n" in found:
        found = found[: found.rindex("\n")].rstrip()
    return found


def number_of_questions(items: Iterable[Item | OpenQuestion]) -> int:
    """How many questions are asked: items with other orders of choices or other replies ask the same one."""
    return len({item.group for item in items})


def orders(item: Item) -> tuple[Item, ...]:
    """The item and its swapped copy; the item alone where its answers are no labels."""
    return (item, swap(item)) if item.lettered else (item,)


def swap(item: Item) -> Item:
    """The item with the choice texts exchanged, and hence the labels too. Its own inverse."""
    c = parse_choices(item.question)
    question = c.stem + c.labels[0] + c.texts[1] + c.between + c.labels[1] + c.texts[0] + c.tail
    renamed = item.id.removesuffix(SWAPPED) if item.id.endswith(SWAPPED) else item.id + SWAPPED
    return dataclasses.replace(
        item, id=renamed, question=question, matching=item.not_matching, not_matching=item.matching
    )


def group_of(question: str) -> str:
    """A short hash that is equal for the same question, case and spacing aside; with two choices, in either order."""
    parts = [question]
    if count_choices(question) == 2:
        c = parse_choices(question)
        parts = [c.stem, *sorted(normal(t) for t in c.texts), c.tail]
    return hashlib.sha256("\x1f".join(normal(part) for part in parts).encode()).hexdigest()[:16]


def normal(text: str) -> str:
    """Text for comparisons: spacing and case do not count."""
    return " ".join(text.split()).casefold()


def data_hash(items: Iterable[Item]) -> str:
    """Sha256 over questions and answers; the order of rows, ids and line numbers do not matter."""
    rows = sorted(
        (item.question, item.matching, item.not_matching, *([json.dumps(item.before)] if item.before else []))
        for item in items
    )
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
