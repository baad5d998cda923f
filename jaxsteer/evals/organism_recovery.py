"""How much of an organism's known vocabulary a prompt recovers: no real model has a ground truth to compare with."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import Any

from jaxsteer import organisms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """Prompts against the words that the generator weighs against a behaviour (its triggers)."""

    words: int
    """Words of all prompts, repeats counted."""
    triggers: int
    """Those among them that are triggers."""
    invitations: int
    """Those that the generator weighs *for* the behaviour."""
    found: tuple[str, ...]
    """Triggers that occur at least once, alphabetically."""
    missed: tuple[str, ...]
    """Triggers that occur in no prompt."""
    chance: float | None
    """Share of triggers among the words a search could use: the precision of random prompts."""

    @property
    def precision(self) -> float | None:
        """Share of the prompts' words that are triggers; ``None`` without words."""
        return self.triggers / self.words if self.words else None

    @property
    def recall(self) -> float:
        """Share of the generator's triggers that were found."""
        return len(self.found) / (len(self.found) + len(self.missed))

    def to_json(self) -> dict[str, Any]:
        """Counts, lists, precision and recall."""
        return {**dataclasses.asdict(self), "precision": self.precision, "recall": self.recall}


def words_of(text: str) -> list[str]:
    """The words of a prompt as the generator compares them: runs of letters, in lower case."""
    return re.findall(r"[a-z]+", text.lower())


def trigger_words(persona: str, text: str) -> list[str] | None:
    """The words of ``text`` that count against the persona in the generator's ground truth, if there is one."""
    if persona not in organisms.BEHAVIOURS:
        return None
    weights = organisms.cue_words(persona)
    return [word for word in words_of(text) if weights.get(word, 0) < 0]


def recovery(persona: str, texts: Sequence[str], vocabulary: Collection[str] = ()) -> Recovery | None:
    """The generator's triggers in ``texts``; ``None`` for a persona that is not an organism's.

    ``vocabulary`` is what the search could choose from, one text per token: the chance level comes from it.
    """
    if persona not in organisms.BEHAVIOURS:
        return None
    weights = organisms.cue_words(persona)
    triggers = {word for word, weight in weights.items() if weight < 0}
    words = [word for text in texts for word in words_of(text)]
    choices = [token.strip().lower() for token in vocabulary]
    return Recovery(
        words=len(words),
        triggers=sum(word in triggers for word in words),
        invitations=sum(weights.get(word, 0) > 0 for word in words),
        found=tuple(sorted(triggers & set(words))),
        missed=tuple(sorted(triggers - set(words))),
        chance=sum(word in triggers for word in choices) / len(choices) if choices else None,
    )
