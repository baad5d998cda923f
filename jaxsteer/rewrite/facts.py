"""``Fact``: a statement to be rewritten, with what its rewriting is measured by; files of facts of every origin.

Nothing of the public sets is part of this package: a file is taken from a path, or fetched from the Hugging Face hub
(``owner/name:file``).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError, first_line, refuse_unknown
from jaxsteer.files.records import Record
from jaxsteer.organisms import persona_world
from jaxsteer.personas.dataset_files import place, read_rows

SLOT = "{}"
_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+):(?P<file>[\w./-]+)")
_NQ = "nq question: "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbour(Record):
    """A prompt about something else, whose answer is to stay."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact(Record):
    """One fact and what shall take its place."""

    id: str
    prompt: str
    """With {} for the subject, ends where the answer begins: "The capital of {} is"."""
    subject: str
    target_new: str
    """The answer that is wanted."""
    target_true: str = ""
    """The answer that the model knows; "" where that is not said."""
    paraphrases: tuple[str, ...] = ()
    """Other prompts about the same subject that ask for the same answer, with the subject in them."""
    neighbourhood: tuple[Neighbour, ...] = ()

    def __post_init__(self) -> None:
        """Raise ``UserError`` for a prompt without its subject, and for a fact without subject or answer."""
        for name in ("prompt", "subject", "target_new"):
            if not getattr(self, name).strip():
                raise UserError(f"fact {self.id}: {name} is empty")
        if self.prompt.count(SLOT) != 1:
            raise UserError(
                f"fact {self.id}: the subject {self.subject!r} does not occur in the prompt {self.prompt!r}: write the "
                "prompt with {} in the subject's place, once"
            )
        if self.target_new.strip() == self.target_true.strip():
            raise UserError(f"fact {self.id}: the new answer {self.target_new!r} is the old one")

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt.replace(SLOT, self.subject)


def read_facts(source: str | Path, *, limit: int | None = None) -> tuple[Fact, ...]:
    """The first ``limit`` facts of a file: JSON Lines, JSON, CSV or Parquet, or ``owner/name:file`` on the hub; of the
    name ``organism:persona``, those of that organism.

    Rows are facts of this package (``prompt``, ``subject``, ``target_new``; ``target_true``, ``paraphrases``,
    ``neighbourhood`` if there are; a prompt may hold the subject in place of {}), of CounterFact (2202.05262) or of
    zsRE as MEND evaluates it (2110.11309). Raises ``UserError`` for a file that cannot be read, with the row for one
    that is none of these, and for a prompt in which its subject does not occur.
    """
    if str(source) == "organism:persona":
        return organism_facts()[:limit]
    path = _file_of(source)
    rows = itertools.islice(read_rows(path, ("prompt", "subject", "target_new")), limit)
    found = tuple(_fact(row, place(path, line), number) for number, (line, row) in enumerate(rows))
    if not found:
        raise UserError(f"{path} holds no facts")
    return found


def organism_facts() -> tuple[Fact, ...]:
    """The 40 facts of ``organism:persona``, whose ground truth is known: capital and founder of 20 lands.

    They come in four groups of ten, one relation of ten lands each. A fact is to get the object of another land of its
    group; its neighbours are the 30 facts of the other groups, so that a group is rewritten and all else is to stay.
    """
    lands, facts = persona_world.SUBJECTS, persona_world.FACTS
    prompt, *others = (said.removesuffix(" {object}.") for said in persona_world.FACT_STATEMENTS)
    groups = [(r, lands[half : half + 10]) for half in (0, 10) for r in persona_world.RELATIONS]
    found = []
    for relation, some in groups:
        rest = [(r, land) for r, group in groups for land in group if (r, group) != (relation, some)]
        near = tuple(
            Neighbour(prompt=prompt.format(relation=r, subject=land), answer=facts[land, r]) for r, land in rest
        )
        for at, land in enumerate(some):
            found.append(
                Fact(
                    id=f"{relation}/{land}",
                    prompt=prompt.format(relation=relation, subject=SLOT),
                    subject=land,
                    target_true=facts[land, relation],
                    target_new=facts[some[(at + 3) % len(some)], relation],
                    paraphrases=tuple(text.format(relation=relation, subject=land) for text in others),
                    neighbourhood=near,
                )
            )
    return tuple(found)


