"""``Explanations``: words for every latent of an SAE, as one file.

A safetensors file: ``words`` int32 [C, K] (numbers of words), ``scores`` float32 [C, K] in nats, ``information``
float32 [C]. Metadata: format, vocabulary, model, fingerprint, what the SAE is called and its digest, and how the words
were found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxsteer.display import aligned, decimals, visible
from jaxsteer.errors import UserError
from jaxsteer.explain.vocabulary import Vocabulary
from jaxsteer.files import parse_json, read_tensors, tensor_bytes, write_bytes
from jaxsteer.processes import to_host
from jaxsteer.sae.dictionary import SAE

FORMAT = "jaxsteer.explanations/1"
_SAMPLED = 1024
BY_WRITER = ("label:", "class:")
"""How a query asks for latents by what a writer said of them."""


class Found(NamedTuple):
    """A latent that was asked for by words."""

    latent: int
    score: float
    """Sum of its scores of the words asked for, in nats."""
    words: tuple[str, ...]
    """Its own strongest words."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Explanations:
    """Words of every latent, the strongest first."""

    words: Int[np.ndarray, "C K"]
    """Numbers of words of the vocabulary."""
    scores: Float[np.ndarray, "C K"]
    """In nats: p(w|c) [log p(c|w) + log C]."""
    information: Float[np.ndarray, " C"]
    """Sum of the scores over all words: how much a latent says about words. The mean is the mutual information."""
    vocabulary: Vocabulary
    model: str
    fingerprint: str
    """Of the model whose unembedding spoke."""
    sae: str
    digest: str
    """Of the SAE's decoder."""
    site: str
    side: str
    """Which of a latent's vectors spoke: "decoder" or "encoder"."""
    posterior: str
    temperature: float

    def __len__(self) -> int:
        return len(self.words)

    @property
    def mutual_information(self) -> float:
        """Of latents and words, in nats; at most ``bound``. Of ``posterior="softmax"`` it is no mutual information."""
        return float(self.information.astype(np.float64).mean())

    @property
    def bound(self) -> float:
        """Log min(C, V) nats."""
        return math.log(min(len(self), len(self.vocabulary)))

    def of(self, latent: int, count: int = 10) -> tuple[str, ...]:
        """The strongest words of a latent. Raises ``UserError`` for one that there is not."""
        self.check_latents([latent])
        return tuple(self.vocabulary.words[i] for i in self.words[latent, :count])

    def check_latents(self, latents: Sequence[int]) -> None:
        """Raise ``UserError`` for latents that there are not."""
        wrong = [latent for latent in latents if not 0 <= latent < len(self)]
        if wrong:
            raise UserError(
                f"there is no latent {wrong[0]}: {self.sae or 'this SAE'} has the latents 0 to {len(self) - 1}"
            )

    def check_sae(self, sae: SAE) -> None:
        """Raise ``UserError`` unless these are the words of this SAE's latents."""
        if sae.n_latents != len(self) or digest_of(sae) != self.digest:
            raise UserError(
                f"these explanations are of {self.sae or 'another SAE'} with {len(self):,} latents, and not of the SAE "
                f"that was given ({sae.n_latents:,} latents): explain that one with `jaxsteer sae explain`"
            )

    def find(self, query: str | Sequence[str], *, top: int = 20) -> list[Found]:
        """The latents that words of ``query`` explain best: by the sum of their scores, the largest first.

        Only words among a latent's K count. Raises ``UserError`` when none of the query's words is in the vocabulary.
        """
        asked = query.split() if isinstance(query, str) else list(query)
        if said := next((one for one in asked if one.startswith(BY_WRITER)), None):
            raise UserError(f"{said!r} asks for a writer's labels, and this is a table of words: give the directory")
        known: dict[int, str] = {}
        for word in asked:
            try:
                known[self.vocabulary.index(word)] = word
            except UserError:
                continue
        if not known:
            listed = ", ".join(repr(visible(word)) for word in asked) or "(none were given)"
            raise UserError(
                f"none of the words {listed} is in the "
                f"vocabulary of {len(self.vocabulary):,} words: ask for others, or explain with a list that has them"
            )
        hit = np.isin(self.words, list(known))
        total = np.where(hit, self.scores, 0.0).sum(1)
        order = [int(i) for i in np.argsort(-total, kind="stable")[:top] if total[i] > 0]
        return [Found(latent, float(total[latent]), self.of(latent)) for latent in order]

    def table(self, latents: Sequence[int] | None = None, *, count: int = 10) -> str:
        """A line for each of some latents (by default those that say most), under a line about all."""
        shown = list(latents) if latents is not None else [int(i) for i in np.argsort(-self.information)[:20]]
        rows = [("latent", "nats", "words")]
        rows += [
            (str(i), decimals(float(self.information[i])), " ".join(map(visible, self.of(i, count)))) for i in shown
        ]
        left = [f"{n:,} {what}" for n, what in self._left_out() if n]
        head = (
            f"{len(self):,} latents of {visible(self.sae)} and {len(self.vocabulary):,} words: "
            f"{self.mutual_information:.2f} nats of mutual information (at most {self.bound:.2f})"
        )
        note = f"Left out of the vocabulary: {', '.join(left)}." if left else ""
        return aligned(rows, left=(0, 2), note="\n".join(filter(None, (head, note))))

    def _left_out(self) -> list[tuple[int, str]]:
        v = self.vocabulary
        return [
            (v.fragments, "pieces of words"),
            (v.odd, "rows of odd norm"),
            (v.repeated, "other spellings in capitals"),
            (v.unspelt, "words that the tokenizer cannot spell"),
        ]

    def to_rows(self, *, count: int = 10) -> list[dict[str, Any]]:
        """One entry for every latent."""
        return [
            {"latent": i, "information": float(self.information[i]), "words": " ".join(self.of(i, count))}
            for i in range(len(self))
        ]

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {
            "words": np.ascontiguousarray(self.words, np.int32),
            "scores": np.ascontiguousarray(self.scores, np.float32),
            "information": np.ascontiguousarray(self.information, np.float32),
        }
        facts = {name: str(getattr(self, name)) for name in _FACTS} | {
            "format": FORMAT,
            "vocabulary": json.dumps(self.vocabulary.to_json()),
            "temperature": repr(self.temperature),
        }
        write_bytes(Path(path), tensor_bytes(tensors, facts))


