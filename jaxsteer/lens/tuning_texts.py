"""The texts that a lens is trained on: files, an organism's corpus, or what the model itself replies to questions."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.lens.pushes import persona_questions
from jaxsteer.lens.texts import rows_of_texts
from jaxsteer.models.model import Model
from jaxsteer.personas import load_persona
from jaxsteer.prompts.generate import generate
from jaxsteer.runs.bars import progress_bar
from jaxsteer.runs.files import read_lines, write_lines
from jaxsteer.sae.texts import Documents, FileDocuments, documents_of

NEW = 96
"""Tokens of a reply, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainingTexts:
    """Numbered texts."""

    documents: Documents
    count: int | None
    """How many there are; None for any number."""
    told: dict[str, Any]
    """Which they are, for JSON."""


def texts_to_train(
    model: Model,
    data: Sequence[Path],
    persona: str | None,
    written: int,
    out: Path,
    *,
    seed: int,
    say: Callable[[str], None],
) -> TrainingTexts:
    """The texts of files, or ``written`` replies of the model to a persona's questions, or an organism's corpus.

    Replies are kept beside the directory ``out`` in ``OUT.replies.jsonl``, so that a training that is cut off goes on
    with them. Raises ``UserError`` for files and a persona together, and for none where the model brings no texts.
    """
    if (persona is None) != (not written) or (data and persona is not None):
        raise UserError("texts come from --data, or from --written N replies to the questions of --persona: give one")
    if persona is not None:
        rows = _replies(model, persona, written, out, seed, say)
        return TrainingTexts(
            documents=lambda i: rows[i % len(rows)],
            count=len(rows),
            told={"persona": persona, "written": written, "hash": _hash(rows)},
        )
    documents = documents_of(model, data, seed=seed)
    count = len(documents) if isinstance(documents, FileDocuments) else None
    shown = [documents(i) for i in range(8 if count is None else min(8, count))]
    told = {"files": [path.name for path in data], "documents": count, "hash": _hash(shown)}
    if count is not None:  # in one order, so that what is held out stays held out
        return TrainingTexts(documents=lambda i: documents(i % count), count=count, told=told)
    return TrainingTexts(documents=documents, count=None, told=told)


def _replies(
    model: Model, persona: str, count: int, out: Path, seed: int, say: Callable[[str], None]
) -> list[list[int]]:
    """Conversations with the model's own replies, as ids: written once, and read again."""
    path = out.with_name(f"{out.name}.replies.jsonl")
    asked = {"model": model.fingerprint, "persona": persona, "count": count, "seed": seed}
    kept = read_lines(path)
    if kept and kept[0] == asked and len(kept) == count + 1:
        return [[int(i) for i in row["ids"]] for row in kept[1:]]
    if kept:
        raise UserError(f"{path} holds other replies: give another --out, or delete it")
    questions = persona_questions(load_persona(persona), count)
    prompts = rows_of_texts(model, questions)
    drawn = [prompts[i % len(prompts)] for i in range(count)]
    say(f"{model.name} writes {count} replies to {len(prompts)} questions of {persona}")
    with progress_bar("writing") as advance:
        made = generate(
            model, drawn, temperature=1.0, max_new_tokens=NEW, seed=seed, progress=lambda done, of: advance(done, of)
        )
    rows = [
        np.concatenate([prompt.ids, ids[:length]]).astype(int).tolist()
        for prompt, ids, length in zip(drawn, np.asarray(made.tokens), made.lengths, strict=True)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, [asked, *({"ids": row, "text": model.tokenizer.decode(row)} for row in rows)])
    return rows


def _hash(rows: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(repr([list(map(int, row)) for row in rows]).encode()).hexdigest()[:16]
