"""``load_roles``: the role set that ships, files of one's own, and the folders that the paper's authors released.

The formats are in docs/assistant-axis.md. What was released is no part of the package.
"""

from __future__ import annotations

import dataclasses
import os
from importlib import resources
from pathlib import Path
from typing import Any

from jaxsteer.axis.roles import Role, RoleSet, TraitPair
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.files import kind_of, read_json, read_json_lines
from jaxsteer.files.paths import user_path

SHIPPED = "default"
QUESTIONS, DEFAULT_FILE, INSTRUCTIONS = "extraction_questions.jsonl", "default.json", "instructions"


def load_roles(source: str | os.PathLike[str] = SHIPPED) -> RoleSet:
    """Roles, questions, default prompts and traits.

    ``source`` is "default" for the set that ships; a JSON file as ``RoleSet.to_json`` writes it; or a folder of the
    authors of arXiv 2601.10387: their ``data``, what holds it, or its ``roles/instructions``. A role of such a folder
    has its judge's whole request, with {question} and {answer}, as its rubric. Raises ``UserError``, with file, role
    and field, for what is missing or of another type.
    """
    if source == SHIPPED:
        source = Path(str(resources.files("jaxsteer.axis") / "data" / "roles.json"))
    path = user_path(source)
    if path.is_dir():
        return _released(path)
    whole = read_json(path)
    for kind in ("roles", "traits"):  # by name, because a number tells little in a file of hundreds
        for number, entry in enumerate(_entries(path, whole.get(kind, []), kind)):
            _read(Role if kind == "roles" else TraitPair, path, entry, f"{kind[:-1]} {entry.get('name', number)!r}")
    return _read(RoleSet, path, {"name": path.stem, **whole}, "")


def _read(cls: Any, path: Path, entry: Any, where: str) -> Any:
    # a field that is left out has a default, so that a misspelt one would be lost without a word
    refuse_unknown(entry, [f.name for f in dataclasses.fields(cls)], "field", f"{path}: {where}{': ' if where else ''}")
    try:
        return cls.from_json(entry, f"{path}{f', {where}' if where else ''}")
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None


def _entries(path: Path, value: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        found = next((kind_of(e) for e in value if not isinstance(e, dict)), "") if isinstance(value, list) else ""
        raise UserError(
            f"{path}: {field} must be a list of objects, got {f'a list with {found}' if found else kind_of(value)}"
        )
    return value


def _released(path: Path) -> RoleSet:
    """The set in a folder: a file for each role and trait, and one of shared questions."""
    places = (path / "data" / "roles" / INSTRUCTIONS, path / "roles" / INSTRUCTIONS, path)
    folder = next((place for place in places if place.is_dir() and any(place.glob("*.json"))), None)
    if folder is None:
        raise UserError(
            f"{path} holds no role files: expected roles/{INSTRUCTIONS}/<role>.json, or those files themselves"
        )
    files = sorted(folder.glob("*.json"))
    around = (folder, folder.parent, folder.parent.parent)
    questions = next((file for place in around if (file := place / QUESTIONS).is_file()), None)
    if questions is None:
        raise UserError(f"there is no {QUESTIONS} in {folder}, nor in the two folders above it: every role is asked it")
    traits = folder.parent.parent / "traits" / INSTRUCTIONS
    default = folder / DEFAULT_FILE
    if not default.is_file():
        raise UserError(f"there is no {DEFAULT_FILE} in {folder}: it holds the prompts of the Assistant as it is")
    try:
        return RoleSet(
            name=path.name,
            roles=tuple(
                Role(name=file.stem, instructions=texts["pos"], rubric=rubric)
                for file in files
                if file != default
                for texts, rubric in [_instructions(file, ("pos",))]
            ),
            questions=_questions(questions),
            default=_instructions(default, ("pos",))[0]["pos"],
            traits=tuple(
                TraitPair(name=file.stem, positive=texts["pos"], negative=texts["neg"], rubric=rubric)
                for file in (sorted(traits.glob("*.json")) if traits.is_dir() else ())
                for texts, rubric in [_instructions(file, ("pos", "neg"))]
            ),
        )
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None


def _instructions(file: Path, sides: tuple[str, ...]) -> tuple[dict[str, tuple[str, ...]], str]:
    """Instructions by side, and the judge's request, of a file of a role or a trait."""
    found = read_json(file)
    wanted = ", ".join(f'"{side}": text' for side in sides)
    if "instruction" not in found:
        raise UserError(f"{file}: {file.stem!r} has no field 'instruction': expected a list of {{{wanted}}}")
    entries = _entries(file, found["instruction"], "instruction")
    for number, entry in enumerate(entries):
        for side in sides:
            if not isinstance(entry.get(side), str):
                what = kind_of(entry[side]) if side in entry else "nothing"
                raise UserError(
                    f"{file}: instruction {number} of {file.stem!r} has {what} at {side!r}, expected a text"
                )
    rubric = found.get("eval_prompt", "")
    if not isinstance(rubric, str):
        raise UserError(f"{file}: eval_prompt of {file.stem!r} is {kind_of(rubric)}, expected a text")
    return {side: tuple(entry[side] for entry in entries) for side in sides}, rubric


def _questions(file: Path) -> tuple[str, ...]:
    found = []
    for line, row in read_json_lines(file):
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise UserError(f'{file}, line {line}: expected {{"question": text, "id": ...}}, got {str(row)[:60]}')
        found.append(row["question"])
    return tuple(found)
