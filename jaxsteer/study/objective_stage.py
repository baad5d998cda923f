"""What a search raises: an objective from a direction, from SAE latents or a user's own, and the probe's word on it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files.paths import user_path
from jaxsteer.models.model import Model
from jaxsteer.models.sites import parse_site
from jaxsteer.objectives import Objective, Projection, as_pytree, needs
from jaxsteer.personas import (
    Direction,
    Pairs,
    Persona,
    Signature,
    check_cues,
    check_direction,
    contrast_pairs,
    diagnose,
    load_direction,
    mean_difference,
    sae_signature,
)
from jaxsteer.processes import to_host
from jaxsteer.prompt_search import Combination, Task, TokenMask, check_objective, make_task, score
from jaxsteer.prompts import Slots, first_allowed
from jaxsteer.runs.bars import progress_bar
from jaxsteer.sae import SAE, latents_objective
from jaxsteer.study.options import RANDOM, ObjectiveOptions, RunOptions
from jaxsteer.study.probe import (
    ROUNDS,
    WARNS,
    Extent,
    Probe,
    ProbeRow,
    Scorer,
    blocks_before,
    choose,
    probe,
    rows_per_prompt,
    scorer,
    stream_sites,
)
from jaxsteer.study.probing import DIRECTION_ITEMS, PROBE_ITEMS
from jaxsteer.study.setting import PersonaSetting, Setting, context_items

DIAGNOSED = 12
"""Validation questions that say what a direction is worth (``personas.diagnose``)."""

log = logging.getLogger(__name__)


Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenObjective:
    """The objective of a search, larger being farther from the persona, and where it came from."""

    objective: Objective
    row: ProbeRow
    """Of the probe: site, sign and correlation of the objective."""
    probe: Probe | None
    """``None`` where it was left out: the sign is as given, and the correlation NaN."""
    direction: Direction | None = None
    signature: Signature | None = None
    """With the weights that the objective has: turned where the probe turned the sign."""


def choose_objective(
    setting: PersonaSetting,
    options: ObjectiveOptions,
    *,
    seed: int,
    say: Say = log.info,
    run: RunOptions | None = None,
    budget: int | None = None,
) -> ChosenObjective:
    """Make the direction or the signature from train questions, and let the probe choose site and sign.

    ``seed`` is that of the probe's random prompts. What it measures is kept in the directory of ``run``. With
    ``--probe auto`` it ends when it knows enough, and after its first round takes no more rows than ``budget``, those
    that the search will score.
    """
    sites = [options.site]
    return choose_objectives(setting, options, sites, seed=seed, say=say, run=run, budget=budget)[0]


def choose_objectives(
    setting: PersonaSetting,
    options: ObjectiveOptions,
    sites: Sequence[str],
    *,
    seed: int,
    say: Say,
    run: RunOptions | None = None,
    budget: int | None = None,
) -> list[ChosenObjective]:
    """``choose_objective`` at several sites, from one direction and one probe."""
    extent = Extent(seed=seed, say=say, quiet=run is None or run.quiet, folder=None if run is None else Path(run.out))
    if isinstance(options.probe, int):
        extent = dataclasses.replace(extent, prompts=options.probe)
    elif budget is not None:
        # A row for behaviour, and about one for the objective.
        most = budget // (2 * rows_per_prompt(context_items(setting.splits.validation, PROBE_ITEMS)))
        extent = dataclasses.replace(extent, prompts=max([ROUNDS[0], *(n for n in ROUNDS if n <= most)]))
    if setting.named is not None:
        found = [_named(setting, options, setting.named.name, extent)] * len(sites)
    elif setting.sae is not None:
        found = [_saega(setting, options, setting.sae, extent)] * len(sites)
    else:
        found = _resga(setting, options, sites, extent)
    for chosen in {one.row.site: one for one in found}.values():
        _tell(setting, chosen, say)
    return found


def _tell(setting: PersonaSetting, objective: ChosenObjective, say: Say) -> None:
    """What the probe said of an objective, and a warning where it is little."""
    chosen, table = objective.row, objective.probe
    if table is None:
        say(f"Probe: none (--probe off). Whether the objective at {chosen.site} ranks prompts by behaviour is unknown")
    else:
        low, high = chosen.ci95 or (-1, 1)
        say(
            f"Probe: objective and behaviour rank {table.prompts} random prompts alike to {chosen.correlation:.2f} "
            f"(95 % interval {low:.2f} to {high:.2f}) at {chosen.site}{' (sign turned)' if chosen.sign < 0 else ''}"
        )
        if chosen.correlation < WARNS:
            log.warning(
                "at %s (%s) the objective hardly ranks prompts by behaviour (rank correlation %.2f, below %.1f); "
                "what the search finds may not change it. `jaxsteer direction probe` compares sites and positions",
                chosen.site, setting.read_position, chosen.correlation, WARNS,
            )  # fmt: skip


def require_cues(persona: Persona, read_position: str, options: ObjectiveOptions) -> None:
    """Raise ``UserError`` where the objective is made of sentences that the persona lacks."""
    named = options.objective or options.target
    if not named and (options.direction is None or options.direction.startswith(RANDOM)):
        check_cues(persona, read_position)


def try_objective(setting: PersonaSetting, options: ObjectiveOptions) -> None:
    """Refuse an objective that cannot be made, before anything is written.

    One that was asked for by name is tried on a few prompts (``check_objective``). Raises ``UserError`` when it is not
    finite or scores rows by their company, for a ``--site`` beyond the last layer or off the residual stream, a
    ``--direction`` whose file does not fit, and a persona without the sentences that its direction is made of.
    """
    layers = setting.model.config.n_layers
    if setting.named is not None:
        objective, slots = setting.named_in(setting.slots)
        check_objective(setting.model.params, task_of(setting, objective, slots), objective)
        return
    if options.site != "auto":
        blocks_before(options.site, layers)
    require_cues(setting.persona, setting.read_position, options)
    if options.direction is not None and not options.direction.startswith(RANDOM):
        sites = [] if options.site == "auto" else [parse_site(options.site, layers).name]
        direction_of_file(setting.model, options.direction, sites)


def task_of(setting: Setting, objective: Objective, slots: Slots | None = None) -> Task:
    """The task of searching for ``objective`` in the setting's contexts (or in others of the same length)."""
    slots = slots or setting.slots
    return make_task(
        setting.model.params,
        setting.model.config,
        slots,
        needs=needs(objective, setting.model.config),
        allowed=TokenMask(setting.allowed, first_allowed(setting.model.tokenizer, slots, setting.allowed)),
        batch=setting.scoring.batch,
        combine=setting.scoring.combination,
        least=setting.least,
    )


