"""What a search raises: an objective from a direction, from SAE latents or a user's own, and the probe's word on it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.models.sites import parse_site
from jaxsteer.objectives import Objective, Projection, as_pytree, needs
from jaxsteer.personas import (
    Direction,
    Pairs,
    Signature,
    check_direction,
    contrast_pairs,
    load_direction,
    mean_difference,
    sae_signature,
)
from jaxsteer.processes import to_host
from jaxsteer.prompt_search import Combination, Task, TokenMask, check_objective, make_task, score
from jaxsteer.prompts import Slots, first_allowed
from jaxsteer.sae import SAE, latents_objective
from jaxsteer.study.probe import WARNS, Probe, ProbeRow, Scorer, choose, probe, scorer, stream_sites
from jaxsteer.study.probing import DIRECTION_ITEMS, PROBE_ITEMS
from jaxsteer.study.setting import Setting, context_items

log = logging.getLogger(__name__)

PROBE_PROMPTS = 240
"""Random prompts of the probe."""

RANDOM = "random:"
"""What ``--direction`` begins with for a random one."""

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aim:
    """The objective of a search, larger being farther from the persona, and where it came from."""

    objective: Objective
    chosen: ProbeRow
    """The row of the probe for the site and sign that the objective has."""
    table: Probe
    direction: Direction | None = None
    signature: Signature | None = None
    """With the weights that the objective has: turned where the probe turned the sign."""


def find_aim(setting: Setting, say: Say) -> Aim:
    """Make the direction or the signature from train questions, and let the probe choose site and sign."""
    return find_aims(setting, [setting.options.site], say)[0]


def find_aims(setting: Setting, sites: Sequence[str], say: Say) -> list[Aim]:
    """``find_aim`` at several sites, from one direction and one probe."""
    if setting.custom is not None:
        aims = [_custom(setting, setting.custom.name)] * len(sites)
    elif setting.sae is not None:
        aims = [_saega(setting, setting.sae, say)] * len(sites)
    else:
        aims = _resga(setting, sites, say)
    for chosen in {aim.chosen.site: aim.chosen for aim in aims}.values():
        say(
            f"Probe: objective and behaviour rank {len(aims[0].table.prompts)} random prompts alike to "
            f"{chosen.correlation:.2f} at {chosen.site}{' (sign turned)' if chosen.sign < 0 else ''}"
        )
        if chosen.correlation < WARNS:
            log.warning(
                "at %s (%s) the objective hardly ranks prompts by behaviour (rank correlation %.2f, below %.1f); "
                "what the search finds may not change it. `jaxsteer direction probe` compares sites and positions",
                chosen.site, setting.options.read_position, chosen.correlation, WARNS,
            )  # fmt: skip
    return aims


def try_objective(setting: Setting) -> None:
    """Try an objective that was asked for by name on a few prompts (``check_objective``), before anything is written.

    Raises ``UserError`` when it is not finite or scores rows by their company.
    """
    if setting.custom is not None:
        objective, slots = setting.placed(setting.slots)
        check_objective(setting.model.params, task_of(setting, objective, slots), objective)


def task_of(setting: Setting, objective: Objective, slots: Slots | None = None) -> Task:
    """The task of searching for ``objective`` in the setting's contexts (or in others of the same length)."""
    slots = slots or setting.slots
    options = setting.options
    return make_task(
        setting.model.params,
        setting.model.config,
        slots,
        needs=needs(objective, setting.model.config),
        allowed=TokenMask(setting.allowed, first_allowed(setting.model.tokenizer, slots, setting.allowed)),
        batch=options.batch,
        combine=options.combination,
        least=options.lengths[0] if options.lengths else None,
    )


def _pairs(setting: Setting) -> Pairs:
    options = setting.options
    items = context_items(setting.splits.train, DIRECTION_ITEMS)
    return contrast_pairs(
        setting.model,
        setting.persona,
        items,
        options.read_position,
        split_seed=options.split_seed,
        placement=setting.placement,
    )


