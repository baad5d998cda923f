"""``jaxsteer.search``: the command of that name as a function."""

from __future__ import annotations

import hashlib
import inspect
import tempfile
from pathlib import Path
from typing import Any

from jaxsteer.checkpoints.loading import cache_dir
from jaxsteer.files import make_directory
from jaxsteer.models.model import Model
from jaxsteer.personas import Persona, save_persona
from jaxsteer.runs.files import RunDir
from jaxsteer.study.dispatch import run
from jaxsteer.study.object_store import working_directory
from jaxsteer.study.options import KINDS, OPTIONS, SearchOptions
from jaxsteer.study.results import SearchRun
from jaxsteer.study.study_result import Study


def search(model: str | Model = "organism:llama", *, out: RunDir | None = None, **options: Any) -> SearchRun | Study:
    """Search prompts as ``jaxsteer search`` does, with its options as keyword arguments; returns what was found.

    Without ``out`` it leaves no directory behind: ``found.save("runs/mine")`` writes it later. ``out`` may be a URL
    (docs/pods.md), ``model`` one that is loaded already, ``persona`` one too (it is then kept in the cache, under a
    name that its content decides, so that the run's config.json can name it), and ``vary`` a dict:
    ``jaxsteer.search(vary={"seed": range(32)})``. Raises ``UserError``.
    """
    loaded = model if isinstance(model, Model) else None
    name = model.name if isinstance(model, Model) else model
    if isinstance(persona := options.get("persona"), Persona):
        options["persona"] = str(_kept(persona))
    if out is not None:
        wanted = SearchOptions.of(out=out, model=name, **options)
        with working_directory(out) as folder:
            return run(wanted.at(folder), model=loaded)
    with tempfile.TemporaryDirectory(prefix="jaxsteer-") as place:
        folder = Path(place) / "run"
        found = run(SearchOptions.of(out=folder, model=name, **options), model=loaded)
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
        found.with_files(files)
        return found


def _kept(persona: Persona) -> Path:
    """The file of a persona in the cache."""
    folder = make_directory(cache_dir() / "personas")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "persona.json"
        save_persona(persona, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return path.replace(folder / f"{persona.name.replace('/', '-')}-{digest}.json")


def _signature() -> inspect.Signature:
    """What editors and notebooks complete: all options by name."""
    own = inspect.signature(search).parameters
    kinds = inspect.Parameter.KEYWORD_ONLY
    listed = [
        inspect.Parameter(name, kinds, default=None, annotation=KINDS[name]) for name in OPTIONS if name not in own
    ]
    return inspect.Signature([own["model"], own["out"], *listed], return_annotation=SearchRun | Study)


search.__signature__ = _signature()  # type: ignore[attr-defined]
