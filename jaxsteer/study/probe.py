"""Does an objective rank prompts as behaviour does? Measured before a search, with random prompts.

For every site and read position: Spearman correlation, over a few hundred random probe prompts, between the objective
``mean over contexts of <r[read], delta>`` and the shift of behaviour away from the persona on held-out questions.
Letters: C contexts, M probe prompts, S prompt length, T row, L layers, D width.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.evals.choice import choice_eval
from jaxsteer.files.records import Record
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import Keep, scan_blocks
from jaxsteer.models.params import Params
from jaxsteer.models.sites import parse_site, resid_site
from jaxsteer.models.transformer import embed
from jaxsteer.objectives import Needs
from jaxsteer.personas import Direction, Item, Persona, search_conversations
from jaxsteer.prompt_search import Task, make_task
from jaxsteer.prompt_search.scoring import slot_rows
from jaxsteer.prompts import Placement, Slots, build_slots, first_allowed, prompt_text, random_rows, retokenises_many
from jaxsteer.statistics import spearman

if TYPE_CHECKING:
    from jaxsteer.models.model import Model

PASSES = 0.8
"""Rank correlation from which a site counts as reading the behaviour."""
WARNS = 0.5
"""Below this an objective hardly ranks prompts, and a search on it finds little."""
ROWS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeRow(Record):
    """One site and read position. The objective is ``sign * <r, delta>``; the other sign has minus the correlation."""

    site: str
    read_position: str
    sign: int
    correlation: float
    """Spearman correlation of the signed objective with the shift away from the persona; never negative."""
    layer: int
    """Blocks run before the site."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shift(Record):
    """How far prompts move the mean probability of the persona's answer: zero-shot minus with the prompt."""

    min: float
    max: float
    sd: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(Record):
    """What a probe measured, by correlation, the largest first."""

    rows: tuple[ProbeRow, ...]
    prompts: int
    """Random prompts."""
    baseline_probability: float
    """Mean zero-shot probability of the persona's answer."""
    shift: Shift
    """Over the prompts."""


def stream_sites(n_layers: int) -> list[str]:
    """The residual stream after every block."""
    return [resid_site(layer) for layer in range(n_layers)]


def blocks_before(site: str, n_layers: int) -> int:
    """Blocks that run before a site of the residual stream. Raises ``UserError`` for other places."""
    parsed = parse_site(site, n_layers)
    if parsed.kind not in ("hook_resid_pre", "hook_resid_post"):
        raise UserError(
            f"an objective reads the residual stream between blocks, but {site!r} lies elsewhere: give "
            f"{resid_site(parsed.layer)!r} or another blocks.<layer>.hook_resid_post of the {n_layers} layers"
        )
    return parsed.as_stream().depth(n_layers)


def cue_words(persona: Persona) -> list[str]:
    """The distinct words of a persona's cue sentences, in order of appearance."""
    sentences = " ".join((*persona.counter_cues, *persona.pro_cues))
    return list(dict.fromkeys(word.lower() for word in re.findall(r"[^\W\d_]{2,}", sentences)))


def probe_prompts(
    tokenizer: Any, slots: Slots, allowed: Bool[np.ndarray, " V"], words: Sequence[str], *, n: int, seed: int
) -> Int[np.ndarray, "M S"]:
    """About ``n`` prompts of random allowed tokens with 0, 1 or 2 of ``words`` written over them, all different.

    Prompts that do not re-tokenise in place are left out; M is smaller than ``n`` where many do not.
    """
    rng = np.random.default_rng(seed)
    first = first_allowed(tokenizer, slots, allowed)
    spelt = [np.asarray(tokenizer(" " + word, add_special_tokens=False)["input_ids"], np.int32) for word in words]
    spelt = [word for word in spelt if 0 < len(word) < slots.length]
    rows: dict[tuple[int, ...], None] = {}
    for _ in range(4):
        drawn = random_rows(rng, allowed, n, slots.length, first)
        for i, row in enumerate(drawn):
            for _ in range(i % 3 if spelt else 0):
                word = spelt[rng.integers(len(spelt))]
                at = rng.integers(slots.length - len(word) + 1)
                row[at : at + len(word)] = word
        for row in drawn[retokenises_many(tokenizer, slots, drawn)]:
            rows[tuple(int(t) for t in row)] = None
        if len(rows) >= n:
            break
    if len(rows) < 8:
        raise UserError(
            f"only {len(rows)} of {4 * n} random prompts of {slots.length} tokens keep their tokens when they are read "
            "as text: restrict the tokens to whole words (--tokens words)"
        )
    return np.asarray(list(rows)[:n], np.int32)


