"""Two runs read side by side: where on the way up they come apart, and which tokens one of them gains.

Runs may be steered differently or say different things before the same text (a prompt): tokens are then laid alongside
by the texts' common beginnings and ends.

Letters: B rows, T tokens of the run, S places, V vocabulary, k top tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.lens.comparison import LensComparison, Shift, change_summary
from jaxsteer.lens.logit_lens import (
    EVERY,
    LensRows,
    Place,
    batches,
    checked_edits,
    encoded,
    find_places,
    inner,
    over_tokens,
    read,
    states_at,
    step_of,
)
from jaxsteer.lens.result import words_of
from jaxsteer.lens.tuned_lens import TunedLens, translated
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.model import Model
from jaxsteer.models.params import Params
from jaxsteer.models.roles import Rendered
from jaxsteer.models.taps import Intervention
from jaxsteer.models.transformer import unembed
from jaxsteer.processes import to_host
from jaxsteer.prompts.generate import Prompt


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One of two runs: what it reads, and what steers it."""

    texts: Sequence[Prompt]
    edits: Intervention | None = None
    name: str = "plain"


def compare(
    model: Model,
    run: Side,
    base: Side,
    *,
    controls: Sequence[Side] = (),
    sites: str | Sequence[str] = EVERY,
    lens: TunedLens | None = None,
    tokens: Sequence[int] = (),
    top: int = 10,
    progress: Callable[[int], None] | None = None,
) -> LensComparison:
    """Both runs read at every place, and KL(run || base) and the tokens that gain and lose most at each aligned token.

    Text i of the run stands beside text i of the base. KL at the last place is the push's effect on what the model
    says: a push may work although no lens reads it below. ``controls`` are other runs whose KL to the base is measured
    beside (random vectors or prompts of equal size). Many parameters: two runs, and how they are read. Other arguments,
    and errors, as in ``read``; raises ``UserError`` also for other numbers of texts on the sides.
    """
    places = find_places(sites, model.config)
    sides = [run, base, *controls]
    rows = [encoded(model, side.texts) for side in sides]
    if {len(each) for each in rows} != {len(rows[0])}:
        raise UserError(f"texts go in pairs: the sides have {', '.join(str(len(each)) for each in rows)} of them")
    edits = [checked_edits(model, side.edits) for side in sides]
    first, second = (
        read(model, each, sites=sites, lens=lens, edits=edit, tokens=tokens, top=top, progress=progress)
        for each, edit in zip(rows[:2], edits[:2], strict=True)
    )
    along = None if lens is None else lens.along(model, places)
    apart = partial(_apart, model, places=places, along=along)
    shift = apart(rows[0], rows[1], edits[0], edits[1], top=min(top, model.config.vocab_size))
    beside = [apart(each, rows[1], edit, edits[1], top=1) for each, edit in zip(rows[2:], edits[2:], strict=True)]
    words = words_of(model, np.concatenate([shift.gained_ids.ravel(), shift.lost_ids.ravel()]).clip(0))
    return LensComparison(
        run=first, base=second, run_name=run.name, base_name=base.name,
        control_names=tuple(side.name for side in controls), shift=shift, words=words,
        summary=change_summary(first.places, shift, beside, words),
    )  # fmt: skip


def by_ends(own: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """For every token of one text that of another: by their longest common beginning and end, and what lies between if
    it is equally long; -1 for none."""
    short = min(len(own), len(theirs))
    differ = np.flatnonzero(own[:short] != theirs[:short])
    begin = int(differ[0]) if len(differ) else short
    differ = np.flatnonzero(own[::-1][: short - begin] != theirs[::-1][: short - begin])
    end = int(differ[0]) if len(differ) else short - begin
    found = np.full(len(own), -1)
    found[:begin] = np.arange(begin)
    found[len(own) - end :] = np.arange(len(theirs) - end, len(theirs))
    if len(own) == len(theirs):
        found = np.arange(len(own))
    return found


def _apart(
    model: Model,
    rows: Sequence[Rendered],
    others: Sequence[Rendered],
    edits: Intervention | None,
    base_edits: Intervention | None,
    *,
    places: tuple[Place, ...],
    along: Any,
    top: int,
) -> Shift:
    """The differences of all pairs of texts, one behind the other."""
    at = [by_ends(row.ids, other.ids) for row, other in zip(rows, others, strict=True)]
    found: list[Any] = [None] * len(rows)
    for numbers, [batch, other] in batches(model, [rows, others], 2 * len(places)):
        index = np.full(batch.tokens.shape, -1, np.int32)
        for row, number in enumerate(numbers):
            index[row, : len(at[number])] = at[number]
        stats = to_host(_differ(
            model.params, model.config, (batch, other), (edits, base_edits), index.clip(0), along, places=places,
            top=top, step=step_of(model.config, batch.tokens.shape),
        ))  # fmt: skip
        for row, number in enumerate(numbers):
            length = len(at[number])
            found[number] = jax.tree.map(lambda a, row=row, length=length: a[:, row, :length], stats)
    stats = jax.tree.map(lambda *parts: np.array(np.concatenate(parts, 1)), *found)
    none = np.concatenate(at) < 0
    for array in (stats.kl, stats.gained, stats.lost):
        array[:, none] = np.nan
    for array in (stats.gained_ids, stats.lost_ids):
        array[:, none] = -1
    lengths = [len(each) for each in at]
    return Shift(
        text=np.repeat(np.arange(len(rows), dtype=np.int32), lengths), at=np.concatenate(at).astype(np.int32),
        kl=stats.kl, gained_ids=stats.gained_ids, gained=stats.gained, lost_ids=stats.lost_ids, lost=stats.lost,
    )  # fmt: skip


@struct.dataclass
class _Apart:
    kl: Float[Array, "S B T"]
    gained_ids: Int[Array, "S B T k"]
    gained: Float[Array, "S B T k"]
    lost_ids: Int[Array, "S B T k"]
    lost: Float[Array, "S B T k"]


@partial(jax.jit, static_argnames=("config", "places", "top", "step"))
def _differ(
    params: Params,
    config: ModelConfig,
    rows: tuple[LensRows, LensRows],
    edits: tuple[Intervention | None, Intervention | None],
    at: Int[Array | np.ndarray, "B T"],
    along: Any,
    *,
    places: tuple[Place, ...],
    top: int,
    step: int,
) -> _Apart:
    """Many parameters: two runs, what they are read by, and what is kept."""
    own, other = (states_at(params, config, *side, places)[1:] for side in zip(rows, edits, strict=True))
    other = jnp.take_along_axis(other, jnp.asarray(at)[None, :, :, None], axis=2)
    along = jax.tree.map(lambda a: a[1:], along)

    def some(part: tuple[Array, Array]) -> _Apart:
        def place(one: tuple[Array, Array, Any]) -> _Apart:
            log_p, log_q = (jax.nn.log_softmax(unembed(params, config, translated(x, one[2]))) for x in one[:2])
            change = jnp.exp(log_p) - jnp.exp(log_q)
            gained, gained_ids = lax.top_k(change, top)
            lost, lost_ids = lax.top_k(-change, top)
            kl = inner(jnp.exp(log_p), log_p - log_q)
            return _Apart(kl=kl, gained_ids=gained_ids, gained=gained, lost_ids=lost_ids, lost=-lost)

        return lax.map(place, (*part, along))

    return over_tokens((own, other), step, some)
