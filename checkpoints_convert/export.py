"""Parameters written as a Hugging Face directory: config.json and model.safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from checkpoints_convert.files import DTYPES, SINGLE
from checkpoints_convert.hf import config_to_hf
from checkpoints_convert.names import TEXT_PREFIX, expected_leaves, to_hf
from checkpoints_convert.streaming import OUT_DTYPES
from jaxsteer.errors import UserError
from jaxsteer.files import write_bytes, write_text
from jaxsteer.models.config import ModelConfig
from jaxsteer.models.params import Params


def write_hf(params: Params, config: ModelConfig, out: str | os.PathLike[str], *, dtype: str = "float32") -> Path:
    """Write a model that transformers (and ``jaxsteer.load``) can open into the directory ``out``; return it.

    For models small enough for one file. The tokenizer is the caller's. Each file is written
    whole or not at all. Raises ``UserError`` for a config or a dtype that cannot be written.
    """
    if dtype not in OUT_DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported: give one of {', '.join(OUT_DTYPES)}.")
    target = DTYPES[OUT_DTYPES[dtype]]
    fields = config_to_hf(config, dtype)
    parts: dict[str, list[np.ndarray]] = {}
    prefix = "transformer." if config.family == "gpt2" else TEXT_PREFIX
    for leaf, (name, source, _) in expected_leaves(config, prefix).items():
        values = getattr(params.layers, leaf[-1])[int(leaf[1])] if len(leaf) > 1 else getattr(params, leaf[0])
        parts.setdefault(name, []).append(to_hf(np.asarray(values).astype(target), source))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: part[0] if len(part) == 1 else np.concatenate(part, axis=-1) for name, part in parts.items()}
    write_bytes(out / SINGLE, save(tensors, metadata={"format": "pt"}))
    write_text(out / "config.json", json.dumps(fields, indent=2) + "\n")
    return out
