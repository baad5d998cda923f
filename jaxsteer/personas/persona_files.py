"""Persona files: one JSON object with sentences, a role, and rows, questions or the name of a dataset beside it.

The characters that ship with the package are such files, in words alone: a model writes their replies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from importlib import resources
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.files import kind_of, parse_json, read_text, write_text
from jaxsteer.personas.dataset_formats import Dataset, choices_of, read_items
from jaxsteer.personas.items import OpenQuestion, data_hash, group_of
from jaxsteer.personas.persona import FRACTIONS, Persona, check_fractions

log = logging.getLogger(__name__)

PREFIX = "characters/"
CHARACTERS = tuple(f"{PREFIX}{name}" for name in ("pirate", "ghost", "jester", "accountant"))
TEXTS = ("name", "description", "behaviour", "role", "goal")
LISTS = ("counter_cues", "pro_cues", "neutral_cues", "questions")
FIELDS = (*TEXTS, *LISTS, "data", "fractions", "recipe")


def character_file(name: str) -> Path | None:
    """The file of a character that ships with the package; ``None`` for other names."""
    if name not in CHARACTERS:
        return None
    return Path(str(resources.files("jaxsteer.personas") / "characters" / f"{name.removeprefix(PREFIX)}.json"))


def read_persona_file(path: Path) -> Persona | None:
    """The persona of a file with one JSON object; ``None`` for other files.

    ``data`` is a list of rows (``row_forms``) or the name of a dataset file beside it. Without it ``questions``, a list
    of texts or the name of a file beside it, are asked, and ``role`` is what the model writes replies with. Raises
    ``UserError`` for unknown fields, fields of other types and for rows that cannot be used.
    """
    whole = _object(path)
    if whole is None:
        return None
    refuse_unknown(whole, FIELDS, "field", f"{path}: ")
    for field in TEXTS:
        if not isinstance(whole.get(field, ""), str):
            raise UserError(f"{path}: {field} must be a text, got {kind_of(whole[field])}")
    if isinstance(whole.get("questions"), str):
        whole["questions"] = parse_json(read_text(beside := path.parent / whole["questions"]), beside)
    cues = {field: _texts(path, whole, field) for field in LISTS}
    if (goal := whole.get("goal", "reduce")) not in ("reduce", "elicit"):
        raise UserError(f"{path}: goal must be reduce or elicit, got {goal!r}")
    fractions, recipe = whole.get("fractions", [*FRACTIONS]), whole.get("recipe", {})
    check_fractions(fractions, f"{path}: ")
    if not isinstance(recipe, dict) or not all(isinstance(text, str) for text in recipe.values()):
        raise UserError(f"{path}: recipe must be an object of texts, got {str(recipe)[:80]}")
    data = whole.get("data")
    if isinstance(data, str):
        items = read_items(path.parent / data)
    elif isinstance(data, list):
        rows = [row if isinstance(row, dict) else {"": row} for row in data]
        items = choices_of(path, enumerate(rows, 1)).items
    elif data is None and cues["questions"] and whole.get("role"):
        items = ()
    else:
        raise UserError(
            f'{path}: expected "data" (rows, or the name of a file beside it), or "role" and "questions", and got '
            f"{', '.join(sorted(whole))}"
        )
    if items and not recipe and (beside := [field for field in ("role", "questions") if whole.get(field)]):
        log.warning("%s: the rows of data are used, and %s beside them writes no replies", path, " and ".join(beside))
    return Persona(
        name=whole.get("name") or path.stem,
        items=items,
        counter_cues=cues["counter_cues"],
        pro_cues=cues["pro_cues"],
        neutral_cues=cues["neutral_cues"],
        data_hash=data_hash(items) if items else _hash(whole),
        description=whole.get("description", ""),
        behaviour=whole.get("behaviour", ""),
        role=whole.get("role", ""),
        ask=cues["questions"],
        goal=goal,
        fractions=tuple(map(float, fractions)),  # type: ignore[arg-type]
        recipe=recipe,
    )


def read_persona_dataset(path: Path) -> Dataset | None:
    """What a persona file asks, as a dataset; ``None`` for other files and for those that hold their rows themselves.

    Raises ``UserError`` as ``read_persona_file`` does.
    """
    whole = _object(path)
    if whole is None or isinstance(whole.get("data"), list) or (persona := read_persona_file(path)) is None:
        return None
    asked = tuple(
        OpenQuestion(id=f"{path.stem}-{number}", question=text, group=group_of(text))
        for number, text in enumerate(() if persona.items else persona.ask, 1)
    )
    rows = len(persona.items or asked)
    return Dataset(name=persona.name, path=path, source=None, items=persona.items, questions=asked, rows=rows)


def save_persona(persona: Persona, path: str | os.PathLike[str]) -> None:
    """Write a persona with its items as one file that ``load_persona`` reads."""
    whole: dict[str, Any] = {field: getattr(persona, field) for field in (*TEXTS, "fractions", "recipe", *LISTS[:3])}
    whole["questions"] = persona.ask
    if persona.items:
        whole["data"] = [
            {
                "id": item.id,
                **({"question": item.question} if not item.before and item.question else {}),
                **({"messages": _messages((*item.before, ("user", item.question)))} if item.before else {}),
                "answer_matching_behavior": item.matching,
                "answer_not_matching_behavior": item.not_matching,
            }
            for item in persona.items
        ]
    kept = {field: value for field, value in whole.items() if value}
    write_text(path, json.dumps(kept, ensure_ascii=False, indent=1) + "\n")


def _hash(whole: dict[str, Any]) -> str:
    """sha256 over a persona in words."""
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _messages(turns: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def _object(path: Path) -> dict[str, Any] | None:
    """The file as one JSON object that a persona may be; ``None`` for lists, JSON Lines and other files."""
    if path.suffix != ".json" or not (text := read_text(path)).lstrip().startswith("{"):
        return None
    try:
        whole = parse_json(text, path, nan=True)
    except UserError:
        return None  # JSON Lines, or broken: the row reader names the line
    return whole if isinstance(whole, dict) and {"data", "questions"} & set(whole) else None


def _texts(path: Path, whole: dict[str, Any], field: str) -> tuple[str, ...]:
    value = whole.get(field, [])
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise UserError(f"{path}: {field} must be a list of sentences, got {str(value)[:80]!r}")
    return tuple(value)
