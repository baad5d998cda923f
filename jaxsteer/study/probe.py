"""Does an objective rank prompts as behaviour does? Measured before a search, with random prompts.

For every site and read position: Spearman correlation, over a few hundred random probe prompts, between the objective
``mean over contexts of <r[read], delta>`` and the shift of behaviour away from the persona on held-out questions.
Letters: C contexts, M probe prompts, S prompt length, T row, L layers, D width.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxsteer.errors import UserError
from jaxsteer.evals import choice
from jaxsteer.evals.choice import choice_eval
from jaxsteer.files import make_directory, read_json
from jaxsteer.files.records import Record
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.layers import Keep, scan_blocks
from jaxsteer.models.padding import bucket
from jaxsteer.models.params import Params
from jaxsteer.models.sites import parse_site, resid_site
from jaxsteer.models.transformer import embed_tokens
from jaxsteer.objectives import Needs
from jaxsteer.personas import Direction, Item, Persona, search_conversations
from jaxsteer.processes import from_first
from jaxsteer.prompt_search import Task, make_task
from jaxsteer.prompt_search.scoring import slot_rows
from jaxsteer.prompts import Placement, Slots, build_slots, first_allowed, prompt_text, random_rows, retokenises_many
from jaxsteer.ranges import Interval
from jaxsteer.runs import files
from jaxsteer.runs.bars import progress_bar
from jaxsteer.statistics import spearman, spearman_interval

if TYPE_CHECKING:
    from jaxsteer.models.model import Model

PASSES = 0.8
"""Rank correlation from which a site counts as reading the behaviour."""
WARNS = 0.5
"""Below this an objective hardly ranks prompts, and a search on it finds little."""
NARROW = 0.1
"""Width of the interval of a rank correlation that is known well enough, wherever it lies."""
PROMPTS = 240
"""Random prompts of a probe, at most or exactly."""
ROUNDS = (31, 63, 127, PROMPTS)
"""Random prompts after each round: with the empty prompt before them, 32, 64 and 128 texts, which are whole passes."""
ROWS = 1024

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeRow(Record):
    """One site and read position. The objective is ``sign * <r, delta>``; the other sign has minus the correlation."""

    site: str
    read_position: str
    sign: int
    correlation: float
    """Spearman correlation of the signed objective with the shift that is wanted of the persona; never negative."""
    layer: int
    """Blocks run before the site."""
    ci95: Interval | None = None
    """95 % interval of the correlation over prompts (``statistics.spearman_interval``)."""

    @property
    def known(self) -> bool:
        """Whether more prompts are not needed: the interval is narrow, or lies above ``PASSES`` or below ``WARNS``."""
        low, high = self.ci95 or (-1.0, 1.0)
        return high - low < NARROW or low >= PASSES or high < WARNS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shift(Record):
    """How far prompts move the mean probability of the persona's answer, as the goal wants it."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """How much a probe measures, and how it goes about it."""

    prompts: int = PROMPTS
    """Random prompts, at most. Fewer are the first of more, up to 240."""
    enough: Callable[[Sequence[ProbeRow]], bool] | None = None
    """Ends the probe after one of its ``ROUNDS`` whose rows are enough; without it all prompts are measured."""
    seed: int = 0
    """Of the random prompts."""
    folder: Path | None = None
    """Where behaviour that was measured is kept, and taken up again."""
    quiet: bool = False
    """No bar."""
    say: Callable[[str], None] = log.info
    """Gets a line about the time that the probe takes."""


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
        x, context = slot_rows(params, task, embed_tokens(params, config, ids))
        keep = Keep(("hook_resid_post",), project)
        _, [found] = scan_blocks(params, config, x, context, 0, depth, per_layer=deltas[1:], keep=[keep])
        return jnp.concatenate([project(x, deltas[0])[None], found])

    m = ids.shape[0]
    padded = jnp.pad(ids, ((0, -m % batch), (0, 0)), mode="edge").reshape(-1, batch, ids.shape[1])
    return jnp.moveaxis(lax.map(one_batch, padded), 0, 1).reshape(depth + 1, -1)[:, :m]


