"""``jaxsteer direction probe``: one probe over several read positions, with directions made for each."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.personas import Persona, check_cues, contrast_pairs, load_persona, mean_difference, split, with_replies
from jaxsteer.prompts import Placement
from jaxsteer.runs.bars import load, progress_bar
from jaxsteer.study.probe import Extent, Probe, Scorer, probe, scorer, stream_sites
from jaxsteer.study.setting import context_items, token_mask

log = logging.getLogger(__name__)

DIRECTION_ITEMS = 128
"""Train questions that make a direction, each in both choice orders."""
PROBE_ITEMS = 12
"""Validation questions on which a probe measures behaviour."""


def probe_positions(
    model: str | Model,
    persona: str | Persona,
    positions: Sequence[str],
    *,
    placement: Placement = Placement(),
    length: int = 8,
    tokens: str = "words",
    split_seed: int = 0,
    extent: Extent = Extent(),
) -> Probe:
    """Probe every read position of ``positions`` at every layer's residual stream.

    ``decision`` needs cue sentences and is left out, with a warning, for a persona that has none. Raises ``UserError``
    when nothing is left.
    """
    persona = load_persona(persona) if isinstance(persona, str) else persona
    if "decision" in positions and not (persona.counter_cues and persona.pro_cues) and len(positions) > 1:
        log.warning("read position 'decision' is left out: persona %s has no cue sentences", persona.name)
        positions = [position for position in positions if position != "decision"]
    if not positions:
        raise UserError("no read position to probe: give published, matched or decision")
    for position in positions:
        check_cues(persona, position)  # before a model writes replies
    model = load(model) if isinstance(model, str) else model
    with progress_bar("replies", unit="reply", quiet=extent.quiet) as advance:
        persona = with_replies(model, persona, progress=advance)
    splits = split(persona, seed=split_seed)
    allowed = token_mask(model, tokens)
    scorers: dict[str, Scorer] = {}
    for position in positions:
        items = context_items(splits.train, DIRECTION_ITEMS)
        pairs = contrast_pairs(model, persona, items, position, placement=placement, split_seed=split_seed)
        with progress_bar(f"direction, {position}", unit="text", quiet=extent.quiet) as advance:
            direction = mean_difference(model, pairs, stream_sites(model.config.n_layers), progress=advance)
        scorers[position] = scorer(model, direction, persona.sign)
    items = context_items(splits.validation, PROBE_ITEMS)
    return probe(model, persona, items, scorers, allowed=allowed, length=length, placement=placement, extent=extent)
