"""Which tokens of a finished run's prompt carry its effect, measured afterwards and kept in its metrics.json."""

from __future__ import annotations

from pathlib import Path

from jaxsteer.errors import UserError
from jaxsteer.evals.attribution import Attribution, attribute
from jaxsteer.files import read_json
from jaxsteer.models.model import Model
from jaxsteer.personas import Persona, load_persona, split
from jaxsteer.prompts import Placement
from jaxsteer.runs import files
from jaxsteer.runs.bars import load, progress_bar
from jaxsteer.study.results import SearchRun
from jaxsteer.study.setting import context_items, token_mask

QUESTIONS = 24
"""Validation questions, each in both choice orders."""


def _persona(run_dir: Path, name: str) -> Persona:
    """The run's persona, with the replies that its model wrote where it is in words."""
    kept = run_dir / files.PERSONA
    return load_persona(kept if kept.is_file() else name)


def attribute_run(run_dir: Path, *, model: Model | None = None) -> Attribution:
    """Attribute the selected prompt of a finished run on validation questions, and add it to the run's metrics.

    Raises ``UserError`` when there is no finished run or no selected prompt.
    """
    try:
        config, metrics = (read_json(run_dir / name) for name in (files.CONFIG, files.METRICS))
        best = SearchRun.from_json(metrics, str(run_dir / files.METRICS)).best
        if best is None:
            raise UserError("it selected no prompt")
        if config.get("conversations"):
            raise UserError("it searched conversations of no persona, so that there is no behaviour to attribute")
        placement = Placement(style=config["style"], slot=config["slot"])
        persona, seed, tokens = _persona(run_dir, config["persona"]), config["split_seed"], config["tokens"]
    except (UserError, KeyError) as error:
        raise UserError(
            f"{run_dir} holds no finished search with a prompt to attribute ({error}): give the directory of one"
        ) from error
    model = load(config["model"], dtype=config["dtype"]) if model is None else model
    items = context_items(split(persona, seed=seed).validation, QUESTIONS)
    allowed = token_mask(model, tokens)
    with progress_bar("attribution", unit="row") as advance:
        found = attribute(model, items, best.ids, allowed=allowed, placement=placement, progress=advance)
    files.write_json(run_dir / files.METRICS, {**metrics, "attribution": found.to_json()})
    return found
