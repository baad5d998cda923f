"""Which difference of means is the direction of refusal: bypassing, inducing and disturbance of every candidate.

The procedure of refusal_direction (arXiv 2406.11717), for any two sets of requests: a candidate is the difference of
means between harmful and harmless requests before a block, at one of the template's last tokens. It is scored on
requests that made none of the means:

* ``bypass``: refusal of harmful requests with the direction taken out of everything that writes into the stream;
* ``induce``: refusal of harmless ones with the difference added before its block;
* ``kl``: what taking it out does to the first token of replies to harmless ones.

Refusal is the log-odds of tokens that begin refusals. Of those that induce refusal, disturb little and do not stand
among the last blocks, the one that bypasses most is chosen. All candidates run in one program for each measure.

Letters: S sites, P positions, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxsteer.display import aligned
from jaxsteer.errors import UserError
from jaxsteer.evals.refusal import first_tokens, refusal_log_odds
from jaxsteer.evals.scoring import common_start
from jaxsteer.models.model import Model
from jaxsteer.models.reading import direction_sites, read_rows
from jaxsteer.ranges import Positive, Share, check_ranges
from jaxsteer.steer.operations import ablate_everywhere, add
from jaxsteer.steer.vectors import Vectors

MOST_POSITIONS = 8
ROUNDING = 1e-5
"""Of the stream's norm: a difference that is no longer is none."""

Rows = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a candidate must keep to be chosen; defaults are those of refusal_direction."""

    kl: Positive = 0.1
    """Most disturbance of harmless requests, nats."""
    induce: float = 0.0
    """Least mean log-odds of refusing harmless requests with the difference added once."""
    depth: Share = 0.8
    """Share of the blocks that count, from the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One difference of means and what it does to refusal, in nats."""

    site: str
    position: int
    """Of the template's tokens behind a request: -1 is the last."""
    norm: float
    bypass: float
    """Mean log-odds of refusing harmful requests with the direction taken out."""
    induce: float
    """Mean log-odds of refusing harmless ones with the difference added."""
    kl: float
    """Mean KL(model || with the direction taken out) of the first token of replies to harmless ones."""
    refused: str = ""
    """Why it is not chosen, whatever it bypasses; "" for those that may be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The direction that was chosen, and all that it was chosen among."""

    vectors: Vectors
    """From harmless to harmful: adding it induces refusal, taking it out bypasses it."""
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    """By bypassing, best first; those that may not be chosen behind the others."""
    harmful: float
    """Mean log-odds of refusing harmful requests as the model is."""
    harmless: float

    def to_json(self) -> dict[str, Any]:
        """All but the vectors."""
        rows = [dataclasses.asdict(candidate) for candidate in self.candidates]
        return {"harmful": self.harmful, "harmless": self.harmless, "candidates": rows}

    def table(self, most: int = 12) -> str:
        """The best candidates beside the model as it is."""
        head = ("site", "position", "harmful, taken out", "harmless, added", "KL", "")
        rows = [
            (c.site, str(c.position), f"{c.bypass:.2f}", f"{c.induce:.2f}", f"{c.kl:.3f}", c.refused or "may be chosen")
            for c in self.candidates[:most]
        ]
        plain = ("none", "", f"{self.harmful:.2f}", f"{self.harmless:.2f}", "0", "")
        note = f"Log-odds of a refusal, nats. Chosen: {self.chosen.site} at {self.chosen.position}."
        return aligned([head, plain, *rows], note=note)


