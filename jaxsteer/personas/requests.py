"""Requests: what a model is asked to do, harmful, harmless or on the border, without answers to choose between."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from jaxsteer.errors import UserError
from jaxsteer.files import parse_json, read_text
from jaxsteer.personas.dataset_files import Row, place, read_rows
from jaxsteer.personas.dataset_formats import Dataset
from jaxsteer.personas.items import OpenQuestion, group_of, normal
from jaxsteer.personas.sources import Kind, Source
from jaxsteer.ranges import as_tuple

log = logging.getLogger(__name__)

KINDS = get_args(Kind)
FIELDS: dict[str, tuple[str, ...]] = {
    "text": (
        "request", "instruction", "augq", "goal", "forbidden_prompt", "behavior", "prompt", "question", "turns", "text"
    ),
    "category": ("category", "semanticcategory", "type", "3-category"),
    "reply": ("reply", "target", "output", "response"),
    "id": ("id", "behaviorid", "aid", "qid", "question_id"),
    "base": ("base", "baseq"),
}  # fmt: skip
"""Columns that a request's fields are read from, in whatever case; the first that has something in it."""
PLACE = "{request}"
"""Where the request stands in a template."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One request."""

    text: str
    kind: Kind
    """What ought to become of it: refused (harmful), or answered (harmless; border, which only looks harmful)."""
    category: str = ""
    reply: str = ""
    """A given reply: that of the dataset, or the beginning that an attack asks for."""
    id: str = ""
    base: str = ""
    """The request that an attack was made of; "" for one that stands for itself."""

    @property
    def unit(self) -> str:
        """What counts as one request in parts and in intervals: all attacks made of the same one are one."""
        return self.base or self.text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requests:
    """A set of requests, for refusal: directions, learned vectors and evaluation take it alike."""

    name: str
    entries: tuple[Request, ...]
    source: Source | None = None
    """Where it comes from; ``None`` for the user's own."""
    path: Path = Path()
    rows: int = 0
    """Rows of the file."""
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows that were left out, by reason."""

    @classmethod
    def of(cls, texts: str | Iterable[str], kind: Kind, *, name: str = "requests") -> Requests:
        """Texts of one kind. Raises ``UserError`` for empty ones and for none."""
        rows = ((i, {"request": text, "kind": kind}) for i, text in enumerate(as_tuple(texts), 1))
        return requests_of(Path(name), rows)

    @property
    def texts(self) -> tuple[str, ...]:
        """What is asked."""
        return tuple(entry.text for entry in self.entries)

    @property
    def kinds(self) -> dict[Kind, int]:
        """How many there are of each kind."""
        return dict(Counter(entry.kind for entry in self.entries))

    @property
    def data_hash(self) -> str:
        """sha256 over texts, kinds and given replies, whatever the order of rows."""
        rows = sorted((entry.text, entry.kind, entry.reply) for entry in self.entries)
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    def __add__(self, other: Requests) -> Requests:
        """Both sets, each request once."""
        name = self.name if self.name == other.name else f"{self.name}+{other.name}"
        both = {normal(entry.text): entry for entry in (*other.entries, *self.entries)}
        for entry in (*other.entries, *self.entries):
            if (kept := both[normal(entry.text)]).kind != entry.kind:
                raise UserError(
                    f"{entry.text[:80]!r} is {kept.kind} and {entry.kind} in {self.name} and {other.name}: a request "
                    "has one kind"
                )
        return Requests(name=name, entries=tuple(both[key] for key in _keys(self, other)))

    def only(self, kind: Kind | Literal[""] = "", *, category: str = "") -> Requests:
        """Those of a kind, of a category, or both. Raises ``UserError`` where there are none."""
        if kind and kind not in KINDS:
            raise UserError(f"unknown kind of request {kind!r}: expected {', '.join(KINDS)}")
        found = tuple(
            entry
            for entry in self.entries
            if (not kind or entry.kind == kind) and (not category or entry.category == category)
        )
        if not found:
            wanted = " ".join(word for word in (kind, category and f"{category!r}") if word)
            here = ", ".join(f"{n} {k}" for k, n in self.kinds.items())
            raise UserError(f"{self.name} has no {wanted} requests: it has {here}")
        return dataclasses.replace(self, entries=found)

    def parts(self, *sizes: int, seed: int = 0) -> tuple[Requests, ...]:
        """Disjoint parts of these sizes, drawn by ``seed`` whatever the order of rows; what was made of one request is
        in one part.

        Raises ``UserError`` where there are too few requests.
        """
        key = lambda entry: hashlib.sha256(f"{seed}\x1f{normal(entry.unit)}".encode()).digest()  # noqa: E731
        drawn, found, at = sorted(self.entries, key=key), list[tuple[Request, ...]](), 0
        for size in sizes:
            found.append(tuple(drawn[at : at + size]))
            at += size
            while 0 < at < len(drawn) and key(drawn[at]) == key(drawn[at - 1]):  # the rest of what was cut through
                at += 1
        if tuple(map(len, found)) != sizes:
            here = ", ".join(f"{n} {k}" for k, n in self.kinds.items())
            wanted = " + ".join(map(str, sizes))
            raise UserError(
                f"{self.name} has {len(self.entries)} requests ({here}), but {wanted} are asked for: ask for fewer, or "
                f"give more{' (all that is made of one request is in one part)' * any(e.base for e in self.entries)}"
            )
        return tuple(dataclasses.replace(self, entries=entries) for entries in found)

    def dataset(self) -> Dataset:
        """The same as questions that are answered freely."""
        questions = tuple(
            OpenQuestion(id=entry.id, question=entry.text, group=group_of(entry.text)) for entry in self.entries
        )
        return Dataset(
            name=self.name, path=self.path, source=self.source, questions=questions, rows=self.rows,
            dropped=self.dropped,
        )  # fmt: skip


def limited(requests: Requests, most: int | None, seed: int = 0) -> Requests:
    """At most so many of each kind, drawn by ``seed``; all for None."""
    if most is None:
        return requests
    some = [requests.only(kind).parts(min(most, n), seed=seed)[0] for kind, n in requests.kinds.items()]
    return dataclasses.replace(requests, entries=tuple(entry for part in some for entry in part.entries))


def _keys(*sets: Requests) -> list[str]:
    return list(dict.fromkeys(normal(entry.text) for one in sets for entry in one.entries))


def read_requests(path: Path, *, source: Source | None = None, kind: Kind | Literal[""] = "") -> Requests:
    """The requests of a file in the layout of any public set (docs/datasets.md), or with a column "request".

    A file that ends in .txt holds one on each line. ``kind`` is that of rows that have no column "kind".
    Raises ``UserError``, with file and line, for what cannot be used.
    """
    if path.suffix.lower() == ".txt":
        rows: Iterable[Row] = (
            (i, {"request": text}) for i, text in enumerate(read_text(path).splitlines(), 1) if text.strip()
        )
    else:
        rows = read_rows(path, ())
    return requests_of(path, rows, source=source, kind=kind)


def requests_of(
    path: Path, rows: Iterable[Row], *, source: Source | None = None, kind: Kind | Literal[""] = ""
) -> Requests:
    """The requests of rows, each text once; ``path`` names them in errors."""
    found: dict[str, Request] = {}
    count, dropped = 0, Counter[str]()
    for line, raw in rows:
        count += 1
        row = {str(name).strip().lower(): value for name, value in raw.items()}
        values = {field: _first(row, names) for field, names in FIELDS.items()}
        if not values["text"]:
            raise UserError(
                f"{place(path, line)}: no request; expected a text in one of {', '.join(FIELDS['text'])}, and the row "
                f"has {', '.join(map(str, raw)) or 'nothing'}"
            )
        if _first(row, ("input",)):  # Alpaca
            dropped["instructions about a text of their own"] += 1
            continue
        if context := _first(row, ("contextstring",)):  # HarmBench
            values["text"] = f"{context}\n\n---\n\n{values['text']}"
        if (key := normal(values["text"])) in found:
            dropped["exact duplicates"] += 1
            continue
        values["id"] = values["id"] or f"{path.stem}-{line}"
        of = _kind(row, kind or (source.requests if source else ""))
        if of not in KINDS:
            raise UserError(
                f"{place(path, line)}: the kind of request is {of!r}, expected {', '.join(KINDS)}: give it for all of "
                'a file (kind=...; behind its path on the command line, FILE=harmful), or in a column "kind"'
            )
        found[key] = Request(kind=of, **values)  # type: ignore[arg-type]
    if not found:
        raise UserError(f"{path} holds no request: expected one in each row")
    if dropped.total():
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        log.warning("%s: dropped %s; %d of %d rows are used", path, reasons, len(found), count)
    entries = tuple(found.values())
    return Requests(name=path.stem, entries=entries, source=source, path=path, rows=count, dropped=dict(dropped))


def _first(row: dict[str, Any], names: Sequence[str]) -> str:
    given = (row.get(name) for name in names)
    texts = (value[0] if isinstance(value, list) and value else value for value in given)  # of several turns the first
    return next((str(text).strip() for text in texts if text and str(text).strip()), "")


def _kind(row: dict[str, Any], default: str) -> str:
    """The kind of one row: its own, XSTest's label, or ``default``."""
    if default == "border":  # XSTest: safe requests that look unsafe, and unsafe contrasts to them
        unsafe = row["label"] == "unsafe" if row.get("label") else str(row.get("type")).startswith("contrast")
        return "harmful" if unsafe else default
    return str(row.get("kind") or default)