def _pairs(setting: PersonaSetting, *, held_out: bool = False) -> Pairs:
    """What directions are read from, or a few pairs that say what they are worth."""
    part, most = (setting.splits.validation, DIAGNOSED) if held_out else (setting.splits.train, DIRECTION_ITEMS)
    return contrast_pairs(
        setting.model,
        setting.persona,
        context_items(part, most),
        setting.read_position,
        split_seed=setting.splits.seed,
        placement=setting.placement,
    )


def _probe(
    setting: PersonaSetting,
    options: ObjectiveOptions,
    judge: Scorer,
    extent: Extent,
    searched: Callable[[Sequence[ProbeRow]], Sequence[ProbeRow]],
) -> tuple[Probe | None, Sequence[ProbeRow]]:
    """The probe that ``options`` ask for, and of its rows those that will be ``searched``, which must be known."""
    if options.probe == "off":
        return None, ()
    if options.probe == "auto":
        extent = dataclasses.replace(extent, enough=lambda rows: all(row.known for row in searched(rows)))
    table = probe(
        setting.model,
        setting.persona,
        context_items(setting.splits.validation, PROBE_ITEMS),
        {setting.read_position: judge},
        allowed=setting.allowed,
        length=setting.slots.length,
        placement=setting.placement,
        extent=extent,
    )
    return table, searched(table.rows)


def _unprobed(setting: PersonaSetting, site: str) -> ProbeRow:
    """The row of a site that nothing is known about."""
    layer = blocks_before(site, setting.model.config.n_layers) if site.startswith("blocks.") else 0
    return ProbeRow(site=site, read_position=setting.read_position, sign=1, correlation=math.nan, layer=layer)


def _resga(
    setting: PersonaSetting, options: ObjectiveOptions, sites: Sequence[str], extent: Extent
) -> list[ChosenObjective]:
    model = setting.model
    named = [site if site == "auto" else parse_site(site, model.config.n_layers).name for site in sites]
    direction = _direction(setting, options.direction, [site for site in named if site != "auto"], extent)

    def searched(rows: Sequence[ProbeRow]) -> list[ProbeRow]:
        return [choose(rows) if site == "auto" else _as_defined(rows, site) for site in named]

    goal = setting.persona.sign
    table, rows = _probe(setting, options, scorer(model, direction, goal), extent, searched)
    found = []
    for chosen in rows or [_unprobed(setting, site) for site in named]:
        delta = jnp.asarray(chosen.sign * goal * direction.delta[chosen.site])
        objective = Projection(delta=delta, site=chosen.site, norm=options.objective_norm)
        found.append(ChosenObjective(objective=objective, row=chosen, probe=table, direction=direction))
    return found


