"""Readers of dataset files, one per schema; what is wrong in a file is named with its line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.files import parse_json
from jaxsteer.personas.dataset_files import Row, place, read_rows, require
from jaxsteer.personas.items import (
    LABELS,
    REPLY_WORDS,
    Item,
    OpenQuestion,
    count_choices,
    data_hash,
    group_of,
    normal,
    parse_choices,
    plain_labels,
    swap,
)
from jaxsteer.personas.row_forms import read_row
from jaxsteer.personas.sources import Source

log = logging.getLogger(__name__)

FIELDS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
PAIR_FIELDS = ("question", "right_answer", "hallucinated_answer")
WORDS = ("Yes", "No")
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_OTHER_LETTER = re.compile(r"\(?([A-Za-z1-9])[).]?[.:]?")
_LABEL_LIKE = re.compile(r"([^\w\s]*)(\w)([^\w\s]*)")
_DUPLICATES = "exact duplicates"
_OTHERS = "questions that do not offer two choices"
_SAME = "questions whose two choices are the same or empty"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """What one dataset file holds."""

    name: str
    path: Path
    source: Source | None
    """Where it comes from; ``None`` for a file of the user's own."""
    items: tuple[Item, ...] = ()
    """Questions with two answers; () for questions that are to be answered freely."""
    questions: tuple[OpenQuestion, ...] = ()
    """Questions with all their answers, or with none."""
    rows: int = 0
    """Rows of the file."""
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows that were left out, by reason."""

    @property
    def data_hash(self) -> str:
        """sha256 over questions and answers, whatever the order of rows."""
        if self.items:
            return data_hash(self.items)
        return hashlib.sha256(json.dumps(sorted(q.question for q in self.questions)).encode()).hexdigest()


def read_items(path: str | os.PathLike[str]) -> tuple[Item, ...]:
    """The two-answer items of a dataset file, in its order. Raises ``UserError`` naming file and line."""
    return read_choices(Path(path)).items


def _finish(path: Path, rows: int, dropped: Counter[str], *, fields: Sequence[str], **found: Any) -> Dataset:
    """The dataset; tells what was dropped, and refuses one that holds nothing."""
    if not rows:
        raise UserError(f"{path} is empty: expected one question per line with {', '.join(fields)}")
    if dropped.total():
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        log.warning("%s: dropped %s; %d of %d rows are used", path, reasons, rows - dropped.total(), rows)
    return Dataset(name=path.stem, path=path, source=None, rows=rows, dropped=dict(dropped), **found)


def read_choices(path: Path) -> Dataset:
    """A file of rows with two answers, as ``choices_of`` takes them."""
    return choices_of(path, read_rows(path, ()))


def choices_of(path: Path, found_rows: Iterable[Row]) -> Dataset:
    """Rows with two answers (``row_forms``): labels of two choices in the question, "Yes" and "No", or replies.

    ``path`` names them in errors.
    """
    items: list[Item] = []
    by_group: dict[str, Item] = {}
    seen: set[tuple[str, ...]] = set()
    dropped: Counter[str] = Counter()
    rows = 0
    for line, raw in found_rows:
        rows += 1
        row = read_row(path, line, raw)
        answers, question = [row.matching, row.not_matching], row.question
        labels = [_OTHER_LETTER.fullmatch(answer) for answer in answers]
        if all(labels) and (question := plain_labels(row.question)) != row.question:
            answers = [f"({chr(ord('A') + int(m[1]) - 1) if m[1].isdigit() else m[1]})" for m in labels if m]
        choices = count_choices(question)
        lettered = [_label(answer) for answer in answers]
        if choices > 2 or (not choices and any(lettered)):
            dropped[_OTHERS] += 1
            continue
        in_words = not any(lettered) and max(len(answer.split()) for answer in answers) >= REPLY_WORDS
        if choices == 2 and not in_words:
            texts = [normal(text) for text in parse_choices(question).texts]
            if texts[0] == texts[1] or not all(texts):
                dropped[_SAME] += 1
                continue
            for answer, label, field in zip(answers, lettered, row.fields, strict=True):
                if label not in LABELS:
                    raise UserError(
                        f"{place(path, line)}: {field} is {answer!r}; expected the label of one of two choices, (A) or "
                        "(B), with or without a space before it"
                    )
            answers = lettered
        elif all(_labels_a_line(answer, question) for answer in answers):
            raise UserError(
                f"{place(path, line)}: the answers {answers[0]!r} and {answers[1]!r} look like labels of choices in a "
                "form that is not read; write (A) and (B) before the choices, and as the answers"
            )
        elif {answer.capitalize() for answer in answers} <= set(WORDS):
            answers = [answer.capitalize() for answer in answers]
        if normal(answers[0]) == normal(answers[1]):
            raise UserError(f"{place(path, line)}: both answers are {answers[0]}; they must differ")
        item = Item(
            id=str(raw.get("id") or f"{path.stem}-{line}"),
            question=question,
            matching=answers[0],
            not_matching=answers[1],
            group=group_of(question or "\n".join(sorted(answers))),
            line=line,
            before=row.before,
        )
        if (key := (item.question, *answers, str(item.before))) in seen:
            dropped[_DUPLICATES] += 1
            continue
        if not item.replies:
            _refuse_contradiction(path, item, by_group.setdefault(f"{item.group}{item.before}", item))
        seen.add(key)
        items.append(item)
    found = _finish(path, rows, dropped, fields=FIELDS, items=tuple(items))
    if not items:
        raise UserError(f"{path}: none of its {rows} questions offers two different choices, (A) and (B)")
    if len({item.lettered for item in items}) > 1:
        raise UserError(f"{path}: some answers are labels of choices, others are words: make it two datasets")
    return found


def _refuse_contradiction(path: Path, item: Item, first: Item) -> None:
    """The same question, in either order of choices, must have the same matching choice."""
    other = item if normal(item.question) == normal(first.question) else swap(item)
    if other.matching != first.matching:
        raise UserError(
            f"{path}: lines {first.line} and {item.line} ask the same question but disagree on which choice matches "
            f"the behaviour: remove one of them"
        )


def _labels_a_line(answer: str, question: str) -> bool:
    """Whether the answer is one sign, perhaps in brackets, that begins a line of the question before a mark."""
    match = _LABEL_LIKE.fullmatch(answer)
    return match is not None and bool(re.search(rf"^[^\w\n]*{match[2]}[^\w\s]", question, re.MULTILINE))


def _label(answer: str) -> str:
    """The label of a choice in the spelling of ``LABELS``; "" for words."""
    match = _LETTER.fullmatch(answer)
    return f"({match[1].upper()})" if match else ""


def read_truthful(path: Path, seed: int) -> Dataset:
    """TruthfulQA: its CSV, the hub's Parquet file, or RESGA's table with one true answer and a JSON list of others.

    Also the hub's form with multiple choices. An item compares the best answer with the best wrong one, where the file
    has it (that of 2025), else with one that is drawn from ``seed`` and the question. Answers that are listed as right
    and as wrong are not among the wrong ones.
    """
    questions: dict[str, OpenQuestion] = {}
    items: list[Item] = []
    dropped: Counter[str] = Counter()
    rows = doubtful = 0
    for line, raw in read_rows(path, ()):
        rows += 1
        row = {str(key).strip().lower().replace(" ", "_"): value for key, value in raw.items()}
        row |= _from_targets(path, line, row)
        best_name = "true_answer" if "true_answer" in row else "best_answer"
        require(path, line, row, ("question", best_name))
        question, best = row["question"].strip(), row[best_name].strip()
        correct = _answers(path, line, row, "correct_answers") if best_name == "best_answer" else ()
        incorrect = _answers(path, line, row, "incorrect_answers")
        right = {normal(answer) for answer in (best, *correct)}
        clear = tuple(answer for answer in incorrect if normal(answer) not in right)
        doubtful += len(incorrect) - len(clear)
        if not clear:
            raise UserError(f"{place(path, line)}: no wrong answer in incorrect_answers; at least one is needed")
        group = group_of(question)
        if group in questions:
            dropped[_DUPLICATES] += 1
            continue
        ident = f"{path.stem}-{line}"
        questions[group] = OpenQuestion(
            id=ident,
            question=question,
            group=group,
            best=best,
            correct=tuple(dict.fromkeys((best, *correct))),
            incorrect=clear,
            line=line,
        )
        wrong = clear[_drawn(seed, question, len(clear))]
        if normal(found := str(row.get("best_incorrect_answer") or "").strip()) not in {"", *right}:
            wrong = found
        items.append(Item(id=ident, question=question, matching=wrong, not_matching=best, group=group, line=line))
    if doubtful:
        log.warning("%s: left out %d wrong answers that are listed as right answers too", path, doubtful)
    fields = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
    return _finish(path, rows, dropped, fields=fields, items=tuple(items), questions=tuple(questions.values()))


def _from_targets(path: Path, line: int, row: dict[str, Any]) -> dict[str, Any]:
    """The answers of the form with multiple choices: mc1_targets has one right answer, mc2_targets may have more."""
    found: dict[str, Any] = {}
    for name in ("mc2_targets", "mc1_targets"):
        value = row.get(name)
        if value is None:
            continue
        where = f"{place(path, line)}, {name}"
        value = parse_json(value, where) if isinstance(value, str) else value
        if isinstance(value, dict) and "choices" in value:
            pairs = list(zip(value["choices"], value.get("labels") or (), strict=False))
        else:
            pairs = list(value.items()) if isinstance(value, dict) else []
        right, wrong = ([str(text) for text, label in pairs if label == wanted] for wanted in (1, 0))
        if not right or not wrong:
            raise UserError(f"{where}: expected choices and labels, 1 for right and 0 for wrong, got {str(value)[:60]}")
        found = {"correct_answers": right, "incorrect_answers": wrong} | found | {"best_answer": right[0]}
    return found


def _answers(path: Path, line: int, row: dict[str, Any], field: str) -> tuple[str, ...]:
    """Answers from a list, a JSON list, or a text that separates them by semicolons."""
    value = row.get(field)
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            value = parse_json(value, f"{place(path, line)}, {field}")
        else:
            value = value.split(";")
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        found = ", ".join(sorted(row)) or "nothing"
        raise UserError(
            f"{place(path, line)}: {field} must be answers separated by semicolons or a list of texts, got "
            f"{str(value)[:60]!r}; the row has {found}"
        )
    return tuple(dict.fromkeys(answer.strip() for answer in value if answer.strip()))


def _drawn(seed: int, question: str, n: int) -> int:
    """A number below n, fixed by the seed and the question whatever the order of rows."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1f{question}".encode()).digest()[:8], "big") % n


