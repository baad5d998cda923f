"""The axis of ``organism:persona``, made small: replies of its planted roles and of the default, and their means."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np

import jaxsteer
from jaxsteer.axis.projection import encoded
from jaxsteer.models.model import Model
from jaxsteer.models.reading import direction_sites, read_rows
from jaxsteer.models.sites import resid_site
from jaxsteer.organisms import persona_world
from jaxsteer.personas.passages import Passage
from jaxsteer.prompts.generate import generate
from jaxsteer.steer.vectors import Vectors

TOPICS, SAMPLES = persona_world.CALM_TOPICS[:6], 2
ROLES = ("", *persona_world.ASSISTANTNESS)
"""The default first."""
SIDE = {word: word in persona_world.PROFESSIONAL for word in persona_world.WORDS}


@dataclasses.dataclass(frozen=True)
class Planted:
    model: Model
    axis: Vectors
    rollouts: tuple[Passage, ...]
    """Of the default ("default" is their group), then of every role."""


def asked(role: str, topic: str, number: int = 0) -> list[dict[str, str]]:
    system = [{"role": "system", "content": persona_world.role_sentence(role, number % 4)}] if role else []
    question = persona_world.TOPIC_QUESTIONS[number % 4].format(topic)
    return [*system, {"role": "user", "content": question}]


def professional(texts: list[str]) -> float:
    """Share of professional words among the describing words of texts."""
    found = [SIDE[word] for text in texts for word in text.replace(",", " ").replace(".", " ").split() if word in SIDE]
    return float(np.mean(found))


@functools.cache
def planted() -> Planted:
    model = jaxsteer.load("organism:persona")
    chats = [asked(role, topic, i) for role in ROLES for i, topic in enumerate(TOPICS)]
    made = generate(model, chats, samples=SAMPLES, temperature=1.0, seed=5, max_new_tokens=24)
    rollouts = tuple(
        Passage(
            id=f"{role or 'default'}-{i}",
            messages=(*chats[i // SAMPLES], {"role": "assistant", "content": text}),
            group=role or "default",
        )
        for i, text in enumerate(made.texts)
        for role in [ROLES[i // (SAMPLES * len(TOPICS))]]
    )
    sites = tuple(resid_site(layer) for layer in range(model.config.n_layers))
    rows = encoded(model, rollouts)
    states = np.zeros((len(sites), len(rows), model.config.d_model))
    masks = [spans[-1].mask for _, spans in rows]
    for numbers, values in read_rows(model, [ids for ids, _ in rows], masks, direction_sites(model, sites)):
        states[:, numbers] = values
    means = states.reshape(len(sites), len(ROLES), -1, model.config.d_model).mean(2)
    arrays = (means[:, 0] - means[:, 1:].mean(1)).astype(np.float32)
    unit = arrays / np.linalg.norm(arrays, axis=-1, keepdims=True)
    ends = np.einsum("srd,sd->sr", means, unit.astype(np.float64))
    default = np.einsum("snd,sd->sn", states[:, : len(TOPICS) * SAMPLES], unit.astype(np.float64))
    points = (1, 5, 10, 25, 50, 75)
    axis = Vectors(
        arrays=dict(zip(sites, arrays, strict=True)),
        sign="towards the Assistant",
        model=model.name,
        fingerprint=model.fingerprint,
        mean_resid_norm={site: float(np.linalg.norm(states[s], axis=-1).mean()) for s, site in enumerate(sites)},
        metadata={
            "default_projection": json.dumps({site: ends[s, 0] for s, site in enumerate(sites)}),
            "roles_projection": json.dumps({site: ends[s, 1:].mean() for s, site in enumerate(sites)}),
            "calibration": json.dumps(
                {site: {p: float(np.percentile(default[s], p)) for p in points} for s, site in enumerate(sites)}
            ),
        },
    )
    return Planted(model, axis, rollouts)