def projector(
    params: Params, config: ModelConfig, slots: Slots, direction: Direction
) -> Callable[[Int[np.ndarray, "M S"]], dict[str, Float[np.ndarray, " M"]]]:
    """A function from prompts to their objective per site of ``direction``: ``<r[read], delta>`` averaged over the
    contexts. All sites come from one pass over the model.
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

    def project(ids: Int[np.ndarray, "M S"]) -> dict[str, Float[np.ndarray, " M"]]:
        batch = max(1, min(len(ids), ROWS // task.contexts))
        found = np.asarray(_project(params, task, jnp.asarray(deltas), jnp.asarray(ids), depth=depth, batch=batch))
        return {site: found[stop] for site, stop in stops.items()}

    return project


Scorer = Callable[[Slots], Callable[[Int[np.ndarray, "M S"]], Mapping[str, Float[np.ndarray, " M"]]]]
"""For given contexts, a function from prompts to their objective, by the name of the site (or whatever else tells
objectives apart). It may be called with any number of prompts; a probe always calls it with the same."""


def scorer(model: Model, direction: Direction, sign: int = 1) -> Scorer:
    """The projection objectives of a direction, one per site; with ``sign`` -1 of the opposite one."""
    turned = dataclasses.replace(direction, delta={site: sign * delta for site, delta in direction.delta.items()})
    return lambda slots: projector(model.params, model.config, slots, turned)


def probe(
    model: Model,
    persona: Persona,
    items: Sequence[Item],
    scorers: Mapping[str, Scorer],
    *,
    allowed: Bool[np.ndarray, " V"],
    length: int,
    placement: Placement = Placement(),
    extent: Extent = Extent(),
) -> Probe:
    """Rank correlation of objective and behaviour for every read position and every site that its scorer names.

    ``items`` are validation questions (asked in both choice orders); random prompts of ``length`` allowed tokens are
    made with the persona's cue words mixed in, so that behaviour varies. They are measured in passes of 32 texts, the
    first of which begins with the empty one, so that a prompt's numbers do not depend on when the probe ends. Raises
    ``UserError`` when nothing can be tokenised.
    """
    with progress_bar("probe", unit="row", quiet=extent.quiet) as advance:
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
        n = max(extent.prompts, PROMPTS)
        ids = probe_prompts(model.tokenizer, reference, allowed, cue_words(persona), n=n, seed=extent.seed)
        ids = ids[: extent.prompts]
        behaviour = _Behaviour(
            model, items, ["", *(prompt_text(model.tokenizer, row) for row in ids)], placement, extent
        )
        objectives = {position: score(slots[position]) for position, score in scorers.items()}
        found: dict[tuple[str, str], list[float]] = {}
        told = False
        advance(0, behaviour.total)
        for begin in range(0, len(ids) + 1, behaviour.size):
            begun, new = time.perf_counter(), behaviour.measure(begin, advance)
            part = ids[max(0, begin - 1) : begin + behaviour.size - 1]
            padded = np.concatenate([part, part[-1:].repeat(behaviour.size - len(part), 0)])
            for position, objective in objectives.items():
                for site, f in objective(padded).items():
                    found.setdefault((position, site), []).extend(map(float, f[: len(part)]))
            done = max(0, begin - 1) + len(part)
            if new and not told and done < len(ids):
                told = True
                extent.say(behaviour.plan(begin, time.perf_counter() - begun, most=extent.enough is not None))
            if done == len(ids) or (extent.enough is not None and done in ROUNDS):
                shift = persona.sign * (behaviour.probability[0] - np.asarray(behaviour.probability[1 : 1 + done]))
                rows = _rows(found, shift, model.config.n_layers)
                if extent.enough is not None and extent.enough(rows):
                    break
    return Probe(
        rows=tuple(rows),
        prompts=done,
        baseline_probability=behaviour.probability[0],
        shift=Shift(min=float(shift.min()), max=float(shift.max()), sd=float(shift.std())),
    )


class _Behaviour:
    """Mean probability of the persona's answer under texts, measured pass by pass and kept in a file between them."""

    def __init__(
        self, model: Model, items: Sequence[Item], texts: Sequence[str], placement: Placement, extent: Extent
    ) -> None:
        self.model, self.items, self.texts, self.placement = model, items, texts, placement
        self.size = min(choice.PROMPTS, bucket(len(texts), 2))
        self.total = len(texts) * rows_per_prompt(items)
        what = [model.fingerprint, str(model.params.embed.dtype), placement, list(items), list(texts)]
        name = f"{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.json"
        self.file = None if extent.folder is None else extent.folder / files.PROBED / name
        self.probability: list[float] = []
        if self.file is not None and from_first(self.file.exists):
            self.probability = from_first(lambda: _measured(str(self.file)))
            extent.say(f"Probe: {len(self.probability) - 1} random prompts have been measured before")

    def measure(self, begin: int, advance: Callable[[int], None]) -> bool:
        """Measure ``size`` texts from number ``begin``, unless that is done; returns whether it was not."""
        if new := len(self.probability) <= begin:
            texts = list(self.texts[begin : begin + self.size])
            padded = texts + texts[-1:] * (self.size - len(texts))
            before = begin * rows_per_prompt(self.items)
            results = choice_eval(
                self.model,
                self.items,
                padded,
                placement=self.placement,
                progress=lambda done, _: advance(min(before + done, self.total)),
            )
            self.probability += [float(result.probability.mean()) for result in results[: len(texts)]]
            if self.file is not None:
                make_directory(self.file.parent)
                files.write_json(self.file, {"probability": self.probability})
        advance(min((begin + self.size) * rows_per_prompt(self.items), self.total))
        return new

    def plan(self, begin: int, seconds: float, *, most: bool) -> str:
        """What the rest of the probe takes, from what the pass from number ``begin`` took."""
        rest = seconds * (len(self.texts) - begin - self.size) / self.size
        limit, rows = "at most " if most else "", self.size * rows_per_prompt(self.items)
        return (
            f"Probe: {limit}{len(self.texts) - 1} random prompts on {len(self.items)} questions, {self.total:,} rows; "
            f"{rows:,} of them took {seconds:.0f} s, the others take {limit}about {rest:.0f} s"
        )


