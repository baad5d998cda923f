"""Steering vectors of a persona, by every method, from the same train questions.

All point from the persona to its absence, so that adding one reduces the persona, and all are ``Vectors``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.evals.choice import encode_answers
from jaxsteer.models.model import Model
from jaxsteer.personas import (
    Direction,
    Item,
    Persona,
    contrast_pairs,
    diagnose,
    fit_direction,
    mean_difference,
    random_direction,
    response_pairs,
    role_pairs,
    shuffled,
)
from jaxsteer.personas.directions import SIGN
from jaxsteer.personas.items import mostly_replies
from jaxsteer.personas.latent_vectors import sta_vector
from jaxsteer.personas.pairs import Pairs
from jaxsteer.prompts import Placement
from jaxsteer.ranges import Range, Seed
from jaxsteer.sae import SAE
from jaxsteer.steer import Example, Learning, Vectors, learn_vectors

Method = Literal["mean difference", "pca", "logistic", "ntp", "po", "sta", "random", "shuffled labels"]
FITTED: tuple[Method, ...] = ("mean difference", "pca", "logistic")
LEARNED: tuple[Method, ...] = ("ntp", "po")
CONTROLS: tuple[Method, ...] = ("random", "shuffled labels")
METHODS: tuple[Method, ...] = (*FITTED, *LEARNED, *CONTROLS)
"""Those that need no SAE."""

ReadPosition = Literal["published", "matched", "decision", "response", "role"]
Advance = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorOptions:
    """What a persona's vectors are made of."""

    read_position: ReadPosition | None = None
    """Where directions are read: as in search, in the mean over the answer, or where the reply begins, with the
    persona's role as system message and without (default: decision where the persona has cue sentences, role where it
    has one, response where its answers are replies, else matched)."""
    epochs: int = 10
    """Of ntp and po: times that every question is seen, with either sign."""
    tokens: Annotated[int, Range(1, 4096)] = 64
    """Of ntp and po: of a reply; what is longer is cut."""
    seed: Seed = 0
    """Of ntp, po and the controls."""
    placement: Placement = Placement()
    """How questions are asked."""
    sae: SAE | None = None
    """Of sta, which steers at its site."""
    any_weights: bool = False
    """Use the SAE although it was trained on another model."""
    trim: Annotated[float, Range(0, 1)] = 0.95
    """Of sta: the share of latents that is left out at least."""

    def position(self, persona: Persona) -> str:
        """The read position."""
        own = "role" if persona.role else "response" if mostly_replies(persona.items) else "matched"
        return self.read_position or ("decision" if persona.counter_cues and persona.pro_cues else own)

    def pairs(self, model: Model, persona: Persona, items: Sequence[Item]) -> Pairs:
        """What directions are read from."""
        position = self.position(persona)
        if position in ("response", "role"):
            made = response_pairs if position == "response" else role_pairs
            return made(model, persona, items, placement=self.placement)
        return contrast_pairs(model, persona, items, position, placement=self.placement)


def examples_of(model: Model, items: Sequence[Item], placement: Placement = Placement()) -> list[Example]:
    """Two examples of every item: added, its vector makes the answer without the persona likely; subtracted, the other.

    Raises ``UserError`` where both answers of an item are the same tokens.
    """
    answers = [(item.not_matching, item.matching) for item in items]
    groups, _ = encode_answers(model.tokenizer, [item.asked for item in items], answers, [""], placement)
    found = []
    for item, (text,) in zip(items, groups, strict=True):
        without, shown = text.answers
        if np.array_equal(without, shown):
            raise UserError(f"both answers of {item.question[:60]!r} are the same tokens: there is nothing to learn")
        found.append(Example(context=text.context, wanted=without, unwanted=shown, sign=1))
        found.append(Example(context=text.context, wanted=shown, unwanted=without, sign=-1))
    return found


