"""What a model is, told from its config.json alone: sizes, parameters, sites, memory on a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from checkpoints_convert.files import read_headers
from checkpoints_convert.gguf import is_gguf, read_gguf_model
from checkpoints_convert.hf import config_from_hf, ignored_fields
from checkpoints_convert.leaves import RECORD, read_record
from checkpoints_convert.names import assign
from checkpoints_convert.streaming import plan_conversion
from jaxsteer.checkpoints.loading import find_source
from jaxsteer.errors import UserError
from jaxsteer.files import read_json
from jaxsteer.files.paths import user_path
from jaxsteer.files.stores import is_url
from jaxsteer.models.config import GLOBAL_WINDOW, ModelConfig
from jaxsteer.models.params import layer_shapes, top_shapes
from jaxsteer.models.sharding import AXES, leaf_spec, place
from jaxsteer.models.sites import site_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """A model before any weight of it is read."""

    name: str
    directory: Path
    """Where its files are; of a hub model that is not here yet, only config.json."""
    revision: str | None
    config: ModelConfig
    dtype: str | None
    """Of the stored weights, as far as the files say; of a GGUF file, what they become when it is converted."""
    converted: bool
    ignored_fields: tuple[str, ...]
    """Fields of config.json that change no number."""
    ignored_tensors: tuple[str, ...]
    """Of a converted checkpoint: tensors of its source that were left out."""


def describe(source: str, *, ignore_fields: Collection[str] = ()) -> Description:
    """The description of any source of ``jaxsteer.load``, or of a config.json file.

    Of a hub id, only config.json is downloaded. ``ignore_fields`` is that of ``load``. Raises ``UserError`` as ``load``
    does, for unsupported models too.
    """
    path = user_path(source) if not is_url(source) else Path(source)
    if path.name == "config.json" and path.is_file():
        source = str(path.parent)
    directory, name, revision = find_source(source, ["config.json"])
    if is_gguf(directory):
        job = plan_conversion(directory, None, ignore_fields)
        return Description(
            name=name,
            directory=directory,
            revision=None,
            config=job.config,
            dtype=job.dtype,
            converted=False,
            ignored_fields=(),
            ignored_tensors=tuple(job.ignored),
        )
    converted = (directory / RECORD).is_file()
    raw = read_json(directory / "config.json") if (directory / "config.json").is_file() else None
    record: dict[str, Any] = read_record(directory) if converted else {}
    config = (
        ModelConfig.from_json(record["config"]) if converted else config_from_hf(directory, ignore_fields=ignore_fields)
    )
    return Description(
        name=name,
        directory=directory,
        revision=revision or record.get("revision"),
        config=config,
        dtype=record["dtype"] if converted else _declared_dtype(raw or {}),
        converted=converted,
        ignored_fields=tuple(ignored_fields(raw, ignore_fields)) if raw else (),
        ignored_tensors=tuple(record.get("ignored_tensors", ())),
    )


def inspection(
    source: str, *, mesh: Mapping[str, int], dtype: str | None = None, ignore_fields: Collection[str] = ()
) -> dict[str, Any]:
    """Everything that is known of a model before any weight of it is read, as a JSON object.

    ``mesh`` has the devices along "model" and "prompts"; ``dtype`` is that of the weights there (default: as stored).
    Weights that are not those of the configuration are a ``problem`` under ``weights``. Raises ``UserError`` as
    ``describe``.
    """
    about = describe(source, ignore_fields=ignore_fields)
    config = about.config
    dtype = dtype or about.dtype
    return {
        "name": about.name,
        "revision": about.revision,
        "converted": about.converted,
        "family": config.family,
        "dtype": about.dtype,
        "context_length": config.max_positions,
        "parameters": parameters(config),
        "config": config.to_json(),
        "attention": attention_kinds(config),
        "sites": {kind: list(shape) for kind, shape in site_shapes(config).items()},
        "memory": {"mesh": dict(mesh), "dtype": dtype or "float32", **memory(config, dtype or "float32", **mesh)},
        "weights": None if about.converted else _weights(about.directory, config),
        "ignored_fields": list(about.ignored_fields),
        "ignored_tensors": list(about.ignored_tensors),
    }


def _weights(path: Path, config: Any) -> dict[str, Any] | None:
    """What the files of weights hold, by their headers; None if there are none."""
    if not is_gguf(path) and not any(path.glob("*.safetensors*")):
        return None
    try:
        tensors = read_gguf_model(path).tensors if is_gguf(path) else read_headers(path)
        ignored = assign(tensors, config)[1]
    except UserError as error:
        return {"problem": str(error)}
    return {
        "files": len({tensor.file for tensor in tensors.values()}),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": dict(Counter(tensor.stored_as for tensor in tensors.values())),
        "ignored": ignored,
        "ignored_bytes": sum(tensors[name].nbytes for name in ignored),
    }


def _declared_dtype(raw: dict[str, Any]) -> str | None:
    for fields in (raw, raw.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(fields.get(key), str):
                return fields[key].removeprefix("torch.")
    return None


def parameters(config: ModelConfig) -> dict[str, int]:
    """Numbers of parameters: total, embedding, unembedding (0 when tied), per_layer, final_norm, and positions where
    these have vectors."""
    top = {name: math.prod(shape) for name, shape in top_shapes(config).items()}
    per_layer = sum(math.prod(shape) for shape in layer_shapes(config).values())
    return {
        "total": sum(top.values()) + config.n_layers * per_layer,
        "embedding": top["embed"],
        "unembedding": top.get("unembed", 0),
        "per_layer": per_layer,
        "final_norm": top["final_norm"] + top.get("final_norm_bias", 0),
        **({"positions": top["positions"]} if config.learned_positions else {}),
    }


def memory(config: ModelConfig, dtype: str, *, model: int = 1, prompts: int = 1) -> dict[str, int]:
    """Bytes that weights and caches take on each device of a mesh of ``prompts`` x ``model`` devices.

    Computed from the layout that ``load`` uses, without the devices: "weights", and "cache_per_token", the keys and
    values of one token of one row (rows are divided over "prompts"). Raises ``UserError`` for sizes below 1.
    """
    if model < 1 or prompts < 1:
        raise UserError(f"A mesh needs at least one device along each axis, got prompts={prompts} x model={model}.")
    mesh = AbstractMesh((prompts, model), AXES)
    width = jnp.dtype(dtype).itemsize

    def nbytes(spec: P, shape: tuple[int, ...]) -> int:
        return math.prod(place(mesh, spec, shape).shard_shape(shape)) * width

    layer, top = (
        sum(nbytes(leaf_spec(name, shape, mesh), shape) for name, shape in shapes.items())
        for shapes in (layer_shapes(config), top_shapes(config))
    )
    keys = nbytes(P("model", None), (config.n_kv_heads, config.d_head))
    return {"weights": top + config.n_layers * layer, "cache_per_token": 2 * config.n_layers * keys}


def attention_kinds(config: ModelConfig) -> list[dict[str, Any]]:
    """Layers grouped by what their attention sees: window (None for all), rotary table (None for none), the layers."""
    groups: dict[tuple[int, int | None], list[int]] = {}
    tables = config.rope_index or (None,) * config.n_layers
    for layer, kind in enumerate(zip(config.windows, tables, strict=True)):
        groups.setdefault(kind, []).append(layer)
    return [
        {
            "window": None if window == GLOBAL_WINDOW else window,
            "rope": None if rope is None else dataclasses.asdict(config.ropes[rope]),
            "layers": layers,
        }
        for (window, rope), layers in groups.items()
    ]
