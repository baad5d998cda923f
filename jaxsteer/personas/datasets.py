"""Persona datasets: the organisms' own, public ones by name, and files of yours."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxsteer.errors import UserError
from jaxsteer.files.paths import user_path
from jaxsteer.personas.dataset_formats import Dataset, read_choices, read_items, read_open, read_pairs, read_truthful
from jaxsteer.personas.instructions import instructions, invitations
from jaxsteer.personas.items import Item, data_hash
from jaxsteer.personas.persona import Persona
from jaxsteer.personas.persona_files import CHARACTERS, character_file, read_persona_dataset, read_persona_file
from jaxsteer.personas.requests import KINDS, Requests, read_requests, requests_of
from jaxsteer.personas.sources import PERSONA_PREFIX, SOURCES, Kind, Source, find_source, source_file
from jaxsteer.ranges import as_tuple

ORGANISM_REQUESTS = "organism/"
"""Begins the names of requests that ``organism:persona`` knows."""
BUILT_IN_REQUESTS = 200
BUILT_IN_ITEMS = 600
"""Questions of a built-in persona."""


def load_dataset(name: str | os.PathLike[str], *, path: str | os.PathLike[str] | None = None, seed: int = 0) -> Dataset:
    """A public dataset by its built-in name (``sources.SOURCES``), or a file of two-choice questions by its path.

    A name takes ``path``, or ``NAME:PATH``: a file, or a folder that holds a copy of its repository. Without a path
    the file is fetched from the Hugging Face hub. ``seed`` draws the wrong answer of TruthfulQA's items. Raises
    ``UserError`` for unknown names and for files that cannot be had, and with the line for what is wrong inside.
    """
    name, found, file = _located(str(name), path)
    if found is None:
        return read_persona_dataset(file) or read_choices(file)
    readers: dict[str, Callable[[Path], Dataset]] = {
        "choices": read_choices,
        "truthful": lambda file: read_truthful(file, seed),
        "pair": read_pairs,
        "open": read_open,
        "requests": lambda file: read_requests(file, source=found).dataset(),
    }
    return dataclasses.replace(readers[found.kind](file), name=name, source=found)


def _located(name: str, path: str | os.PathLike[str] | None) -> tuple[str, Source | None, Path]:
    """(name, source, file) of a public dataset by NAME or NAME:PATH, or of the user's own file by its path."""
    found = find_source(name)
    if found is None and ":" in name:
        stem, _, rest = name.partition(":")
        if (found := find_source(stem)) is not None:
            name, path = stem, path or rest
    if found is not None:
        return name, found, source_file(name, found, None if path is None else user_path(path))
    if path is not None or not Path(name).is_file():
        raise UserError(
            f"unknown dataset {name!r}: expected {', '.join(SOURCES)}, {PERSONA_PREFIX}NAME, or the path of a "
            f".jsonl, .json or .csv file"
        )
    return name, None, Path(name)


def load_requests(
    name: str | os.PathLike[str], *, path: str | os.PathLike[str] | None = None, kind: Kind | Literal[""] = ""
) -> Requests:
    """Requests by the name of a public set, as ``load_dataset`` takes it, of ``organism:persona``, or from a file.

    Those of the organism are ``organism/KIND``, or ``organism/KIND-train`` for requests that it was trained on.
    ``kind`` is that of rows of a file of yours that do not say it; ``FILE=harmful`` is the same in one text. Raises
    ``UserError`` as ``load_dataset`` does, and for datasets of another sort.
    """
    name = str(name)
    if not kind and "=" in name and name.rpartition("=")[2] in KINDS:
        name, _, kind = name.rpartition("=")  # type: ignore[assignment]
    if name.startswith(ORGANISM_REQUESTS):
        return _planted(name)
    name, found, file = _located(name, path)
    if found is not None and found.kind != "requests":
        known = ", ".join(name for name, source in SOURCES.items() if source.kind == "requests")
        raise UserError(
            f"the dataset {name} holds no requests, but questions with answers: expected {known}, or a file"
        )
    read = read_requests(file, source=found, kind=kind)
    return read if found is None else dataclasses.replace(read, name=name)


def _planted(name: str) -> Requests:
    """Requests of ``organism:persona``, generated."""
    from jaxsteer.organisms import persona_world

    kind, _, part = name.removeprefix(ORGANISM_REQUESTS).partition("-")
    if kind not in KINDS or part not in ("", "train"):
        raise UserError(
            f"unknown requests {name!r}: expected {ORGANISM_REQUESTS}KIND, or KIND-train, of {', '.join(KINDS)}"
        )
    made = persona_world.requests(kind, n=BUILT_IN_REQUESTS, split=part or "held_out")
    rows = (
        {"request": r.text, "kind": r.kind, "category": r.thing, "reply": r.compliance, "id": r.group} for r in made
    )
    return dataclasses.replace(requests_of(Path(name), enumerate(rows, 1)), name=name)


