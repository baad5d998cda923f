"""``jaxsteer data``: which public datasets are known by name, and what one holds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, subcommand

from jaxsteer.display import aligned, listed, short
from jaxsteer.errors import UserError
from jaxsteer.ranges import CountFrom0, Seed
from jaxsteer.runs.files import document


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataList:
    """Print the datasets that are known by name, with their licences and where they come from."""

    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Print."""
        from jaxsteer import organisms
        from jaxsteer.personas.datasets import ORGANISM_REQUESTS
        from jaxsteer.personas.persona_files import CHARACTERS
        from jaxsteer.personas.requests import KINDS
        from jaxsteer.personas.sources import PERSONA_PREFIX, SOURCES, find_source

        rows = [
            {"name": name, "licence": "Apache-2.0", "from": "generated", "hub": "", "about": "of the shipped organisms"}
            for name in organisms.PERSONAS
        ]
        about = "in words: a model writes its replies"
        rows += [
            {"name": name, "licence": "Apache-2.0", "from": "written by hand", "hub": "", "about": about}
            for name in CHARACTERS
        ]
        about = "requests that organism:persona knows"
        rows += [
            {
                "name": f"{ORGANISM_REQUESTS}{kind}",
                "licence": "Apache-2.0",
                "from": "generated",
                "hub": "",
                "about": about,
            }
            for kind in KINDS
        ]
        example = find_source(f"{PERSONA_PREFIX}NAME")
        assert example is not None
        families = {f"{PERSONA_PREFIX}NAME": dataclasses.replace(example, about="135 sets of statements, by file name")}
        for name, source in (SOURCES | families).items():
            rows.append(
                {
                    "name": name,
                    "licence": source.licence,
                    "from": source.home.removeprefix("https://"),
                    "hub": source.hub,
                    "about": source.about,
                }
            )
        if self.json:
            print(document(rows))
        else:
            head = ("name", "licence", "from", "on the hub")
            cells = [(row["name"], row["licence"], row["from"], row["hub"] or "-") for row in rows]
            note = (
                "None of the public ones is part of this package: `jaxsteer data show NAME` fetches one from the hub, "
                "`--path FILE_OR_FOLDER` takes what you have downloaded."
            )
            print(aligned([head, *cells], left=(0, 1, 2, 3), note=note))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataShow:
    """Print what a dataset holds: licence, counts, letter balance, splits, examples."""

    name: Positional[str]
    """A name of `jaxsteer data list`, or the path of a .jsonl, .json or .csv file."""
    path: Path | None = None
    """Its file, or a folder with a copy of its repository (default: from the Hugging Face hub)."""
    examples: CountFrom0 = 2
    """Items to print."""
    split_seed: Seed = 0
    """Seed of the division into train, validation and test questions."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> int:
        """Read and print."""
        found = self._found()
        print(document(found) if self.json else _text(found))
        return 0

    def _found(self) -> dict[str, Any]:
        from jaxsteer import organisms
        from jaxsteer.personas import (
            OpenQuestion,
            Persona,
            load_dataset,
            load_persona,
            load_requests,
            number_of_questions,
            split,
        )  # fmt: skip
        from jaxsteer.personas.persona_files import CHARACTERS, read_persona_file

        if self.name in (*organisms.PERSONAS, *CHARACTERS) and self.path is None:
            persona = load_persona(self.name)
            items, asked = persona.items, (OpenQuestion(id=q, question=q, group=q) for q in persona.ask)
            questions = (*persona.questions, *asked)
            about: dict[str, Any] = {
                "name": self.name, "about": persona.description, "licence": "Apache-2.0",
                "from": "written by hand" if persona.role else "generated",
                "file": None, "rows": len(items or questions), "dropped": {}, "data_hash": persona.data_hash,
            }  # fmt: skip
        else:
            dataset = load_dataset(self.name, path=self.path)
            items, questions, source = dataset.items, dataset.questions, dataset.source
            about = {
                "name": dataset.name,
                "about": source.about if source else "your own file",
                "licence": source.licence if source else None,
                "from": source.home if source else None,
                "file": str(dataset.path),
                "rows": dataset.rows,
                "dropped": dataset.dropped,
                "data_hash": dataset.data_hash,
            }
            if source and source.kind == "requests":
                about["kinds"] = load_requests(self.name, path=self.path).kinds
            persona = (None if source else read_persona_file(dataset.path)) or Persona(name="")
        about |= {"items": len(items), "questions": number_of_questions(questions or items)}
        about["sentences"] = {"against": len(persona.counter_cues), "for": len(persona.pro_cues)}
        if items:
            about |= {"matching": _balance(items), "split_seed": self.split_seed}
            try:
                splits = split(items, seed=self.split_seed, fractions=persona.fractions)
                parts = {name: getattr(splits, name) for name in ("train", "validation", "test")}
                about["splits"] = {n: {"items": len(part), "matching": _balance(part)} for n, part in parts.items()}
            except UserError as error:
                about |= {"splits": None, "too_few": str(error)}
        if any(q.correct for q in questions):
            about["answers"] = {
                "right": sum(len(q.correct) for q in questions) / len(questions),
                "wrong": sum(len(q.incorrect) for q in questions) / len(questions),
            }
        lengths = sorted(len(x.question.split()) for x in (items or questions))
        about["words"] = {"median": lengths[len(lengths) // 2], "longest": lengths[-1]}
        about["examples"] = [
            {"line": x.line, "question": x.question, "matching": x.matching, "not_matching": x.not_matching}
            for x in items[: self.examples]
        ] or [{"line": x.line, "question": x.question} for x in questions[: self.examples]]
        return about


def _balance(items: Any) -> dict[str, int] | None:
    """How often each answer is the matching one; ``None`` where they are replies, or nearly every item has its own."""
    counts = Counter(item.matching for item in items)
    replies = any(item.replies for item in items)
    return dict(sorted(counts.items())) if len(counts) <= 4 and not replies else None


def _text(found: dict[str, Any]) -> str:

    def balance(counts: dict[str, int] | None) -> str:
        return "answers in words" if counts is None else ", ".join(f"{k} {v:,}" for k, v in counts.items())

    rows = [
        ("about", found["about"]),
        ("licence", found["licence"] or "yours to know"),
        ("from", found["from"]),
        ("file", found["file"]),
        ("data hash", found["data_hash"][:16]),
        ("rows", f"{found['rows']:,}, dropped: " + (_counts(found["dropped"]) or "none")),
        ("questions", f"{found['questions']:,} different"),
        ("words", f"{found['words']['median']} in the median question, {found['words']['longest']} in the longest"),
    ]
    if found["items"]:
        rows.append(("items", f"{found['items']:,} with two answers; matching: {balance(found['matching'])}"))
    elif "kinds" in found:
        rows.append(("items", "none: requests, " + ", ".join(f"{n:,} {kind}" for kind, n in found["kinds"].items())))
    else:
        rows.append(("items", "none: questions to be answered freely"))
    if any(found["sentences"].values()):
        rows.append(("sentences", "{against} against the behaviour, {for} for it".format(**found["sentences"])))
    if "answers" in found:
        rows.append(
            ("answers", f"{found['answers']['right']:.1f} right and {found['answers']['wrong']:.1f} wrong per question")
        )
    width = len("validation")
    lines = [found["name"], "", *listed((name.ljust(width), value) for name, value in rows if value)]
    if "too_few" in found:
        lines += ["", f"no splits: {found['too_few']}"]
    elif "splits" in found:
        lines += ["", f"splits by question, seed {found['split_seed']}"]
        for name, part in found["splits"].items():
            lines.append(f"  {name.ljust(width)}  {part['items']:,} ({balance(part['matching'])})")
    for example in found["examples"]:
        lines += ["", f"line {example['line']}" if example["line"] else "example"]
        lines += [f"  | {short(line, 2000)}".rstrip() for line in example["question"].splitlines()]
        if "matching" in example:
            lines.append(f"  matching {example['matching']!r}, not matching {example['not_matching']!r}")
    return "\n".join(lines)


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Datasets: the public ones that are known by name, and what a file holds."""

    action: Annotated[DataList, subcommand("list")] | Annotated[DataShow, subcommand("show")]

    def run(self) -> int:
        """Run the chosen action."""
        return self.action.run()
