"""jaxsteer: persona steering of open-weight language models in JAX."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, no_type_check

if TYPE_CHECKING:
    from jaxsteer.checkpoints.loading import load as load
    from jaxsteer.errors import UserError as UserError
    from jaxsteer.models.config import ModelConfig as ModelConfig
    from jaxsteer.models.model import Model as Model
    from jaxsteer.models.params import Params as Params
    from jaxsteer.models.run import Gradients as Gradients
    from jaxsteer.models.run import Run as Run
    from jaxsteer.models.run import capture as capture
    from jaxsteer.models.run import gradients as gradients
    from jaxsteer.models.run import logits as logits
    from jaxsteer.models.run import run as run
    from jaxsteer.models.sharding import make_mesh as make_mesh
    from jaxsteer.models.sites import parse_site as parse_site
    from jaxsteer.models.sites import resid_site as resid_site
    from jaxsteer.personas.front import direction as direction
    from jaxsteer.personas.front import persona as persona
    from jaxsteer.personas.persona import Persona as Persona
    from jaxsteer.prompts.generate import generate as generate
    from jaxsteer.prompts.text_tokens import to_str_tokens as to_str_tokens
    from jaxsteer.prompts.text_tokens import to_tokens as to_tokens
    from jaxsteer.sae import load_sae as load_sae
    from jaxsteer.study.api import search as search
    from jaxsteer.study.measure import measure as measure
    from jaxsteer.study.refusal import measure_refusal as measure_refusal
    from jaxsteer.study.side_by_side import compare as compare

__version__ = "0.2.0"

# Read once, by transformers: it would say that PyTorch is missing, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
if not any(Path("/dev").glob("accel*")) and not Path("/dev/vfio").exists():
    # By libtpu, where it is installed on a machine without TPU: it would look for one, at length.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

_PUBLIC = {
    "Gradients": "jaxsteer.models.run",
    "Model": "jaxsteer.models.model",
    "ModelConfig": "jaxsteer.models.config",
    "Params": "jaxsteer.models.params",
    "Persona": "jaxsteer.personas.persona",
    "Run": "jaxsteer.models.run",
    "UserError": "jaxsteer.errors",
    "capture": "jaxsteer.models.run",
    "compare": "jaxsteer.study.side_by_side",
    "direction": "jaxsteer.personas.front",
    "gradients": "jaxsteer.models.run",
    "generate": "jaxsteer.prompts.generate",
    "load": "jaxsteer.checkpoints.loading",
    "load_sae": "jaxsteer.sae",
    "logits": "jaxsteer.models.run",
    "make_mesh": "jaxsteer.models.sharding",
    "measure": "jaxsteer.study.measure",
    "measure_refusal": "jaxsteer.study.refusal",
    "persona": "jaxsteer.personas.front",
    "parse_site": "jaxsteer.models.sites",
    "resid_site": "jaxsteer.models.sites",
    "run": "jaxsteer.models.run",
    "search": "jaxsteer.study.api",
    "to_str_tokens": "jaxsteer.prompts.text_tokens",
    "to_tokens": "jaxsteer.prompts.text_tokens",
}
"""Public name -> its module. Imported when first used, so that ``import jaxsteer`` is fast and has no cycles."""

__all__ = ["__version__", *_PUBLIC]


@no_type_check  # a checked module __getattr__ would ask itself for the checker
def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    near = "" if name.startswith("__") else _near(name)
    raise AttributeError(f"module 'jaxsteer' has no attribute {name!r}{near}")


def _near(name: str) -> str:
    """What may have been meant by a name that is not there."""
    import difflib

    found = difflib.get_close_matches(name, _PUBLIC, n=1)
    return f": did you mean {found[0]!r}?" if found else ""


def __dir__() -> list[str]:
    return sorted(__all__)
