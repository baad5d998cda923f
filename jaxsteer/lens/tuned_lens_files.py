"""Tuned lenses as files: the folders of AlignmentResearch/tuned-lens, read and written without torch.

``config.json`` says of which model a lens is; ``params.pt`` holds, for translator i, ``i.weight`` [D out, D in] and
``i.bias`` [D]. Our own files add ``fingerprint``, the hash of the model's weights, which that tool ignores.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import make_directory, read_json
from jaxsteer.files.torchfile import read_torch
from jaxsteer.files.torchwrite import write_torch
from jaxsteer.lens.tuned_lens import SPEC, Translators, TunedLens, unembed_hash
from jaxsteer.models.model import Model
from jaxsteer.models.sharding import place, put
from jaxsteer.processes import is_first, to_host
from jaxsteer.runs.files import write_json

log = logging.getLogger(__name__)

CONFIG, PARAMS, TRAINED = "config.json", "params.pt", "lens"
"""Of a lens, and where it lies in the directory of a training."""
TYPE = "linear_tuned_lens"


def load_lens(folder: str | os.PathLike[str], model: Model, *, any_weights: bool = False) -> TunedLens:
    """The lens in a folder, of a training or of AlignmentResearch/tuned-lens, on the model's mesh.

    Raises ``UserError`` for files that are missing or damaged, another kind of lens, and one that does not belong to
    ``model``; with ``any_weights`` a lens of other weights of the same sizes is a logged warning.
    """
    folder = Path(folder)
    if (folder / TRAINED / PARAMS).is_file():
        folder = folder / TRAINED
    if folder.is_dir() and not (folder / PARAMS).is_file():
        raise UserError(
            f"{folder} is no tuned lens, which has {CONFIG} and {PARAMS}: `jaxsteer lens train` writes these when it "
            "has finished (the same command goes on with one that was cut off); `lens read --out` writes other files"
        )
    config, state = read_json(folder / CONFIG), read_torch(folder / PARAMS)
    if config.get("lens_type", TYPE) != TYPE:
        raise UserError(f"{folder} is a lens of type {config['lens_type']!r:.40}: only {TYPE} is read")
    layers, width = (config.get(name) for name in ("num_hidden_layers", "d_model"))
    if not isinstance(layers, int) or not isinstance(width, int) or not isinstance(state, dict):
        raise UserError(f"{folder / CONFIG} must say d_model and num_hidden_layers, and {PARAMS} hold tensors by name")
    names: dict[str, tuple[int, ...]] = {f"{i}.weight": (width, width) for i in range(layers)}
    names |= {f"{i}.bias": (width,) for i in range(layers)}
    for name, shape in names.items():
        array = state.get(name)
        if array is None and name.endswith("bias"):
            continue
        if not isinstance(array, np.ndarray) or array.shape != shape or not np.isfinite(array).all():
            raise UserError(f"{folder / PARAMS}: {name} must be finite numbers of shape {list(shape)}")
    if extra := sorted(set(state) - set(names)):
        raise UserError(f"{folder / PARAMS} has {extra[0]!r:.60}, which no lens of {layers} layers has")
    matrix = np.stack([np.asarray(state[f"{i}.weight"], np.float32).T for i in range(layers)])
    bias = np.stack([np.asarray(state.get(f"{i}.bias", np.zeros(width)), np.float32) for i in range(layers)])
    lens = TunedLens(
        translators=Translators(matrix=put(matrix, place(model.mesh, SPEC, matrix.shape)), bias=jnp.asarray(bias)),
        name=folder.parent.name if folder.name == TRAINED else folder.name,
        model=_text(config, "base_model_name_or_path"),
        fingerprint=_text(config, "fingerprint"),
        unembed_hash=_text(config, "unembed_hash"),
    )
    return lens.of(model, any_weights=any_weights)


def _text(config: dict[str, Any], name: str) -> str:
    value = config.get(name)
    return value if isinstance(value, str) else ""


def save_lens(lens: TunedLens, folder: str | os.PathLike[str], model: Model) -> Path:
    """Write a lens of ``model`` for this package and for AlignmentResearch/tuned-lens; returns the folder."""
    folder = Path(folder)
    lens.check(model)
    make_directory(folder)
    arrays = to_host((lens.translators.matrix, lens.translators.bias))
    state = dict[str, np.ndarray]()
    for i, (matrix, bias) in enumerate(zip(*arrays, strict=True)):
        state |= {f"{i}.weight": np.ascontiguousarray(matrix.T), f"{i}.bias": bias}
    if is_first():
        write_torch(folder / PARAMS, state)
    write_json(folder / CONFIG, {
        "base_model_name_or_path": model.name, "d_model": model.config.d_model,
        "num_hidden_layers": model.config.n_layers, "bias": True, "base_model_revision": None,
        "unembed_hash": unembed_hash(model), "lens_type": TYPE, "fingerprint": model.fingerprint,
    })  # fmt: skip
    return folder