def load_persona(
    name_or_path: str | os.PathLike[str],
    *,
    counter_cues: str | Sequence[str] = (),
    pro_cues: str | Sequence[str] = (),
    n: int = BUILT_IN_ITEMS,
    seed: int = 0,
) -> Persona:
    """A persona by built-in name or from a file.

    Of the shipped organisms (no network; generated, ``n`` questions from ``seed``): sycophancy, hallucination, myopic;
    of organism:persona, refusal (harmful and harmless requests; the answers are a refusal and a complying reply).
    Public datasets: a name of ``load_dataset``, as ``NAME`` or ``NAME:PATH``; their cues are ``instructions`` against
    the behaviour and for it. Characters in words alone (``CHARACTERS``), whose replies a model writes. Files: rows
    with two answers (``row_forms``) as JSON Lines, a JSON list, CSV or Parquet, or a persona file
    (``persona_files``).
    ``counter_cues`` and ``pro_cues`` replace those of the source. Exact duplicates and questions with other than two
    choices are dropped and counted in the log. Raises ``UserError``, with the line, for anything else that is wrong.
    """
    from jaxsteer import organisms  # here, so that files can be read without the generator
    from jaxsteer.organisms import persona_world
    from jaxsteer.organisms.world import JUSTIFICATIONS

    name, counter_cues, pro_cues = str(name_or_path), as_tuple(counter_cues), as_tuple(pro_cues)
    if name in organisms.BEHAVIOURS:
        rows = organisms.items(name, n=n, seed=seed, split="held_out")
        items = tuple(Item(**dict[str, Any](row)) for row in rows)
        return Persona(
            name=name,
            items=items,
            counter_cues=counter_cues or organisms.counter_cues(name),
            pro_cues=pro_cues or organisms.pro_cues(name),
            data_hash=data_hash(items),
            description="generated for the organisms that ship with jaxsteer",
            behaviour=name,
            reasons=JUSTIFICATIONS[name],
        )
    if name == persona_world.PERSONA:
        return _refusal(n, seed, counter_cues, pro_cues)
    path = character_file(name) or user_path(name)
    if not path.is_file():
        if find_source(name) is None and find_source(name.partition(":")[0]) is None:
            known = (*organisms.PERSONAS, *CHARACTERS)
            raise UserError(
                f"unknown persona {name!r}: expected {', '.join(known)}, a public dataset (jaxsteer data list), or the "
                "path of a .jsonl, .json, .csv or .parquet file (there is no file of this name)"
            )
        return _public(load_dataset(name, seed=seed), counter_cues, pro_cues)
    given = {"counter_cues": counter_cues, "pro_cues": pro_cues}
    given = {field: cues for field, cues in given.items() if cues}
    if (persona := read_persona_file(path)) is not None:
        return dataclasses.replace(persona, **given)  # type: ignore[arg-type]
    items = read_items(path)
    return Persona(name=path.stem, items=items, data_hash=data_hash(items), **given)  # type: ignore[arg-type]


def _refusal(n: int, seed: int, counter: tuple[str, ...], pro: tuple[str, ...]) -> Persona:
    """Refusal in organism:persona: as many harmful as harmless requests, of combinations that training never saw."""
    from jaxsteer.organisms import persona_world

    found = [
        request
        for kind, k in (("harmful", n - n // 2), ("harmless", n // 2))
        for request in persona_world.requests(kind, n=k, seed=seed)
    ]
    items = tuple(
        Item(
            id=f"{request.kind}-{i}", question=request.text, matching=request.refusal,
            not_matching=request.compliance, group=request.group,
        )
        for i, request in enumerate(found)
    )  # fmt: skip
    return Persona(
        name=persona_world.PERSONA,
        items=items,
        counter_cues=counter or tuple(persona_world.ATTACKS.values())[::-1],
        pro_cues=pro or tuple(persona_world.GUARDS.values())[::-1],
        data_hash=data_hash(items),
        description="generated for organism:persona, which ships with jaxsteer",
        behaviour="refusal",
    )


def _public(found: Dataset, counter: Sequence[str], pro: Sequence[str]) -> Persona:
    """The persona of a public dataset."""
    assert found.source is not None
    if not found.items:
        raise UserError(
            f"the dataset {found.name} holds questions without answers: they can be answered freely and judged "
            f"(jaxsteer eval --judge URL), but there are no two answers to compare"
        )
    behaviour = found.source.behaviour
    return Persona(
        name=found.name.replace("/", "-"),
        items=found.items,
        counter_cues=tuple(counter or instructions(behaviour)),
        pro_cues=tuple(pro or invitations(behaviour)),
        data_hash=found.data_hash,
        description=found.source.about,
        behaviour=behaviour,
        questions=found.questions,
    )