@functools.partial(jax.jit, static_argnames=("depth", "batch"))
def _project(
    params: Params, task: Task, deltas: Float[Array, "L1 D"], ids: Int[Array, "M S"], *, depth: int, batch: int
) -> Float[Array, "L1 M"]:
    """``<r[read], delta>`` averaged over contexts after 0, 1, … ``depth`` blocks, for all prompts."""
    config, contexts = task.config, task.contexts

    def project(x: Array, delta: Array) -> Array:
        read = jnp.repeat(task.read_index, batch)[:, None, None]
        r = jnp.take_along_axis(x, read, axis=1)[:, 0].astype(jnp.float32)
        return (r @ delta).reshape(contexts, batch).mean(0)

    def one_batch(ids: Int[Array, "b S"]) -> Float[Array, "L1 b"]:
        x, context = slot_rows(params, task, embed(params, config, ids))
        keep = Keep(("hook_resid_post",), project)
        _, [found] = scan_blocks(params, config, x, context, 0, depth, per_layer=deltas[1:], keep=[keep])
        return jnp.concatenate([project(x, deltas[0])[None], found])

    m = ids.shape[0]
    padded = jnp.pad(ids, ((0, -m % batch), (0, 0)), mode="edge").reshape(-1, batch, ids.shape[1])
    return jnp.moveaxis(lax.map(one_batch, padded), 0, 1).reshape(depth + 1, -1)[:, :m]


def project(
    params: Params, config: ModelConfig, slots: Slots, direction: Direction, ids: Int[np.ndarray, "M S"]
) -> dict[str, Float[np.ndarray, " M"]]:
    """Per site of ``direction``, the objective of every prompt: ``<r[read], delta>`` averaged over the contexts.

    All sites come from one pass over the model.
    """
    stops = {site: blocks_before(site, config.n_layers) for site in direction.sites}
    depth = max(stops.values())
    task = make_task(
        params,
        config,
        slots,
        needs=Needs(sites=tuple(sorted(stops))),
        allowed=np.ones(config.vocab_size, bool),
    )
    deltas = np.zeros((depth + 1, config.d_model), np.float32)
    for site, stop in stops.items():
        deltas[stop] = direction.delta[site]
    batch = max(1, min(len(ids), ROWS // task.contexts))
    found = np.asarray(_project(params, task, jnp.asarray(deltas), jnp.asarray(ids), depth=depth, batch=batch))
    return {site: found[stop] for site, stop in stops.items()}


Scorer = Callable[[Slots, Int[np.ndarray, "M S"]], Mapping[str, Float[np.ndarray, " M"]]]
"""The objective of prompts in given contexts, by the name of the site (or whatever else tells objectives apart)."""


def scorer(model: Model, direction: Direction) -> Scorer:
    """The projection objectives of a direction, one per site."""
    return lambda slots, ids: project(model.params, model.config, slots, direction, ids)


def probe(
    model: Model,
    persona: Persona,
    items: Sequence[Item],
    scorers: Mapping[str, Scorer],
    *,
    allowed: Bool[np.ndarray, " V"],
    length: int,
    placement: Placement = Placement(),
    n: int = 240,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Probe:
    """Rank correlation of objective and behaviour for every read position and every site that its scorer names.

    ``items`` are validation questions (asked in both choice orders); ``n`` random prompts of ``length`` allowed tokens
    are made with the persona's cue words mixed in, so that behaviour varies. Raises ``UserError`` when no prompt
    changes behaviour at all or nothing can be tokenised.
    """
    slots = {}
    for position in scorers:
        conversations = search_conversations(items, position, placement=placement)
        slots[position] = build_slots(
            model.tokenizer,
            [c for c, _ in conversations],
            length,
            read=[r for _, r in conversations],  # type: ignore[misc]
            max_positions=model.config.max_positions,
        )
    reference = slots["decision"] if "decision" in slots else next(iter(slots.values()))
    ids = probe_prompts(model.tokenizer, reference, allowed, cue_words(persona), n=n, seed=seed)
    texts = [prompt_text(model.tokenizer, row) for row in ids]
    results = choice_eval(model, items, ["", *texts], placement=placement, progress=progress)
    probability = np.asarray([result.probability.mean() for result in results])
    shift = probability[0] - probability[1:]
    rows = []
    for position, score in scorers.items():
        for site, f in score(slots[position], ids).items():
            correlation = spearman(f, shift)
            rows.append(
                ProbeRow(
                    site=site,
                    read_position=position,
                    sign=-1 if correlation < 0 else 1,
                    correlation=abs(correlation),
                    layer=blocks_before(site, model.config.n_layers) if site.startswith("blocks.") else 0,
                )
            )
    rows.sort(key=lambda row: (-row.correlation, row.layer))
    spread = Shift(min=float(shift.min()), max=float(shift.max()), sd=float(shift.std()))
    return Probe(rows=tuple(rows), prompts=len(texts), baseline_probability=float(probability[0]), shift=spread)


def choose(rows: Sequence[ProbeRow], *, passes: float = PASSES) -> ProbeRow:
    """The earliest site that passes, because later sites invite over-optimisation; the best where none passes."""
    passing = [row for row in rows if row.correlation >= passes]
    if passing:
        return min(passing, key=lambda row: (row.layer, -row.correlation))
    return max(rows, key=lambda row: (row.correlation, -row.layer))