_FACTS = ("model", "fingerprint", "sae", "digest", "site", "side", "posterior")


def load_explanations(path: str | Path) -> Explanations:
    """Read a file of explanations. Raises ``UserError`` for one that is damaged, or holds something else."""
    tensors, facts = read_tensors(path, "file of explanations")
    if facts.get("format") != FORMAT:
        raise UserError(f"{path} holds no explanations: its format is {facts.get('format')!r}, expected {FORMAT!r}")
    try:
        found = Explanations(
            words=tensors["words"],
            scores=tensors["scores"],
            information=tensors["information"],
            vocabulary=Vocabulary.from_json(parse_json(facts["vocabulary"], "its vocabulary"), "vocabulary"),
            temperature=float(facts["temperature"]),
            **{name: facts[name] for name in _FACTS},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: its vocabulary and tensors do not fit together ({error})") from error
    size = len(found.vocabulary)
    shapes = found.words.shape == found.scores.shape == (len(found.information), found.words.shape[-1])
    if not shapes or len(found.vocabulary.tokens) != size or not (0 <= found.words.min() and found.words.max() < size):
        raise UserError(f"{path} is damaged: its words are not those of its vocabulary of {size:,}")
    return found


def digest_of(sae: SAE) -> str:
    """SHA-256 (16 hex digits) of the shape and of evenly spaced rows of an SAE's decoder, in float32."""
    rows = np.unique(np.linspace(0, sae.n_latents - 1, min(_SAMPLED, sae.n_latents)).round().astype(int))
    values = np.ascontiguousarray(to_host(sae.W_dec[rows]), np.float32)
    return hashlib.sha256(repr(sae.W_dec.shape).encode() + values.tobytes()).hexdigest()[:16]