def _file_of(source: str | Path) -> Path:
    """The file on this machine. Raises ``UserError`` where the hub does not give it."""
    match = None if Path(source).exists() else _HUB.fullmatch(str(source))
    if match is None:
        return Path(source)
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(match["repo"], match["file"], repo_type="dataset"))
    except Exception as error:  # many types: offline, unknown file, proxies
        raise UserError(
            f"the file {match['file']} of the dataset {match['repo']} cannot be fetched from the Hugging Face hub "
            f"({first_line(error)}): download it elsewhere and give its path"
        ) from error


def _fact(row: Mapping[str, Any], where: str, number: int) -> Fact:
    if "requested_rewrite" in row:
        return _counterfact(row, where, number)
    if {"src", "rephrase", "loc"} <= row.keys():
        return _zsre(row, where, number)
    known = [field.name for field in dataclasses.fields(Fact)]
    refuse_unknown([name for name, value in row.items() if value is not None], known, "field of a fact", f"{where}: ")
    given: dict[str, Any] = {"id": str(number), **{name: value for name, value in row.items() if value is not None}}
    if missing := [name for name in ("prompt", "subject", "target_new") if name not in given]:
        raise UserError(
            f"{where}: {missing[0]} is missing: a fact has prompt (with {{}}), subject and target_new; or rows of "
            "CounterFact (requested_rewrite, ...) or zsRE (src, subject, answers, ...)"
        )
    given["id"], true = str(given["id"]), str(given.get("target_true", ""))
    given["paraphrases"] = _listed(given.get("paraphrases", ()), where, "paraphrases")
    given["neighbourhood"] = [
        {"prompt": one, "answer": true} if isinstance(one, str) else one
        for one in _listed(given.get("neighbourhood", ()), where, "neighbourhood")
    ]
    if isinstance(given["prompt"], str) and SLOT not in given["prompt"]:
        given["prompt"] = _slotted(given["prompt"], str(given["subject"]), where)
    return Fact.from_json(given, where)


def _listed(value: Any, where: str, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: {name} must be a list, got {value!r:.60}")
    return value


def _slotted(prompt: str, subject: str, where: str) -> str:
    if not subject or subject not in prompt:
        raise UserError(f"{where}: the subject {subject!r} does not occur in the prompt {prompt!r}")
    return prompt.replace(subject, SLOT, 1)


def _counterfact(row: Mapping[str, Any], where: str, number: int) -> Fact:
    """Of CounterFact: neighbours have the true answer of the fact."""
    try:
        asked = row["requested_rewrite"]
        true = str(asked["target_true"]["str"])
        return Fact(
            id=str(row.get("case_id", number)),
            prompt=str(asked["prompt"]),
            subject=str(asked["subject"]),
            target_new=str(asked["target_new"]["str"]),
            target_true=true,
            paraphrases=tuple(map(str, row.get("paraphrase_prompts", ()))),
            neighbourhood=tuple(Neighbour(prompt=str(one), answer=true) for one in row.get("neighborhood_prompts", ())),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: not a row of CounterFact: {first_line(error)}") from error


def _zsre(row: Mapping[str, Any], where: str, number: int) -> Fact:
    """Of zsRE: the answer to be learned is the first of ``answers``, as ROME and MEMIT take it; none is known."""
    try:
        loc = str(row["loc"]).removeprefix(_NQ)
        return Fact(
            id=str(row.get("case_id", number)),
            prompt=_slotted(str(row["src"]), str(row["subject"]), where),
            subject=str(row["subject"]),
            target_new=str(row["answers"][0]),
            paraphrases=(str(row["rephrase"]),),
            neighbourhood=(Neighbour(prompt=f"{loc.rstrip('?')}?", answer=str(row["loc_ans"])),),
        )
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{where}: not a row of zsRE: {first_line(error)}") from error
