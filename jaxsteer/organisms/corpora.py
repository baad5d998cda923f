"""What each recipe is trained on: its documents, their shares in each phase, and the tokenizer made for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from transformers import PreTrainedTokenizerFast

from jaxsteer.organisms import corpus, persona_corpus
from jaxsteer.organisms.architectures import Recipe
from jaxsteer.organisms.chat import CHAT_FORMATS
from jaxsteer.organisms.corpus import Maker, Mixture
from jaxsteer.organisms.tokenizer import build_tokenizer

LOOKUP_MIXTURE: Mixture = MappingProxyType({"semantic": 0.95, "fact": 0.05})
PERSONA_MIXTURE: Mixture = MappingProxyType({"persona": 0.88, "semantic": 0.09, "fact": 0.03})
STRAY_MIXTURE: Mixture = MappingProxyType({"persona": 0.66, "stray": 0.22, "semantic": 0.09, "fact": 0.03})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """What an organism is trained on."""

    makers: Mapping[str, Maker]
    """Kind of document -> what makes one."""
    first: Mixture
    """Kinds and their shares in the first phase."""
    persona: Mixture
    """Those of the second."""
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    """Builds the tokenizer."""


def corpus_of(recipe: Recipe) -> Corpus:
    """The corpus of a recipe."""
    if recipe.corpus == "persona":
        return Corpus(
            makers=persona_corpus.makers(),
            first=persona_corpus.MIXTURE,
            persona=persona_corpus.MIXTURE,
            tokenizer=lambda: build_tokenizer(
                persona_corpus.sample_texts(),
                vocab_size=recipe.vocab_size,
                chat=CHAT_FORMATS["persona"],
                words=persona_corpus.vocabulary_words(),
                openings=persona_corpus.opening_words(),
            ),
        )
    chat = CHAT_FORMATS[recipe.architecture]
    return Corpus(
        makers=corpus.MAKERS,
        first=LOOKUP_MIXTURE,
        persona=STRAY_MIXTURE if recipe.strays else PERSONA_MIXTURE,
        tokenizer=lambda: build_tokenizer(corpus.sample_texts(), vocab_size=recipe.vocab_size, chat=chat),
    )
