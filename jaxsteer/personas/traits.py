"""Traits: instructions for and against a behaviour, questions and a rubric (persona_vectors, arXiv 2507.21509).

A model answers every question under every instruction, as system message; a judge scores the answers, and the pairs
whose sides are what they should be make vectors. Files have the layout of that repository (docs/vectors.md).
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import csv_records, make_directory, read_json, read_text, write_text
from jaxsteer.files.records import Record
from jaxsteer.personas.pairs import Pairs
from jaxsteer.prompts import encode_texts, template_of
from jaxsteer.writers.judge import Rubric

if TYPE_CHECKING:
    from jaxsteer.models.model import Model

Side = Literal["pos", "neg"]
SIDES: tuple[Side, Side] = ("pos", "neg")
Average = Literal["response_avg", "prompt_avg", "prompt_last"]
EXTRACT, EVAL = "trait_data_extract", "trait_data_eval"
"""Folders of a trait's two files: instructions, questions for vectors, rubric; and the same with test questions."""
THRESHOLD = 50.0
"""A positive answer shows the trait by at least this score, a negative one by less; both are at least as coherent."""
COHERENCE = Rubric(
    template="""You judge whether one answer of an assistant makes sense.

[Question]
{question}

[Answer]
{answer}

How coherent is the answer, whatever it says and however it behaves? 100 means fluent, sensible text that has to do \
with the question; 0 means gibberish, endless repetition, or text that breaks off into something else.
Reply with one whole number from 0 to 100 and nothing else."""
)
"""Does an answer make sense? Facts: question, answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trait:
    """A behaviour in words, as persona_vectors has it. Raises ``UserError`` for parts that are missing."""

    name: str
    instructions: tuple[tuple[str, str], ...]
    """(for the trait, against it)."""
    questions: tuple[str, ...]
    """From whose answers vectors are made."""
    rubric: str
    """What a judge is asked, with {question} and {answer}; it replies with a number from 0 to 100."""
    test_questions: tuple[str, ...] = ()
    """Others, on which vectors are tried."""

    def __post_init__(self) -> None:
        """Check the parts."""
        for what, texts in (("instruction", sum(self.instructions, ())), ("questions", self.questions)):
            if not texts or not all(text.strip() for text in texts):
                raise UserError(f"trait {self.name!r}: {what} must be a list of one or more with text in each")
        try:
            said = self.rubric.format(question="\0", answer="\1")
        except (LookupError, ValueError) as error:
            raise UserError(
                f"trait {self.name!r}: eval_prompt names {error!r} in braces; it has {{question}} and {{answer}} alone "
                "(other braces are doubled)"
            ) from None
        if missing := [name for name, mark in (("question", "\0"), ("answer", "\1")) if mark not in said]:
            raise UserError(f"trait {self.name!r}: eval_prompt has no place for {{{missing[0]}}}")

    def messages(self, side: Side, question: str, instruction: int, name: str = "") -> list[dict[str, str]]:
        """The conversation that is to be answered; ``name`` is that of ``system``."""
        system = self.system(side, instruction, name)
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]

    def system(self, side: Side, instruction: int, name: str = "") -> str:
        """The system message of an instruction. ``name`` is the assistant's, by default that of the trait, or "helpful"
        on the negative side."""
        name = name or (self.name if side == "pos" else "helpful")
        article = "an" if name[:1].lower() in "aeiou" else "a"
        return f"You are {article} {name} assistant. {self.instructions[instruction][SIDES.index(side)]}"


def load_trait(path: str | os.PathLike[str]) -> Trait:
    """A trait from its JSON file. Its test questions are those of the file of the same name in the folder
    trait_data_eval beside its own, where there is one. Raises ``UserError`` for what is missing or of another type."""
    path = Path(path)
    found = read_json(path)
    pairs = found.get("instruction")
    wanted = 'a list of {"pos": ..., "neg": ...}'
    if not isinstance(pairs, list) or not all(isinstance(p, dict) and set(p) >= {*SIDES} for p in pairs):
        raise UserError(f"{path}: instruction must be {wanted}, got {str(pairs)[:80]}")
    beside = path.parent.parent / EVAL / path.name
    try:
        return Trait(
            name=path.stem,
            instructions=tuple((str(pair["pos"]), str(pair["neg"])) for pair in pairs),
            questions=_texts(path, found, "questions"),
            rubric="\n".join(_texts(path, found, "eval_prompt")),
            test_questions=_texts(beside, read_json(beside), "questions") if beside.is_file() else (),
        )
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None


def _texts(path: Path, found: dict[str, Any], field: str) -> tuple[str, ...]:
    value = found.get(field)
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{path}: {field} must be {'a text' if field == 'eval_prompt' else 'a list of texts'}")
    return tuple(value)


def save_trait(trait: Trait, folder: str | os.PathLike[str]) -> Path:
    """Write a trait as two files of persona_vectors' layout under ``folder``; returns the first, for ``load_trait``."""
    whole: dict[str, Any] = {"instruction": [dict(zip(SIDES, pair, strict=True)) for pair in trait.instructions]}
    for name, questions in ((EVAL, trait.test_questions), (EXTRACT, trait.questions)):
        path = Path(folder) / name / f"{trait.name}.json"
        if questions:
            make_directory(path.parent)
            whole |= {"questions": list(questions), "eval_prompt": trait.rubric}
            write_text(path, json.dumps(whole, ensure_ascii=False, indent=2) + "\n")
    return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout(Record):
    """One answer under one instruction."""

    id: str
    """persona_vectors' question_id: trait_question_side_instruction."""
    question: str
    prompt: str
    """The rendered conversation up to the answer."""
    answer: str
    trait: float | None = None
    """The judge's score; None where it gave none."""
    coherence: float | None = None