def read_pairs(path: Path) -> Dataset:
    """HaluEval's questions: a right answer and a hallucinated one; the passage they come from is not shown."""
    items: list[Item] = []
    seen: set[tuple[str, str, str]] = set()
    dropped: Counter[str] = Counter()
    rows = 0
    for line, row in read_rows(path, PAIR_FIELDS):
        rows += 1
        require(path, line, row, PAIR_FIELDS)
        question, right, wrong = (row[field].strip() for field in PAIR_FIELDS)
        if normal(right) == normal(wrong):
            dropped["questions whose two answers are the same"] += 1
            continue
        if (question, right, wrong) in seen:
            dropped[_DUPLICATES] += 1
            continue
        seen.add((question, right, wrong))
        items.append(
            Item(
                id=f"{path.stem}-{line}",
                question=question,
                matching=wrong,
                not_matching=right,
                group=group_of(question),
                line=line,
            )
        )
    return _finish(path, rows, dropped, fields=PAIR_FIELDS, items=tuple(items))


def read_open(path: Path) -> Dataset:
    """Questions alone."""
    questions: dict[str, OpenQuestion] = {}
    rows = 0
    for line, row in read_rows(path, FIELDS[:1]):
        rows += 1
        require(path, line, row, FIELDS[:1])
        text = row["question"].strip()
        questions.setdefault(
            text, OpenQuestion(id=f"{path.stem}-{line}", question=text, group=group_of(text), line=line)
        )
    dropped = Counter({_DUPLICATES: rows - len(questions)})
    return _finish(path, rows, dropped, fields=FIELDS[:1], questions=tuple(questions.values()))
