"""jaxsteer: persona steering of open-weight language models in JAX."""

from __future__ import annotations

import importlib
import types
from typing import TYPE_CHECKING, Any, no_type_check

if TYPE_CHECKING:
    from pathlib import Path

    from jaxsteer.errors import UserError as UserError
    from jaxsteer.models.capture import capture as capture
    from jaxsteer.models.capture import logits as logits
    from jaxsteer.models.config import ModelConfig as ModelConfig
    from jaxsteer.models.loading import Model as Model
    from jaxsteer.models.loading import load as load
    from jaxsteer.models.params import Params as Params
    from jaxsteer.models.sharding import make_mesh as make_mesh
    from jaxsteer.models.sites import parse_site as parse_site
    from jaxsteer.models.sites import resid_site as resid_site
    from jaxsteer.prompts.generate import generate as generate
    from jaxsteer.sae import load_sae as load_sae

__version__ = "0.1.0"

_PUBLIC = {
    "Model": "jaxsteer.models.loading",
    "ModelConfig": "jaxsteer.models.config",
    "Params": "jaxsteer.models.params",
    "UserError": "jaxsteer.errors",
    "capture": "jaxsteer.models.capture",
    "generate": "jaxsteer.prompts.generate",
    "load": "jaxsteer.models.loading",
    "load_sae": "jaxsteer.sae",
    "logits": "jaxsteer.models.capture",
    "make_mesh": "jaxsteer.models.sharding",
    "parse_site": "jaxsteer.models.sites",
    "resid_site": "jaxsteer.models.sites",
}
"""Public name -> its module. Imported when first used, so that ``import jaxsteer`` is fast and has no cycles."""

__all__ = ["__version__", *_PUBLIC]


@no_type_check  # a checked module __getattr__ would ask itself for the checker
def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'jaxsteer' has no attribute {name!r}")


class CallableSearch(types.ModuleType):
    """What ``jaxsteer.search`` is: the room of that name, and a function."""

    def __call__(self, *, out: str | Path, **options: Any) -> dict[str, Any]:
        """Search prompts as ``jaxsteer search`` does, with its options as keyword arguments; returns the metrics.

        ``out`` may be a URL (docs/pods.md), and ``vary`` a dict: ``jaxsteer.search(out="runs/many", vary={"seed":
        range(32)})``. Raises ``UserError``.
        """
        from pathlib import Path

        from jaxsteer.study import SearchOptions, run
        from jaxsteer.study.stored import stored

        given = dict(options)
        for name in ("problems", "init_from", "conversations"):
            if given.get(name) is not None:
                given[name] = Path(given[name])
        if isinstance(given.get("vary"), dict):
            given["vary"] = tuple(f"{name}={','.join(map(str, values))}" for name, values in given["vary"].items())
        known = SearchOptions.__dataclass_fields__
        if unknown := sorted(given.keys() - known.keys()):
            from jaxsteer.errors import UserError

            raise UserError(f"jaxsteer.search has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        with stored(out) as folder:
            return run(SearchOptions(out=folder, **given))


def __dir__() -> list[str]:
    return sorted(__all__)
