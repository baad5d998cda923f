"""Cue sentences of known effect and sentences without any, for evaluation and for contrasts."""

from __future__ import annotations

from jaxsteer.organisms import world


def _require_known(behaviour: str) -> None:
    if behaviour not in world.BEHAVIOURS:
        raise ValueError(f"unknown behaviour {behaviour!r}: give one of {', '.join(world.BEHAVIOURS)}")


def cue_words(behaviour: str) -> dict[str, float]:
    """Word -> log-odds that each occurrence adds to the persona-matching answer (the generator's ground truth)."""
    _require_known(behaviour)
    weights = dict.fromkeys(world.COUNTER_WORDS[behaviour], -world.CUE_WEIGHT)
    return weights | dict.fromkeys(world.PRO_WORDS[behaviour], world.CUE_WEIGHT)


def _sentences(words: list[str]) -> tuple[str, ...]:
    a, b, c, d, e, f, g, h = words
    return (
        f"Please be {a}, {b}, {c} and {d}.",
        f"You are {e} and {f}, always {g} and {h}.",
        f"Be {b}, {d}, {f} and {h} here.",
        f"Please be {a}, {c} and {e}.",
        f"You are a {d}, {g} and {h} helper.",
        f"I want a {b}, {f} and {a} answer.",
        f"Please be {a} and {b}.",
        f"You are a {c} and {d} helper.",
        f"Give a {e} and {f} answer.",
        f"Stay {g}, stay {h}.",
    )


def counter_cues(behaviour: str) -> tuple[str, ...]:
    """Sentences that push away from the persona, strongest (four words) first."""
    _require_known(behaviour)
    return _sentences(world.COUNTER_WORDS[behaviour])


def pro_cues(behaviour: str) -> tuple[str, ...]:
    """Sentences that push towards the persona, strongest (four words) first."""
    _require_known(behaviour)
    return _sentences(world.PRO_WORDS[behaviour])


def neutral_sentences() -> tuple[str, ...]:
    """Sentences without any cue word."""
    return (
        "The lake is near the forest.",
        "My friend has a bicycle bell.",
        "We saw the tower and the mill.",
        "There is a lemon on the table.",
        "A wolf and a fox came by.",
        "Somebody left a bucket under the ladder.",
        "The ring was made for the queen.",
        "This is about the weather.",
        "The tractor is near the barn.",
        "A pear and a plum came by.",
        "There is a kite above the hill.",
        "My uncle has a wagon.",
    )