def _measured(file: str) -> list[float]:
    """The probabilities in a file. Raises ``UserError`` where it holds anything else."""
    found = read_json(file).get("probability")
    if not isinstance(found, list) or not all(type(p) in (int, float) and 0 <= p <= 1 for p in found) or not found:
        raise UserError(f"{file} is damaged: delete it, and the probabilities in it are measured again")
    return found


def rows_per_prompt(items: Sequence[Item]) -> int:
    """Rows that measure one prompt's behaviour: lettered questions are asked in both orders."""
    return len(items) * (2 if all(item.lettered for item in items) else 1)


def _rows(
    found: Mapping[tuple[str, str], Sequence[float]], shift: Float[np.ndarray, " M"], n_layers: int
) -> list[ProbeRow]:
    """The table of a probe, from the objective of every prompt by position and site."""
    rows = []
    for (position, site), f in found.items():
        correlation = spearman(np.asarray(f), shift)
        rows.append(
            ProbeRow(
                site=site,
                read_position=position,
                sign=-1 if correlation < 0 else 1,
                correlation=abs(correlation),
                layer=blocks_before(site, n_layers) if site.startswith("blocks.") else 0,
                ci95=spearman_interval(abs(correlation), len(shift)),
            )
        )
    return sorted(rows, key=lambda row: (-row.correlation, row.layer))


def choose(rows: Sequence[ProbeRow], *, passes: float = PASSES) -> ProbeRow:
    """The earliest site that passes, because later sites invite over-optimisation; the best where none passes."""
    passing = [row for row in rows if row.correlation >= passes]
    if passing:
        return min(passing, key=lambda row: (row.layer, -row.correlation))
    return max(rows, key=lambda row: (row.correlation, -row.layer))