def _direction(setting: PersonaSetting, wanted: str | None, sites: Sequence[str], extent: Extent) -> Direction:
    """The direction that was asked for, at these sites at least."""
    model, say = setting.model, extent.say
    if wanted is not None and not wanted.startswith(RANDOM):
        direction = direction_of_file(model, wanted, sites)
        say(f"Direction: {wanted}, read at {setting.read_position}")
        return direction
    pairs = _pairs(setting)
    every = list(dict.fromkeys([*stream_sites(model.config.n_layers), *sites]))
    with progress_bar("direction", unit="text", quiet=extent.quiet) as advance:
        direction = mean_difference(model, pairs, every, progress=advance)
    if wanted is None:
        say(f"Direction: difference of means over {len(pairs)} pairs of texts, read at {setting.read_position}")
        return diagnose(model, direction, _pairs(setting, held_out=True))
    say(f"Direction: {wanted}, as long as the difference of means over {len(pairs)} pairs of texts")
    rng = np.random.default_rng(int(wanted.removeprefix(RANDOM)))
    draws = {site: rng.normal(size=delta.shape) for site, delta in direction.delta.items()}
    delta = {
        site: (draw * (np.linalg.norm(direction.delta[site]) / np.linalg.norm(draw))).astype(np.float32)
        for site, draw in draws.items()
    }
    return dataclasses.replace(
        direction, delta=delta, metadata={**direction.metadata, "estimator": wanted}, diagnostics={}
    )


def direction_of_file(model: Model, file: str, sites: Sequence[str]) -> Direction:
    """What ``--direction FILE`` holds. Raises ``UserError`` unless it is this model's and has all ``sites``."""
    direction = load_direction(user_path(file))
    check_direction(direction, model)
    if missing := sorted(set(sites) - set(direction.sites)):
        raise UserError(f"--direction {file} has no {missing[0]}: it has {', '.join(direction.sites)}")
    return direction


def _saega(setting: PersonaSetting, options: ObjectiveOptions, sae: SAE, extent: Extent) -> ChosenObjective:
    pairs = _pairs(setting)
    with progress_bar("signature", quiet=extent.quiet):
        signature = sae_signature(setting.model, sae, pairs, latents=options.latents)
    extent.say(
        f"Signature: {len(signature.indices)} of {sae.n_latents} latents, by their means over {len(pairs)} pairs of "
        f"texts, read at {setting.read_position}; {signature.l0_bad:.1f} latents are active there"
    )
    signature = dataclasses.replace(signature, weights=setting.persona.sign * signature.weights)
    raw = latents_objective(sae, signature.indices, signature.weights, signature.site)
    judge = _judge(setting, lambda slots: (raw, slots), signature.site)
    table, rows = _probe(setting, options, judge, extent, lambda rows: [choose(rows)])
    chosen = rows[0] if rows else _unprobed(setting, signature.site)
    signature = dataclasses.replace(signature, weights=chosen.sign * signature.weights)
    return ChosenObjective(
        objective=latents_objective(
            sae, signature.indices, signature.weights, signature.site, surrogate=options.surrogate
        ),
        row=chosen,
        probe=table,
        signature=signature,
    )


def _named(setting: PersonaSetting, options: ObjectiveOptions, name: str, extent: Extent) -> ChosenObjective:
    objective, _ = setting.named_in(setting.slots)
    judge = _judge(setting, setting.named_in, name)
    table, rows = _probe(setting, options, judge, extent, lambda rows: [_as_defined(rows, name)])
    return ChosenObjective(objective=objective, row=rows[0] if rows else _unprobed(setting, name), probe=table)


def _as_defined(rows: Sequence[ProbeRow], site: str) -> ProbeRow:
    """The row of a site that was asked for, with its sign as it is."""
    row = next(row for row in rows if row.site == site)
    low, high = sorted(row.sign * end for end in row.ci95 or (-1.0, 1.0))
    return dataclasses.replace(row, sign=1, correlation=row.sign * row.correlation, ci95=(low, high))


def _judge(setting: Setting, place: Callable[[Slots], tuple[Objective, Slots]], name: str) -> Scorer:
    """The scorer of one objective, made for the contexts that it meets, under ``name``."""

    def judge(slots: Slots) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        objective, slots = place(slots)
        task = task_of(setting, objective, slots)
        task = dataclasses.replace(task, combine=Combination())  # as behaviour is averaged
        scored = jax.jit(score)
        return lambda ids: {name: to_host(scored(setting.model.params, task, as_pytree(objective), ids)[0])}

    return judge