def _probe(setting: Setting, judge: Scorer) -> Probe:
    return probe(
        setting.model,
        setting.persona,
        context_items(setting.splits.validation, PROBE_ITEMS),
        {setting.options.read_position: judge},
        allowed=setting.allowed,
        length=setting.slots.length,
        n=PROBE_PROMPTS,
        seed=setting.options.seed,
        placement=setting.placement,
    )


def _resga(setting: Setting, sites: Sequence[str], say: Say) -> list[Aim]:
    options, model = setting.options, setting.model
    named = [site if site == "auto" else parse_site(site, model.config.n_layers).name for site in sites]
    direction = _direction(setting, [site for site in named if site != "auto"], say)
    table = _probe(setting, scorer(model, direction))
    aims = []
    for site in named:
        chosen = choose(table.rows) if site == "auto" else _as_defined(table, site)
        delta = jnp.asarray(chosen.sign * direction.delta[chosen.site])
        objective = Projection(delta=delta, site=chosen.site, norm=options.objective_norm)
        aims.append(Aim(objective=objective, chosen=chosen, table=table, direction=direction))
    return aims


def _direction(setting: Setting, sites: Sequence[str], say: Say) -> Direction:
    """The direction that was asked for, at these sites at least."""
    model, wanted = setting.model, setting.options.direction
    if wanted is not None and not wanted.startswith(RANDOM):
        direction = load_direction(Path(wanted).expanduser())
        check_direction(direction, model)
        if missing := sorted(set(sites) - set(direction.sites)):
            raise UserError(f"--direction {wanted} has no {missing[0]}: it has {', '.join(direction.sites)}")
        say(f"Direction: {wanted}, read at {setting.options.read_position}")
        return direction
    pairs = _pairs(setting)
    direction = mean_difference(model, pairs, list(dict.fromkeys([*stream_sites(model.config.n_layers), *sites])))
    if wanted is None:
        say(f"Direction: difference of means over {len(pairs)} pairs of texts, read at {setting.options.read_position}")
        return direction
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


def _saega(setting: Setting, sae: SAE, say: Say) -> Aim:
    pairs = _pairs(setting)
    signature = sae_signature(setting.model, sae, pairs, latents=setting.options.latents)
    say(
        f"Signature: {len(signature.indices)} of {sae.n_latents} latents, by their means over {len(pairs)} pairs of "
        f"texts, read at {setting.options.read_position}; {signature.l0_bad:.1f} latents are active there"
    )
    raw = latents_objective(sae, signature.indices, signature.weights, signature.site)
    table = _probe(setting, _judge(setting, lambda slots: (raw, slots), signature.site))
    chosen = choose(table.rows)
    signature = dataclasses.replace(signature, weights=chosen.sign * signature.weights)
    return Aim(
        objective=latents_objective(
            sae, signature.indices, signature.weights, signature.site, surrogate=setting.options.surrogate
        ),
        chosen=chosen,
        table=table,
        signature=signature,
    )


def _custom(setting: Setting, name: str) -> Aim:
    objective, _ = setting.placed(setting.slots)
    table = _probe(setting, _judge(setting, setting.placed, name))
    return Aim(objective=objective, chosen=_as_defined(table, name), table=table)


def _as_defined(table: Probe, site: str) -> ProbeRow:
    """The row of a site that was asked for, with its sign as it is."""
    row = next(row for row in table.rows if row.site == site)
    return dataclasses.replace(row, sign=1, correlation=row.sign * row.correlation)


def _judge(setting: Setting, place: Callable[[Slots], tuple[Objective, Slots]], name: str) -> Scorer:
    """The scorer of one objective, made for the contexts that it meets, under ``name``."""

    def judge(slots: Slots, ids: np.ndarray) -> dict[str, np.ndarray]:
        objective, slots = place(slots)
        task = task_of(setting, objective, slots)
        task = dataclasses.replace(task, combine=Combination())  # as behaviour is averaged
        f, _ = jax.jit(score)(setting.model.params, task, as_pytree(objective), ids)
        return {name: to_host(f)}

    return judge
