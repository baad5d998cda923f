"""Options of ``jaxsteer circuits``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from jaxsteer.ranges import CountFrom0, Range, Seed, Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class CircuitOptions:
    """What a study of circuits asks, and how closely it looks."""

    prompt: str = ""
    """Study this prompt in place of a vector: a run with it against one with as many filler tokens."""
    slot: Literal["suffix", "prefix", "system", "system-suffix"] = "suffix"
    """Where the prompt stands."""
    coefficient: float | None = None
    """Strength of the vectors (default: the files')."""
    positions: Literal["all", "every", "prompt", "last", "response", "last_and_response"] | None = None
    """Tokens that are steered (default: what the files say, else all but the first)."""
    any_weights: bool = False
    """Use vectors although they were made on other weights."""
    goal: Literal["reduce", "elicit"] | None = None
    """Of a persona in words: to reduce it, its role stands before the questions (default: the persona's own)."""
    questions: int = 20
    """Test questions, of the division by --split-seed."""
    flipped: bool = False
    """Only questions on which every push changes which answer is preferred (as the paper chooses them)."""
    metric: Literal["answers", "tokens"] = "answers"
    """answers: log-probability of the persona's answer minus that of the other. tokens (the paper's): on the pushed
    run's own replies, where the two runs like different tokens, the logit of the one minus that of the other."""
    method: Literal["inputs", "activations"] = "inputs"
    """Of attribution: EAP-IG on inputs, or along every layer's own line (dearer, and better where texts differ)."""
    steps: Annotated[int, Range(1, 256)] = 10
    """Of integrated gradients."""
    end: Literal["output", "input"] = "output"
    """From where circuits grow."""
    sizes: tuple[Share, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
    """Edges of circuits, as shares of all."""
    random: Annotated[int, Range(1, 10_000)] = 100
    """Random circuits of each size."""
    controls: Annotated[int, Range(1, 64)] = 3
    """Random pushes of equal size; the first goes through every stage."""
    draws: Annotated[int, Range(1, 64)] = 5
    """Random choices of dimensions for sparse vectors."""
    layer_questions: CountFrom0 = 8
    """Questions, at most, on which one layer is frozen at a time; 0: on none."""
    max_new_tokens: Annotated[int, Range(1, 4096)] = 32
    """Longest reply."""
    seed: Seed = 0
    """Of random pushes, circuits and dimensions."""
    split_seed: Seed = 0
    """Of the division into train, validation and test questions."""
