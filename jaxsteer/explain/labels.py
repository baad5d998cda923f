"""Labels of latents by a writer: a phrase made of words, of contexts or of both, votes on it, and its class.

Every reply is kept as it comes. What cannot be read is counted, and no latent is dropped for it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.display import aligned, visible
from jaxsteer.errors import UserError
from jaxsteer.explain.contexts import Contexts
from jaxsteer.explain.explanations import Explanations
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.objectives.terms import check_choice
from jaxsteer.runs.result import Result
from jaxsteer.writers.judge import ask_all
from jaxsteer.writers.writer import Messages, Writer

WORDS = 15
"""Words that a writer is shown, of the paper."""
CONTEXTS = 6
"""Contexts that a writer is shown."""
VOTES = 3
SHOWN = 100
"""Labels that a table lists."""
NOTHING = "nothing"
"""What a writer is to say of a latent that has no common meaning."""
ANSWERS = {"yes": 1.0, "probably": 0.75, "unlikely": 0.25, "no": 0.0}

SUMMARY = """Something inside a language model becomes active for one idea. Find the idea.
{evidence}
Say the idea in one short phrase of at most ten words, and nothing else. If there is none, reply "nothing"."""
CHECK = """Idea: {label}
{evidence}
Do these speak of the idea? Reply with one word: Yes, Probably, Unlikely or No."""
CLASSIFY = """Idea: {label}
Which of these does it belong to?
{classes}
Reply with one number, 0 for none of them, and nothing else."""
_NUMBER = re.compile(r"(?<!\d)(\d{1,3})(?!\d)")

HARMS = (
    "violence", "weapons", "self-harm", "hate and insult", "sexual content", "harm to children", "illegal drugs",
    "theft and fraud", "hacking and malware", "privacy and surveillance", "false information", "extremism and terror",
    "dangerous substances", "unfair treatment",
)  # fmt: skip
"""Kinds of harm that latents are sorted by, in our own words."""
DEFENCES = (
    "refusing", "warning of danger", "law and rules", "security and protection", "ethics and morals",
    "health and help", "honesty and doubt",
)  # fmt: skip
"""Kinds of defence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label(Record):
    """What a writer says of a latent."""

    latent: int
    label: str
    """A phrase, or "" where the writer found nothing or could not be read."""
    votes: tuple[str, ...] = ()
    """On the phrase: yes, probably, unlikely, no, or "" for what could not be read."""
    group: str = ""
    """The class that it was sorted into, or ""."""

    @property
    def support(self) -> float | None:
        """Mean of the votes that could be read: yes 1, probably 0.75, unlikely 0.25, no 0."""
        read = [ANSWERS[vote] for vote in self.votes if vote]
        return float(np.mean(read)) if read else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels(Result):
    """Labels of latents."""

    writer: str
    based: str
    """What the writer saw: "words", "contexts", "both"; or "file", where another tool wrote them."""
    prompts: Mapping[str, str]
    """The requests that were sent, with their blanks."""
    classes: tuple[str, ...] = ()
    labels: tuple[Label, ...]
    unread: int
    """Replies that held no phrase, vote or number."""
    nothing: int
    """Latents in which the writer found nothing."""

    def only(self, latents: Sequence[int]) -> Labels:
        """Those of some latents; the counts stay those of all."""
        return dataclasses.replace(self, labels=tuple(one for one in self.labels if one.latent in set(latents)))

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every latent."""
        return [
            {"latent": one.latent, "label": one.label, "support": one.support, "class": one.group}
            for one in self.labels
        ]

    def table(self) -> str:
        """A line for every latent."""
        rows = [("latent", "support", "class", "label")]
        for one in self.labels:
            support = "" if one.support is None else f"{one.support:.2f}"
            rows.append((str(one.latent), support, visible(one.group), visible(one.label)))
        if len(rows) > SHOWN + 1:
            rows = [*rows[: SHOWN + 1], ("...", "", "", f"{len(self.labels) - SHOWN:,} more")]
        who = f"By {visible(self.writer)} from {self.based}"
        note = f"{who}; {self.nothing} without an idea, {self.unread} replies unread."
        return aligned(rows, left=(0, 2, 3), note=note)


def write_labels(
    model: Model,
    found: Explanations,
    writer: Writer,
    latents: Sequence[int],
    *,
    contexts: Contexts | None = None,
    based: str = "words",
    classes: Sequence[str] = (),
    log: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Labels:
    """A phrase for each of ``latents``, three votes on it, and its class where ``classes`` are given.

    Votes are replies to the same question with the evidence in three orders. ``log`` takes every reply as it comes, and
    what stands there is not asked for again. Raises ``UserError`` for latents that there are not, for contexts that are
    needed and missing, and for a writer none of whose replies is a phrase. Many parameters: what is asked, of whom.
    """
    check_choice("based", based, ("words", "contexts", "both"))
    found.check_latents(latents)
    if based != "words" and contexts is None:
        raise UserError(f"labels based on {based} need contexts: read some text (--data), or label from words")
    evidence = [_evidence(model, found, contexts, latent, based) for latent in latents]

    def ask(requests: list[str], max_tokens: int) -> list[str]:
        talks: list[Messages] = [[{"role": "user", "content": request}] for request in requests]
        return ask_all(writer, talks, max_tokens=max_tokens, log=log, progress=progress)

    said = [_phrase(reply) for reply in ask([SUMMARY.format(evidence="\n".join(lines)) for lines in evidence], 32)]
    if said and all(phrase is None for phrase in said):
        raise UserError(f"no reply of {writer.name} holds a phrase for one of {len(said)} latents: take another writer")
    named = [i for i, phrase in enumerate(said) if phrase]
    orders = [np.random.default_rng([7, vote]).permutation(1000) for vote in range(VOTES)]
    checks = [
        CHECK.format(label=said[i], evidence="\n".join(_shuffled(evidence[i], order)))
        for i in named
        for order in orders
    ]
    votes = [_vote(reply) for reply in ask(checks, 8)]
    groups: list[int | None] = [0] * len(named)
    if classes:
        listed = "\n".join(f"{i}. {name}" for i, name in enumerate(classes, 1))
        requests = [CLASSIFY.format(label=said[i], classes=listed) for i in named]
        groups = [_choice(reply, len(classes)) for reply in ask(requests, 8)]
    place = {i: at for at, i in enumerate(named)}
    labels = []
    for i, latent in enumerate(latents):
        at = place.get(i)
        group = 0 if at is None else groups[at] or 0
        labels.append(
            Label(
                latent=int(latent),
                label=said[i] or "",
                votes=() if at is None else tuple(votes[at * VOTES : (at + 1) * VOTES]),
                group=classes[group - 1] if group else "",
            )
        )
    return Labels(
        writer=writer.name,
        based=based,
        prompts={"summary": SUMMARY, "check": CHECK} | ({"class": CLASSIFY} if classes else {}),
        classes=tuple(classes),
        labels=tuple(labels),
        unread=said.count(None) + votes.count("") + groups.count(None),
        nothing=said.count(""),
    )


def shown_context(model: Model, contexts: Contexts, row: int, mark: int | None) -> str:
    """A context as text, with the token at place ``mark`` between << and >>."""
    pieces = [model.tokenizer.decode([int(token)]) for token in contexts.tokens[row]]
    return "".join(f"<<{piece}>>" if i == mark else piece for i, piece in enumerate(pieces)).replace("\n", " ")


def _evidence(model: Model, found: Explanations, contexts: Contexts | None, latent: int, based: str) -> list[str]:
    lines = []
    if based != "contexts":
        lines.append("Words: " + ", ".join(found.of(latent, WORDS)))
    if contexts is not None and based != "words":
        values = contexts.values[:, latent]
        best = [int(row) for row in np.argsort(-values, kind="stable")[:CONTEXTS] if values[row] > 0]
        lines += [f"Text: {shown_context(model, contexts, row, int(contexts.places[row, latent]))}" for row in best]
    return lines or ["(it is never active)"]


def _shuffled(lines: Sequence[str], order: np.ndarray) -> list[str]:
    """The same evidence in another order: of the words in a line, and of the lines."""
    mixed = []
    for line in lines:
        head, colon, rest = line.partition(": ")
        if head == "Words":
            words = rest.split(", ")
            rest = ", ".join(words[i] for i in order if i < len(words))
        mixed.append(head + colon + rest)
    return [mixed[i] for i in order if i < len(mixed)]


def _phrase(reply: str) -> str | None:
    """The first line of a reply, without quotes and full stop; "" for "nothing", None for an empty reply."""
    text = reply.rpartition("</think>")[2].strip()
    line = text.splitlines()[0].strip().strip("\"'*.` ") if text else ""
    if not line:
        return None
    return "" if line.lower().rstrip(".") == NOTHING else line


def _vote(reply: str) -> str:
    found = re.match(r"\W*(yes|probably|unlikely|no)\b", reply.rpartition("</think>")[2].strip().lower())
    return found[1] if found else ""


def _choice(reply: str, count: int) -> int | None:
    found = _NUMBER.search(reply.rpartition("</think>")[2])
    return int(found[1]) if found and int(found[1]) <= count else None