def make_vectors(
    model: Model,
    persona: Persona,
    train: Sequence[Item],
    method: Method,
    sites: Sequence[str],
    *,
    options: VectorOptions = VectorOptions(),
    state: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[Vectors]:
    """A vector of ``persona`` at each of ``sites``, from ``train`` questions, by one method.

    ``sites`` are not read for ``sta``. ``state`` and ``progress`` are those of ``learn_vectors``. Raises ``UserError``
    for a persona whose train questions all have the same answer, and as ``contrast_pairs`` and ``learn_vectors``.
    """
    pairs = options.pairs(model, persona, train)
    _require_contrast(persona, pairs)
    if method in LEARNED:
        learning = Learning(method=method, epochs=options.epochs, tokens=options.tokens)  # type: ignore[arg-type]
        made = learn_vectors(
            model, examples_of(model, train, options.placement), list(sites), learning=learning, seeds=[options.seed],
            state=state, progress=progress,
        )  # fmt: skip
        more = {"persona": persona.name, "dataset_hash": persona.data_hash}
        return [dataclasses.replace(one, sign=SIGN, metadata={**one.metadata, **more}) for one in made]
    if method == "sta":
        if options.sae is None:
            raise UserError("sta steers by latents of an SAE: give one (--sae)")
        atoms = sta_vector(model, options.sae, pairs, trim=options.trim, any_weights=options.any_weights)
        norms = mean_difference(model, pairs, list(atoms.sites)).mean_resid_norm
        share = len(json.loads(atoms.metadata["latents"])) / options.sae.n_latents
        facts = {"diagnostics": json.dumps({atoms.sites[0]: {"latents": share}})}
        atoms = dataclasses.replace(atoms, coefficient_units="mean_resid_norm", mean_resid_norm=norms)
        return [dataclasses.replace(atoms, metadata={**atoms.metadata, **facts})]
    if method == "random":
        direction = random_direction(mean_difference(model, pairs, list(sites)), options.seed)
    elif method == "shuffled labels":
        direction = mean_difference(model, shuffled(pairs, options.seed), list(sites))
        direction = dataclasses.replace(direction, metadata={**direction.metadata, "estimator": method})
    else:
        direction = fit_direction(model, pairs, list(sites), method)
    whole = dataclasses.replace(direction.vectors(), coefficient_units="mean_resid_norm")
    return [whole.at(site) for site in whole.sites]


def diagnosed(
    model: Model, persona: Persona, held_out: Sequence[Item], made: Sequence[Vectors], options: VectorOptions
) -> list[Vectors]:
    """Vectors of one site each with what ``held_out`` questions say of them (``personas.diagnose``) in the metadata;
    nothing of vectors that are zero."""
    pairs = options.pairs(model, persona, held_out)
    some = [one for one in made if any(array.any() for array in one.arrays.values())]
    facts = diagnose(model, as_direction(some, pairs.read_position), pairs).diagnostics if some else {}
    found = []
    for one in made:
        (site,) = one.sites
        known = json.loads(one.metadata.get("diagnostics", "{}")).get(site, {})
        told = json.dumps({site: {**known, **facts.get(site, {})}})
        found.append(dataclasses.replace(one, metadata={**one.metadata, "diagnostics": told}))
    return found


def as_direction(vectors: Sequence[Vectors], read_position: str) -> Direction:
    """Vectors of one site each as one direction, which is what ``diagnose`` looks at."""
    return Direction(
        delta={site: array for one in vectors for site, array in one.arrays.items()},
        mean_resid_norm={site: norm for one in vectors for site, norm in one.mean_resid_norm.items()},
        n=0,
        read_position=read_position,
        metadata={"model": vectors[0].model, "fingerprint": vectors[0].fingerprint},
        diagnostics={site: {"norm": one.norm(site)} for one in vectors for site in one.sites},
    )


def _require_contrast(persona: Persona, pairs: Pairs) -> None:
    same = sum(np.array_equal(a, b) for a, b in zip(pairs.good, pairs.bad, strict=True))
    if same == len(pairs):
        raise UserError(
            f"the {len(pairs)} pairs of {persona.name} are the same text twice: a vector is made of texts that differ "
            f"in whether they show the behaviour"
        )