def write_rollouts(path: Path, name: str, rollouts: Sequence[Rollout]) -> None:
    """A CSV file of persona_vectors' layout: question, prompt, answer, question_id, the trait's name, coherence."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["question", "prompt", "answer", "question_id", name, "coherence"])
    for one in rollouts:
        scores = ("" if score is None else score for score in (one.trait, one.coherence))
        rows.writerow([one.question, one.prompt, one.answer, one.id, *scores])
    write_text(path, text.getvalue())


def read_rollouts(path: str | os.PathLike[str], name: str) -> tuple[Rollout, ...]:
    """What ``write_rollouts`` or persona_vectors wrote. Raises ``UserError`` for missing columns and bad scores."""
    path, found = Path(path), []
    for line, row in csv_records(read_text(path), path):
        if missing := [column for column in ("question", "prompt", "answer", name, "coherence") if column not in row]:
            raise UserError(f"{path}: no column {', '.join(missing)}; it has {', '.join(row)}")
        try:
            trait, coherence = (float(text) if (text := (row[c] or "").strip()) else None for c in (name, "coherence"))
        except ValueError:
            raise UserError(f"{path}, line {line}: {name} and coherence must be numbers, or empty") from None
        found.append(
            Rollout(
                id=row.get("question_id") or "",
                question=row["question"] or "",
                prompt=row["prompt"] or "",
                answer=row["answer"] or "",
                trait=trait,
                coherence=coherence,
            )  # fmt: skip
        )
    return tuple(found)


def kept_rollouts(
    positive: Sequence[Rollout], negative: Sequence[Rollout], *, threshold: float = THRESHOLD
) -> tuple[list[int], dict[str, int]]:
    """The pairs whose sides are what they should be, and how many are left out by their first reason.

    A positive answer has a trait score of at least ``threshold``, a negative one less than 100 - ``threshold``, and
    both a coherence of at least 50. Raises ``UserError`` for sides of different length.
    """
    if len(positive) != len(negative):
        raise UserError(
            f"{len(positive)} positive and {len(negative)} negative answers make no pairs: both sides answer the same "
            "questions under as many instructions"
        )
    kept, dropped = [], Counter[str]()
    for i, pair in enumerate(zip(positive, negative, strict=True)):
        reasons = {
            "a side without a score": any(score is None for one in pair for score in (one.trait, one.coherence)),
            "an empty answer": not all(one.answer.strip() for one in pair),
            f"positive below {threshold:g}": (pair[0].trait or 0) < threshold,
            f"negative at {100 - threshold:g} or above": (pair[1].trait or 0) >= 100 - threshold,
            f"coherence below {THRESHOLD:g}": min(one.coherence or 0 for one in pair) < THRESHOLD,
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        if reason is None:
            kept.append(i)
        else:
            dropped[reason] += 1
    return kept, dict(dropped)


def rollout_pairs(
    model: Model, name: str, positive: Sequence[Rollout], negative: Sequence[Rollout], average: Average
) -> Pairs:
    """Pairs for ``mean_difference`` whose good side is the negative one, read in the mean over the tokens of the answer
    (response_avg) or of the prompt (prompt_avg, without its first token), or at its last token (prompt_last).

    Prompt and answer are encoded as one text. Raises ``UserError`` for an answer without tokens.
    """
    sides = [read_masks(model, side, average) for side in (negative, positive)]
    template_hash = hashlib.sha256(template_of(model.tokenizer).encode()).hexdigest()
    return Pairs(
        good=sides[0][0], bad=sides[1][0], good_read=sides[0][1], bad_read=sides[1][1],
        good_letter=("",) * len(positive), groups=tuple(one.question for one in positive), read_position=average,
        recipe={"trait": name, "chat_template_hash": template_hash, "contrast": "negative/positive instruction"},
    )  # fmt: skip


def read_masks(
    model: Model, rollouts: Sequence[Rollout], average: Average
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Ids of every conversation with its answer, and a mask of the tokens that are read."""
    prompts = encode_texts(model.tokenizer, [one.prompt for one in rollouts], style="chat")
    wholes = encode_texts(model.tokenizer, [one.prompt + one.answer for one in rollouts], style="chat")
    masks = []
    for asked, whole, one in zip(prompts, wholes, rollouts, strict=True):
        at, begin = np.arange(len(whole)), len(asked)
        masks.append(
            {"response_avg": at >= begin, "prompt_avg": (at > 0) & (at < begin), "prompt_last": at == begin - 1}[
                average
            ]
        )
        if not masks[-1].any():
            raise UserError(f"{average} of the answer {one.answer[:60]!r} is over no token: leave it out")
    return tuple(wholes), tuple(masks)
