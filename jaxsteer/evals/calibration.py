"""Strengths at equal disturbance: how much of each vector moves neutral text by so many nats.

Letters: E edits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from jaxsteer.errors import UserError
from jaxsteer.evals.neutral_texts import neutral_texts
from jaxsteer.evals.scoring import same_form
from jaxsteer.evals.side_effects import side_effects
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention
from jaxsteer.prompts import Placement, encode_texts, question_conversation, render
from jaxsteer.ranges import a_number, as_tuple, must_be
from jaxsteer.steer.selectors import Positions
from jaxsteer.steer.vectors import Vectors, check_vectors

FIRST, MOST = 0.1, 64.0
"""Strengths, in mean norms of the stream: the first that is tried, and the largest."""
TOLERANCE, ROUNDS = 0.03, 14
"""How near the divergence must come to what is asked, as a share of it, and how often strengths are tried."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated(Record):
    """A strength and what it does to neutral text."""

    coefficient: float
    """In the units of the vectors; its sign is the one that was asked for."""
    kl: float
    """Mean KL(model || steered) of neutral text, nats per token."""
    perplexity: float
    """Of neutral text, steered."""
    baseline_perplexity: float
    """Of neutral text, as the model is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unreached(Record):
    """How near a vector came to a divergence that it reaches at no strength."""

    sign: int
    """1 or -1, as it was asked for."""
    coefficient: float
    """The largest strength of this sign that was found to stay below the divergence, in the units of the vectors; 0
    where there is none."""
    kl: float
    """Mean KL(model || steered) of neutral text there, nats per token."""
    why: str
    """In words."""


def neutral_rows(
    model: Model, texts: str | Sequence[str] = (), *, placement: Placement = Placement(), most: int | None = None
) -> list[np.ndarray]:
    """Neutral requests (default: those that fit the model) as rows of ids."""
    asked = as_tuple(texts) or neutral_texts(model)
    rendered = [render(model.tokenizer, question_conversation(text, placement), "") for text in asked[:most]]
    return encode_texts(model.tokenizer, rendered, style=placement.style)


def calibrate(
    model: Model,
    vectors: Vectors | Sequence[Vectors],
    kl: float = 0.1,
    *,
    signs: Sequence[int] = (1,),
    texts: str | Sequence[str] = (),
    positions: Positions | None = None,
    placement: Placement = Placement(),
    progress: Callable[[int, int], None] | None = None,
    any_weights: bool = False,
) -> list[Calibrated]:
    """By vector and sign (all signs of the first vector first) the strength at which its divergence is ``kl`` nats.

    That is the smallest one found: divergence rises with strength near 0, as its square. Vectors of the same form are
    tried side by side in one program; other strengths compile nothing. ``texts`` are requests that have nothing to do
    with what the vectors are for (default: ``neutral_texts``), ``positions`` those of ``Vectors.edits``.
    ``progress(done, total)`` counts strengths that are found. ``any_weights`` is that of ``check_vectors``. Many
    parameters: what is calibrated, to what, and on which text.

    Raises ``UserError`` for a ``kl`` that is not above 0, for vectors whose operation has no strength or that belong to
    another model, and, by name, for vectors that reach ``kl`` at no strength: those that do not move the model, and
    those whose divergence jumps over it or is not finite (``approach`` gives them with the others).
    """
    found = approach(
        model, vectors, kl, signs=signs, texts=texts, positions=positions, placement=placement, progress=progress,
        any_weights=any_weights,
    )  # fmt: skip
    for one in found:
        if isinstance(one, Unreached):
            raise UserError(f"{one.why}. Ask for another divergence")
    return [one for one in found if isinstance(one, Calibrated)]


def approach(
    model: Model,
    vectors: Vectors | Sequence[Vectors],
    kl: float = 0.1,
    *,
    signs: Sequence[int] = (1,),
    texts: str | Sequence[str] = (),
    positions: Positions | None = None,
    placement: Placement = Placement(),
    progress: Callable[[int, int], None] | None = None,
    any_weights: bool = False,
) -> list[Calibrated | Unreached]:
    """As ``calibrate``, with ``Unreached`` in the place of a strength that does not exist.

    Many parameters: those of ``calibrate``. Raises ``UserError`` as it does, but for such strengths.
    """
    kl = a_number(kl, "calibrate's kl")
    signs = as_tuple(signs)
    must_be(model, Model, "calibrate's model")
    if not 0 < kl < np.inf or not set(signs) <= {1, -1} or not len(signs):
        raise UserError(f"calibrate needs a divergence above 0 and signs 1 or -1, got {kl} and {list(signs)}")
    many = [vectors] if isinstance(vectors, Vectors) else list(as_tuple(vectors))
    if not many or not all(isinstance(one, Vectors) for one in many):
        given = ", ".join(type(one).__name__ for one in many) or "none"
        raise UserError(f"calibrate takes Vectors, one or a list of them; got {given}")
    for one in many:
        if one.operation not in ("add", "add_keep_norm", "ablate", "scale"):
            why = "it acts behind a prompt" if one.operation == "cache" else "its value says where the stream is held"
            raise UserError(f"{one.operation} has no strength to calibrate on neutral text: {why}")
        check_vectors(one, model, any_weights=any_weights)
    rows = neutral_rows(model, texts, placement=placement)
    wanted = [(one, sign) for one in many for sign in signs]
    units = np.asarray([_unit(one) for one, _ in wanted])
    search = _Search(kl, len(wanted))
    zero = np.asarray([not any(array.any() for array in one.arrays.values()) for one, _ in wanted])
    found = np.zeros((3, len(wanted)))
    for _ in range(ROUNDS):
        open_ = np.flatnonzero(~search.done & ~zero)
        if not len(open_):
            break
        edits = [
            wanted[i][0].edits(coefficient=wanted[i][1] * units[i] * search.strength[i], positions=positions)
            for i in open_
        ]
        found[:, open_] = _measured(model, rows, edits)
        search.told(open_, found[0, open_])
        if progress is not None:
            progress(int(search.done.sum()), len(wanted))
    return [
        Calibrated(
            coefficient=float(sign * units[i] * search.strength[i]),
            kl=float(found[0, i]),
            perplexity=float(found[1, i]),
            baseline_perplexity=float(found[2, i]),
        )
        if search.done[i]
        else _unreached(one, sign, units[i], search, i)
        for i, (one, sign) in enumerate(wanted)
    ]


def _unreached(vectors: Vectors, sign: int, unit: float, search: _Search, i: int) -> Unreached:
    low, high = search.low[i] * unit, search.high[i] * unit
    name = f"the vector at {', '.join(vectors.sites)} ({vectors.metadata.get('estimator', 'of unknown make')})"
    if not any(array.any() for array in vectors.arrays.values()):
        why = f"{name} is zero: it reaches no divergence at any strength"
        return Unreached(sign=sign, coefficient=0.0, kl=0.0, why=why)
    more = f"{search.high_kl[i]:.3g}" if np.isfinite(search.high_kl[i]) else "not finite"
    beyond = f", and at {high:.3g} it is {more}" if np.isfinite(high) else ""
    return Unreached(
        sign=sign,
        coefficient=float(sign * low),
        kl=float(search.low_kl[i]),
        why=f"{name} reaches a divergence of {search.kl:g} nats at no strength of sign {sign}: at {low:.3g} it is "
        f"{search.low_kl[i]:.3g}{beyond}",
    )


def _unit(vectors: Vectors) -> float:
    """One mean norm of the stream in the vectors' units, about; the file's own coefficient where norms are unknown."""
    if vectors.operation in ("ablate", "scale") or vectors.coefficient_units == "mean_resid_norm":
        return 1.0
    ratios = [norm / vectors.norm(site) for site, norm in vectors.mean_resid_norm.items() if vectors.norm(site) > 0]
    return float(np.mean(ratios)) if ratios else abs(vectors.coefficient) or 1.0


def _measured(model: Model, rows: Sequence[np.ndarray], edits: Sequence[Intervention]) -> Float[np.ndarray, "3 E"]:
    """KL and perplexity under every edit, and perplexity without any; those of one form in one program, always as many
    as a power of two."""
    found = np.zeros((3, len(edits)))
    for members in same_form(edits):
        size = 1 << (len(members) - 1).bit_length()
        padded = [edits[i] for i in members] + [edits[members[-1]]] * (size - len(members))
        with np.errstate(over="ignore"):
            effects = side_effects(model, rows, padded)
        found[:2, members] = effects.kl[: len(members)], effects.perplexity[: len(members)]
        found[2, members] = effects.baseline_perplexity
    return found


class _Search:
    """Strengths that approach a divergence from both sides, many at once; log-log, where a small push is a line."""

    def __init__(self, kl: float, n: int) -> None:
        """All begin at ``FIRST``."""
        self.kl = kl
        self.strength = np.full(n, FIRST)
        self.low, self.high = np.zeros(n), np.full(n, np.inf)
        self.low_kl, self.high_kl = np.zeros(n), np.full(n, np.inf)
        self.done = np.zeros(n, bool)

    def told(self, index: np.ndarray, kl: Float[np.ndarray, " E"]) -> None:
        """Take in the divergences at the strengths ``index``, and choose the next ones."""
        for i, value in zip(map(int, index), map(float, kl), strict=True):
            at = self.strength[i]
            if np.isfinite(value) and abs(value / self.kl - 1) <= TOLERANCE:
                self.done[i] = True
                continue
            if np.isfinite(value) and value < self.kl:
                self.low[i], self.low_kl[i] = at, value
            else:
                self.high[i], self.high_kl[i] = at, value
            self.strength[i] = self._next(i)

    def _next(self, i: int) -> float:
        low, high = self.low[i], self.high[i]
        if not low:
            by = np.sqrt(self.kl / self.high_kl[i]) if np.isfinite(self.high_kl[i]) else 0.25
            return float(high * np.clip(by, 0.05, 0.9))
        if np.isinf(high):
            by = np.sqrt(self.kl / self.low_kl[i]) if self.low_kl[i] > 0 else 8.0
            return float(min(low * np.clip(by, 1.1, 8.0), MOST))
        share = 0.5
        if np.isfinite(self.high_kl[i]) and self.low_kl[i] > 0:
            share = np.log(self.kl / self.low_kl[i]) / np.log(self.high_kl[i] / self.low_kl[i])
        return float(low * (high / low) ** np.clip(share, 0.1, 0.9))
