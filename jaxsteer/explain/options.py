"""``ExplainOptions``: how latents are explained."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from jaxsteer.ranges import COUNT, Positive, Range, Seed

From = Literal["words", "contexts", "both"]
Posterior = Literal["bayes", "softmax"]
Side = Literal["decoder", "encoder"]
SIZE = 5000
"""Words, of the released study."""
WIDTH = 32
"""Tokens of a context, of delphi."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """How latents are explained."""

    words: Literal["model", "text"] = "model"
    """Where words come from: the tokenizer's whole words, or the most frequent ones of the text that is given."""
    size: Annotated[int, Range(2, 1 << 20)] = SIZE
    """Words, at most."""
    top: Annotated[int, COUNT] = 50
    """Words that are kept for every latent."""
    side: Side = "decoder"
    """Which of a latent's vectors speaks: its decoder row (what it writes) or its encoder column (what it reads)."""
    posterior: Posterior = "bayes"
    """How p(c|w) is normalised: so that it is one, or as the paper does."""
    temperature: Positive = 1.0
    """Divides the logits."""
    contexts: Annotated[int, Range(4, 1 << 20)] = 4000
    """Pieces of text that words are tested on, if there is text: half of them for baselines, half for scores."""
    width: Annotated[int, Range(4, 1 << 15)] = WIDTH
    """Tokens of a context."""
    near: Annotated[int, COUNT] = 10
    """Neighbours by decoder rows, whose contexts are the hard negatives."""
    label: tuple[Annotated[int, Range(0)], ...] = ()
    """Latents that a writer labels (default: those that say most about words, 100 of them)."""
    based: From = "words"
    """What a writer sees: words, contexts or both."""
    simulation: Literal["none", "all", "token"] = "none"
    """Whether the writer simulates latents from their labels: all tokens of a text in one reply, or a reply for each
    token (as many requests as tokens)."""
    classes: tuple[str, ...] = ()
    """Names of classes that a writer sorts its labels into."""
    seed: Seed = 0
    """Seed of halves, controls and orders."""