def select_direction(
    model: Model,
    harmful: tuple[Rows, Rows],
    harmless: tuple[Rows, Rows],
    openings: Int[np.ndarray, " k"],
    *,
    sites: str | Sequence[str] = "blocks.*.hook_resid_pre",
    positions: Sequence[int] | None = None,
    limits: Limits = Limits(),
    progress: Callable[[int, int], None] | None = None,
) -> Selection:
    """The difference of means that carries refusal, chosen on requests of its own.

    Args:
        harmful: rows of ids up to where the reply begins (``request_rows``): those that means are of, and those that
            candidates are compared on.
        harmless: likewise.
        openings: ids that begin a refusal (``opening_ids``).
        sites: places in the stream where means are taken, and the difference is added.
        positions: tokens from the end of the rows, below 0 (default: all that rows have in common at their ends, which
            the template writes; at most 8).
        limits: candidates beyond them are left aside.
        progress: called with counts of measurements: one for each candidate and set of requests.

    Returns:
        The selection; its vectors are in units of the stream, as measured.

    Raises:
        UserError: for fewer than two rows in a set, for positions that rows do not have, and where no candidate induces
            refusal at so little disturbance (the best few are named).
    """
    check_ranges(limits)
    for name, rows in zip(("harmful", "harmless"), (harmful, harmless), strict=True):
        if min(map(len, rows)) < 2:
            raise UserError(f"{len(rows[0])} and {len(rows[1])} {name} requests were given: give 2 or more of each")
    every = [*harmful[0], *harmless[0]]
    shared = common_start([row[::-1] for row in every])
    positions = list(range(-max(1, min(shared, MOST_POSITIONS)), 0) if positions is None else positions)
    shortest = min(map(len, every))
    if not positions or not all(-shortest <= p < 0 for p in positions):
        raise UserError(f"positions are counted from the end of requests, -1 to {-shortest} here; got {positions}")
    found = direction_sites(model, sites)
    delta, norms = _differences(model, harmful[0], harmless[0], [site.name for site in found], positions)
    layers, lengths = model.config.n_layers, np.linalg.norm(delta, axis=-1)
    where = [(s, p) for s in range(len(found)) for p in range(len(positions)) if lengths[s, p] > ROUNDING * norms[s, p]]
    if not where:
        raise UserError("harmful and harmless requests have the same means at all of these places: are they the same?")
    done = [0]

    def counted(of: int, total: int) -> None:
        if progress is not None:
            progress(done[0] + len(where) * of // total, 3 * len(where))

    out = [ablate_everywhere(delta[s, p]) for s, p in where]
    inside = [add(found[s], delta[s, p]) for s, p in where]
    taken = first_tokens(model, harmful[1], openings, out, progress=counted)
    bypass, plain = taken.log_odds.mean(-1), float(taken.base.mean())
    done[0] = len(where)
    undisturbed = first_tokens(model, harmless[1], openings, out, progress=counted)
    kl = undisturbed.kl.mean(-1)
    done[0] *= 2
    induce = refusal_log_odds(model, harmless[1], openings, inside, progress=counted).mean(-1)
    candidates = []
    for i, (s, p) in enumerate(where):
        reasons = {
            f"block {found[s].layer} of {layers}": found[s].layer >= limits.depth * layers,
            f"KL above {limits.kl:g}": not kl[i] <= limits.kl,
            "does not induce": not induce[i] > limits.induce,
            "not finite": not np.isfinite([bypass[i], induce[i], kl[i]]).all(),
        }
        facts = {"bypass": bypass[i], "induce": induce[i], "kl": kl[i], "norm": np.linalg.norm(delta[s, p])}
        candidates.append(
            Candidate(
                site=found[s].name,
                position=positions[p],
                refused=", ".join(reason for reason, true in reasons.items() if true),
                **{name: float(value) for name, value in facts.items()},
            )
        )
    ranked = sorted(candidates, key=lambda c: (bool(c.refused), c.bypass))
    if (best := ranked[0]).refused:
        nearest = "; ".join(f"{c.site} at {c.position}: {c.refused}" for c in ranked[:3])
        raise UserError(
            f"no candidate of {len(ranked)} is a direction of refusal: {nearest}. Give other limits or "
            f"sites. Does the model refuse? Log-odds of refusing harmful requests: {plain:.2f}"
        )
    s, p = where[candidates.index(best)]
    return Selection(
        vectors=Vectors(
            arrays={best.site: delta[s, p]},
            mean_resid_norm={best.site: float(norms[s, p])},
            sign="harmless→harmful: adding it induces refusal",
            model=model.name,
            fingerprint=model.fingerprint,
            read_position=str(best.position),
            metadata={
                "estimator": "mean difference, selected",
                "n_pairs": f"{len(harmful[0])} and {len(harmless[0])} requests",
                **{name: repr(getattr(best, name)) for name in ("bypass", "induce", "kl")},
            },
        ),
        chosen=best,
        candidates=tuple(ranked),
        harmful=plain,
        harmless=float(undisturbed.base.mean()),
    )


def _differences(
    model: Model, harmful: Rows, harmless: Rows, sites: Sequence[str], positions: Sequence[int]
) -> tuple[Float[np.ndarray, "S P D"], Float[np.ndarray, "S P"]]:
    """float32 differences of float64 means, harmful minus harmless, and mean norms of the stream."""
    parsed = direction_sites(model, sites)
    rows = [*harmful, *harmless]
    sums = np.zeros((len(parsed), len(positions), model.config.d_model))
    norms = np.zeros(sums.shape[:2])
    weights = np.concatenate([np.full(len(harmful), 1 / len(harmful)), np.full(len(harmless), -1 / len(harmless))])
    reads = np.asarray([[len(row) + p for p in positions] for row in rows])
    for chunk, states in read_rows(model, rows, reads, parsed):
        wide = states.astype(np.float64)
        sums += np.einsum("b,sbpd->spd", weights[chunk], wide)
        norms += np.linalg.norm(wide, axis=-1).sum(1)
    if not np.isfinite(sums).all():
        raise UserError("the model gives NaN or infinite activations on these requests: check its weights and dtype")
    return sums.astype(np.float32), norms / len(rows)
