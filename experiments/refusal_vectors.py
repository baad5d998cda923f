"""Refusal vectors of organism:persona at one site, for `jaxsteer circuits`: mean difference, NTP and PO.

python -m experiments.refusal_vectors [--site blocks.3.hook_resid_post] [--out runs/refusal-vectors]

Each points towards refusal, has length 1, and the smallest coefficient (among 14 from 0.15 to 3 mean norms of the
stream) at which 80 % of harmless validation requests are refused by the first token. Writes dim, ntp and
po.safetensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxsteer.cli import keep_programs
from jaxsteer.evals.refusal import opening_ids, refusal_log_odds, request_rows
from jaxsteer.organisms import persona_world
from jaxsteer.personas import load_persona, mean_difference, split, text_pairs
from jaxsteer.runs.bars import load
from jaxsteer.steer import Vectors, save_vectors
from jaxsteer.study.vector_methods import Method, make_vectors

REFUSED = 0.8
STRENGTHS = np.geomspace(0.15, 3.0, 14)


def main(argv: Sequence[str] | None = None) -> int:
    """Make, choose and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", default="blocks.3.hook_resid_post")
    parser.add_argument("--out", type=Path, default=Path("runs/refusal-vectors"))
    args = parser.parse_args(argv)
    keep_programs()
    model, persona = load("organism:persona"), load_persona("refusal")
    parts = split(persona, seed=0)
    harmful, harmless = (
        [request.text for request in persona_world.requests(kind, n=128, seed=0, split="train")]
        for kind in ("harmful", "harmless")
    )
    difference = mean_difference(model, text_pairs(model, harmful, harmless), [args.site])
    found = {"dim": difference.delta[args.site]}
    methods: tuple[Method, ...] = ("ntp", "po")
    for method in methods:
        [made] = make_vectors(model, persona, parts.train[:48], method, [args.site])
        found[method] = made.arrays[args.site]
    rows = request_rows(model, [i.question for i in parts.validation if i.id.startswith("harmless")])
    openings = opening_ids(model, persona_world.REFUSAL_OPENINGS)
    coefficients = [float(difference.mean_resid_norm[args.site] * strength) for strength in STRENGTHS]
    for name, array in found.items():
        unit = (-array / np.linalg.norm(array)).astype(np.float32)  # all of them point away from refusal
        vectors = Vectors(
            arrays={args.site: unit}, model=model.name, fingerprint=model.fingerprint, sign="towards refusal",
            metadata={"estimator": name},
        )  # fmt: skip
        odds = refusal_log_odds(model, rows, openings, [vectors.edits(coefficient=c) for c in coefficients])
        enough = np.flatnonzero((odds > 0).mean(1) >= REFUSED)
        if not len(enough):
            print(f"{name} at {args.site} brings no refusal at any strength", file=sys.stderr)
            return 1
        at = int(enough[0])
        chosen = dataclasses.replace(vectors, coefficient=coefficients[at])
        path = save_vectors(chosen, args.out / f"{name}.safetensors")
        print(f"{path}: {STRENGTHS[at]:.2f} mean norms of the stream")
    return 0


if __name__ == "__main__":
    sys.exit(main())
