"""``jaxsteer.search``: the command of that name as a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError
from jaxsteer.study.dispatch import run
from jaxsteer.study.object_store import stored
from jaxsteer.study.options import SearchOptions


def search(*, out: str | Path, **options: Any) -> dict[str, Any]:
    """Search prompts as ``jaxsteer search`` does, with its options as keyword arguments; returns the metrics.

    ``out`` may be a URL (docs/pods.md), and ``vary`` a dict: ``jaxsteer.search(out="runs/many", vary={"seed":
    range(32)})``. Raises ``UserError``.
    """
    given = dict(options)
    for name in ("problems", "init_from", "conversations"):
        if given.get(name) is not None:
            given[name] = Path(given[name])
    if isinstance(given.get("vary"), dict):
        given["vary"] = tuple(f"{name}={','.join(map(str, values))}" for name, values in given["vary"].items())
    known = SearchOptions.__dataclass_fields__
    if unknown := sorted(given.keys() - known.keys()):
        raise UserError(f"jaxsteer.search has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    with stored(out) as folder:
        return run(SearchOptions(out=folder, **given))
