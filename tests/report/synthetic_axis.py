"""Directories of axis runs made up for the tests of their page: the numbers are drawn, the files are as a run's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.axis import AxisResult
from jaxsteer.axis.places import Layer, Place, TraitPlace
from jaxsteer.axis.result import Filter, Reply
from jaxsteer.axis.transcripts import DEFAULT, Transcript
from jaxsteer.runs.files import CONFIG, METRICS, write_json, write_lines
from tests.report.synthetic import HOSTILE

FAMILIES = ("office", "craft", "spirit", HOSTILE)
QUESTIONS = ("What makes a good morning?", f"How do you keep a secret? {HOSTILE}", "What is a friend?")


SCORES = {"3": 200, "1": 30, "unread": 2}


def around(value: float, spread: float = 0.05) -> tuple[float, float]:
    return value - spread, value + spread


def layer(at: int, positions: np.ndarray, pc1: np.ndarray, rated: bool) -> Layer:
    return Layer(
        site=f"blocks.{at}.hook_resid_post", of_stream=0.3, halves=0.9 + at / 100, halves_spread=(0.85, 0.95),
        order=0.88, order_spread=(0.8, 0.9), shuffled_order=0.02, other_order=0.7, cosine=0.61,
        cosine_ci95=around(0.61), cosines=(0.61, 0.4, 0.1), scaled_cosine=0.5, base_cosine=0.2, base_share=0.97,
        explained=(0.31, 0.2, 0.1), needed=7, edge=0.12, edge_ci95=around(0.12), rating=0.55 if rated else None,
        pc1_rating=0.52 if rated else None, positions=tuple(positions), pc1=tuple(pc1),
    )  # fmt: skip


def axis_result(n: int = 20, layers: int = 3, *, rich: bool = True, **changed: Any) -> AxisResult:
    """A result of ``n`` roles; ``rich`` has ratings, traits and a judge."""
    rng = np.random.default_rng(0)
    positions = np.sort(rng.normal(0, 0.4, n))[::-1]
    pc1 = 8 * positions + rng.normal(0, 1.5, n)
    names = [f"role {i}" for i in range(n)]
    names[1] = HOSTILE
    roles = [
        Place(
            name=names[i], family=FAMILIES[i % 4] if rich else "", human=bool(i % 3) if rich else None,
            assistant_like=i % 4 if rich else None, rollouts=12, position=float(positions[i]),
            ci95=around(float(positions[i])), pc1=float(pc1[i]), pc1_ci95=around(float(pc1[i]), 0.6),
            pc2=float(rng.normal(0, 3)),
        )
        for i in range(n)
    ]  # fmt: skip
    default = Place(name=DEFAULT, rollouts=60, position=1.0, ci95=(0.97, 1.03), pc1=9.0, pc1_ci95=(8.5, 9.5), pc2=0.5)
    shown = [DEFAULT, *names[:2], *names[-2:]]
    some: dict[str, Any] = {
        "traits": tuple(TraitPlace(name=f"trait {i}", cosine=0.5 - i / 4, ci95=around(0.5 - i / 4), of_stream=0.2)
                        for i in range(4)),
        "filter": Filter(judge="words", keep=3, scores=SCORES, kept=200, cosine=0.98, order=0.9),
        "rating_p": 0.0005,
        "left_out": {"mute": 2},
    }  # fmt: skip
    found = AxisResult(
        model="organism:persona", fingerprint="0123", roleset="made", roleset_hash="4567", rollouts=12 * n, silent=3,
        questions=len(QUESTIONS), target="blocks.1.hook_resid_post",
        layers=tuple(layer(at, positions, pc1 + at * rng.normal(0, 1, n), rich) for at in range(layers)),
        roles=tuple(roles), default=default, seconds={"rollouts": 3.5},
        replies=tuple(
            Reply(role=name, question=asked, text=f"I am {name}. {HOSTILE}")
            for name in shown
            for asked in QUESTIONS[:2]
        ),
    )  # fmt: skip
    return dataclasses.replace(found, **((some if rich else {}) | changed))


def write_axis(path: Path, result: AxisResult | None = None) -> Path:
    """The directory of an axis run as far as its page reads it."""
    result = result or axis_result()
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / CONFIG, {"format": "jaxsteer.run/1", "kind": "axis", "model": result.model, "seed": 0})
    lines = [
        Transcript(
            role=place.name, question=at,
            messages=({"role": "user", "content": asked},
                      {"role": "assistant", "content": f"{place.name} says {at} " * 40}),
        )
        for place in (result.default, *result.roles)
        for at, asked in enumerate(QUESTIONS)
    ]  # fmt: skip
    write_lines(path / "transcripts.jsonl", [line.to_json() for line in lines])
    write_json(path / METRICS, result.to_json())
    return path
