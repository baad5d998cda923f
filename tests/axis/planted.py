"""The axis of ``organism:persona``, made small: replies of its planted roles and of the default, and their means."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np

import jaxsteer
from jaxsteer.axis.projection import encoded
from jaxsteer.axis.role_vectors import RoleVectors
from jaxsteer.models.model import Model
from jaxsteer.models.reading import direction_sites, read_rows
from jaxsteer.models.sites import resid_site
from jaxsteer.organisms import persona_world
from jaxsteer.personas.passages import Passage
from jaxsteer.prompts.generate import generate
from jaxsteer.steer.vectors import Vectors

ROLES = ("", *list(persona_world.ASSISTANTNESS)[::2])
"""The default first."""
TOPICS, OWN = persona_world.CALM_TOPICS[:4], 12
"""What roles are asked about, and rollouts of the default."""
SIDE = {word: word in persona_world.PROFESSIONAL for word in persona_world.WORDS}


@dataclasses.dataclass(frozen=True)
class Planted:
    model: Model
    axis: Vectors
    roles: RoleVectors
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
    own = [("", asked("", topic, i)) for i, topic in enumerate(persona_world.CALM_TOPICS[:OWN])]
    chats = [*own, *((role, asked(role, topic, i)) for role in ROLES[1:] for i, topic in enumerate(TOPICS))]
    made = generate(model, [chat for _, chat in chats], temperature=1.0, seed=5, max_new_tokens=24)
    rollouts = tuple(
        Passage(
            id=f"{role or 'default'}-{i}",
            messages=(*chat, {"role": "assistant", "content": text}),
            group=role or "default",
        )
        for i, ((role, chat), text) in enumerate(zip(chats, made.texts, strict=True))
    )
    sites = tuple(resid_site(layer) for layer in range(model.config.n_layers))
    rows = encoded(model, rollouts)
    states = np.zeros((len(sites), len(rows), model.config.d_model))
    masks = [spans[-1].mask for _, spans in rows]
    for numbers, values in read_rows(model, [ids for ids, _ in rows], masks, direction_sites(model, sites)):
        states[:, numbers] = values
    groups = np.asarray([role for role, _ in chats])
    means = np.stack([states[:, groups == role].mean(1) for role in ROLES], 1)
    arrays = (means[:, 0] - means[:, 1:].mean(1)).astype(np.float32)
    unit = arrays / np.linalg.norm(arrays, axis=-1, keepdims=True)
    ends = np.einsum("srd,sd->sr", means, unit.astype(np.float64))
    default = np.einsum("snd,sd->sn", states[:, :OWN], unit.astype(np.float64))
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
    roles = RoleVectors(
        names=ROLES[1:],
        arrays={site: np.roll(array, -1, 0).astype(np.float32) for site, array in zip(sites, means, strict=True)},
        errors={site: np.zeros_like(array, np.float32) for site, array in zip(sites, means, strict=True)},
        stream=axis.mean_resid_norm,
        model=model.name,
        fingerprint=model.fingerprint,
    )
    return Planted(model, axis, roles, rollouts)
