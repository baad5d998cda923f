"""``jaxsteer.search``: the command of that name as a function."""

from __future__ import annotations

from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.personas import Persona
from jaxsteer.runs.files import RunDir
from jaxsteer.study.dispatch import run
from jaxsteer.study.object_store import working_directory
from jaxsteer.study.options import SearchOptions
from jaxsteer.study.results import SearchRun
from jaxsteer.study.study_result import Study


def search(*, out: RunDir, model: str | Model = "organism:llama", **options: Any) -> SearchRun | Study:
    """Search prompts as ``jaxsteer search`` does, with its options as keyword arguments; returns what was found.

    ``out`` may be a URL (docs/pods.md), ``model`` one that is loaded already, and ``vary`` a dict:
    ``jaxsteer.search(out="runs/many", vary={"seed": range(32)})``. Raises ``UserError``.
    """
    if isinstance(options.get("persona"), Persona):
        raise UserError(
            "jaxsteer.search reads its persona from a file, which config.json names: keep it, "
            'jaxsteer.personas.save_persona(persona, "FILE.json"), and give persona="FILE.json"'
        )
    loaded = model if isinstance(model, Model) else None
    wanted = SearchOptions.of(out=out, model=model.name if isinstance(model, Model) else model, **options)
    with working_directory(out) as folder:
        return run(wanted.at(folder), model=loaded)
