"""What a search raises: an objective from a direction, from SAE latents or a user's own, and the probe's word on it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

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
from jaxsteer.study.options import ObjectiveOptions
from jaxsteer.study.probe import WARNS, Probe, ProbeRow, Scorer, blocks_before, choose, probe, scorer, stream_sites
from jaxsteer.study.probing import DIRECTION_ITEMS, PROBE_ITEMS
from jaxsteer.study.setting import PersonaSetting, Setting, context_items

log = logging.getLogger(__name__)

PROBE_PROMPTS = 240
"""Random prompts of the probe."""

RANDOM = "random:"
"""What ``--direction`` begins with for a random one."""

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenObjective:
    """The objective of a search, larger being farther from the persona, and where it came from."""

    objective: Objective
    row: ProbeRow
    """Of the probe: site, sign and correlation of the objective."""
    probe: Probe
    direction: Direction | None = None
    signature: Signature | None = None
    """With the weights that the objective has: turned where the probe turned the sign."""


def choose_objective(
    setting: PersonaSetting, options: ObjectiveOptions, *, seed: int, say: Say = log.info
) -> ChosenObjective:
    """Make the direction or the signature from train questions, and let the probe choose site and sign.

    ``seed`` is that of the probe's random prompts.
    """
    return choose_objectives(setting, options, [options.site], seed=seed, say=say)[0]


def choose_objectives(
    setting: PersonaSetting, options: ObjectiveOptions, sites: Sequence[str], *, seed: int, say: Say
) -> list[ChosenObjective]:
    """``choose_objective`` at several sites, from one direction and one probe."""
    if setting.named is not None:
        found = [_named(setting, setting.named.name, seed)] * len(sites)
    elif setting.sae is not None:
        found = [_saega(setting, options, setting.sae, seed, say)] * len(sites)
    else:
        found = _resga(setting, options, sites, seed, say)
    for chosen in {one.row.site: one.row for one in found}.values():
        say(
            f"Probe: objective and behaviour rank {found[0].probe.prompts} random prompts alike to "
            f"{chosen.correlation:.2f} at {chosen.site}{' (sign turned)' if chosen.sign < 0 else ''}"
        )
        if chosen.correlation < WARNS:
            log.warning(
                "at %s (%s) the objective hardly ranks prompts by behaviour (rank correlation %.2f, below %.1f); "
                "what the search finds may not change it. `jaxsteer direction probe` compares sites and positions",
                chosen.site, setting.read_position, chosen.correlation, WARNS,
            )  # fmt: skip
    return found


def check_site(site: str, model: Model) -> None:
    """Raise ``UserError`` for a ``--site`` beyond the last layer or off the residual stream."""
    if site != "auto":
        blocks_before(site, model.config.n_layers)


def try_objective(setting: Setting) -> None:
    """Try an objective that was asked for by name on a few prompts (``check_objective``), before anything is written.

    Raises ``UserError`` when it is not finite or scores rows by their company.
    """
    if setting.named is not None:
        objective, slots = setting.named_in(setting.slots)
        check_objective(setting.model.params, task_of(setting, objective, slots), objective)


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


def _pairs(setting: PersonaSetting) -> Pairs:
    items = context_items(setting.splits.train, DIRECTION_ITEMS)
    return contrast_pairs(
        setting.model,
        setting.persona,
        items,
        setting.read_position,
        split_seed=setting.splits.seed,
        placement=setting.placement,
    )


def _probe(setting: PersonaSetting, judge: Scorer, seed: int) -> Probe:
    return probe(
        setting.model,
        setting.persona,
        context_items(setting.splits.validation, PROBE_ITEMS),
        {setting.read_position: judge},
        allowed=setting.allowed,
        length=setting.slots.length,
        n=PROBE_PROMPTS,
        seed=seed,
        placement=setting.placement,
    )


def _resga(
    setting: PersonaSetting, options: ObjectiveOptions, sites: Sequence[str], seed: int, say: Say
) -> list[ChosenObjective]:
    model = setting.model
    named = [site if site == "auto" else parse_site(site, model.config.n_layers).name for site in sites]
    direction = _direction(setting, options.direction, [site for site in named if site != "auto"], say)
    table = _probe(setting, scorer(model, direction), seed)
    found = []
    for site in named:
        chosen = choose(table.rows) if site == "auto" else _as_defined(table, site)
        delta = jnp.asarray(chosen.sign * direction.delta[chosen.site])
        objective = Projection(delta=delta, site=chosen.site, norm=options.objective_norm)
        found.append(ChosenObjective(objective=objective, row=chosen, probe=table, direction=direction))
    return found


def _direction(setting: PersonaSetting, wanted: str | None, sites: Sequence[str], say: Say) -> Direction:
    """The direction that was asked for, at these sites at least."""
    model = setting.model
    if wanted is not None and not wanted.startswith(RANDOM):
        direction = direction_of_file(model, wanted, sites)
        say(f"Direction: {wanted}, read at {setting.read_position}")
        return direction
    pairs = _pairs(setting)
    direction = mean_difference(model, pairs, list(dict.fromkeys([*stream_sites(model.config.n_layers), *sites])))
    if wanted is None:
        say(f"Direction: difference of means over {len(pairs)} pairs of texts, read at {setting.read_position}")
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


def direction_of_file(model: Model, file: str, sites: Sequence[str]) -> Direction:
    """What ``--direction FILE`` holds. Raises ``UserError`` unless it is this model's and has all ``sites``."""
    direction = load_direction(user_path(file))
    check_direction(direction, model)
    if missing := sorted(set(sites) - set(direction.sites)):
        raise UserError(f"--direction {file} has no {missing[0]}: it has {', '.join(direction.sites)}")
    return direction


def _saega(setting: PersonaSetting, options: ObjectiveOptions, sae: SAE, seed: int, say: Say) -> ChosenObjective:
    pairs = _pairs(setting)
    signature = sae_signature(setting.model, sae, pairs, latents=options.latents)
    say(
        f"Signature: {len(signature.indices)} of {sae.n_latents} latents, by their means over {len(pairs)} pairs of "
        f"texts, read at {setting.read_position}; {signature.l0_bad:.1f} latents are active there"
    )
    raw = latents_objective(sae, signature.indices, signature.weights, signature.site)
    table = _probe(setting, _judge(setting, lambda slots: (raw, slots), signature.site), seed)
    chosen = choose(table.rows)
    signature = dataclasses.replace(signature, weights=chosen.sign * signature.weights)
    return ChosenObjective(
        objective=latents_objective(
            sae, signature.indices, signature.weights, signature.site, surrogate=options.surrogate
        ),
        row=chosen,
        probe=table,
        signature=signature,
    )


def _named(setting: PersonaSetting, name: str, seed: int) -> ChosenObjective:
    objective, _ = setting.named_in(setting.slots)
    table = _probe(setting, _judge(setting, setting.named_in, name), seed)
    return ChosenObjective(objective=objective, row=_as_defined(table, name), probe=table)


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