def read_templates(path: str | Path) -> dict[str, str]:
    """Attack templates by name, from a JSON object of texts by name, or rows with "template" and perhaps "name";
    "organism" is a name for those that ``organism:persona`` knows.

    A template has ``{request}`` where the request stands. Raises ``UserError`` for one that has not.
    """
    if str(path) == "organism":
        from jaxsteer.organisms.persona_world import attack_templates

        return attack_templates()
    path = Path(path)
    text = read_text(path)
    whole = parse_json(text, path) if path.suffix.lower() == ".json" and text.lstrip().startswith("{") else None
    if isinstance(whole, dict) and "template" not in whole:
        found = {str(name): template for name, template in whole.items()}
    else:
        rows = [*read_rows(path, ("template",))]
        found = {str(row.get("name") or f"{path.stem}-{line}"): row.get("template") for line, row in rows}
    return check_templates(found, f"{path}: ")


def check_templates(templates: dict[str, Any], where: str = "") -> dict[str, str]:
    """The templates. Raises ``UserError``, which begins with ``where``, for none and for one without ``{request}``."""
    if not templates:
        raise UserError(f"{where}no template was found: give at least one text with {PLACE} in it")
    for name, template in templates.items():
        if not isinstance(template, str) or PLACE not in template:
            raise UserError(
                f"{where}the template {name!r} has no place for the request: write {PLACE} where it stands, got "
                f"{str(template)[:60]!r}"
            )
    return dict(templates)


def in_template(template: str, request: str) -> str:
    """The request in its place in a template."""
    return template.replace(PLACE, request)
