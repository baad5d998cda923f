"""``jaxsteer inspect``: what a model is, before anything of it is converted or loaded."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Literal

from tyro.conf import Positional

from jaxsteer.display import listed, wrapped
from jaxsteer.runs.files import document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Print what a model is: sizes, parameters, attention, sites, memory per device, what would be ignored."""

    source: Positional[str]
    """organism:NAME, a config.json, a Hugging Face directory, a converted checkpoint, a .gguf file, or a hub id."""
    mesh_model: int = 1
    """Devices that weights are split over."""
    mesh_prompts: int = 1
    """Devices, times mesh-model, that rows are divided over."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights on the devices (default: as they are stored)."""
    ignore_field: tuple[str, ...] = ()
    """Names of fields of config.json that change no number although jaxsteer does not know them."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> int:
        """Inspect and print; 1 when the weights that lie there are not those of the configuration."""
        from jaxsteer.checkpoints.inspect import inspection

        mesh = {"model": self.mesh_model, "prompts": self.mesh_prompts}
        found = inspection(self.source, mesh=mesh, dtype=self.dtype, ignore_fields=self.ignore_field)
        print(document(found) if self.json else text(found))
        return 1 if found["weights"] and "problem" in found["weights"] else 0


def text(found: dict[str, Any]) -> str:
    """The inspection for people."""
    config, count, use = found["config"], found["parameters"], found["memory"]
    mesh = use["mesh"]
    revision = f" at {found['revision']}" if found["revision"] else ""
    stored = found["dtype"] or "dtype not said in config.json"
    lines = [
        f"{found['name']}{revision}: family {found['family']}, {count['total']:,} parameters, {stored}",
        "",
        *_rows(
            ("layers", config["n_layers"]),
            ("width", config["d_model"]),
            ("heads", f"{config['n_heads']} of {config['d_head']}, keys and values {config['n_kv_heads']}"),
            ("MLP", f"{config['d_mlp']}, {config['activation']}"),
            ("vocabulary", f"{config['vocab_size']:,} rows, {_tied(config)}"),
            ("context", f"{found['context_length']:,} tokens"),
            *_attention(found),
            ("also", _peculiarities(config)),
        ),
        "",
        "parameters",
        *_rows(
            ("embedding", f"{count['embedding']:,}"),
            *([("positions", f"{count['positions']:,}")] if "positions" in count else []),
            ("each layer", f"{count['per_layer']:,}"),
            ("unembedding", f"{count['unembedding']:,}" if count["unembedding"] else "the embedding"),
        ),
        "",
        f"bytes on each device of a mesh prompts {mesh['prompts']} x model {mesh['model']}, in {use['dtype']}",
        *_rows(
            ("weights", f"{use['weights']:,} ({use['weights'] / 2**30:.2f} GiB)"),
            ("cache", f"{use['cache_per_token']:,} for each token of a row"),
        ),
        "",
        f"sites: hook_embed, and in block i = 0 ... {config['n_layers'] - 1} as blocks.i.PLACE (B rows, T tokens)",
        *_rows(*((kind, "[" + ", ".join(map(str, shape)) + "]") for kind, shape in found["sites"].items())),
        "",
        *(["files", *_rows(*_files(found["weights"])), ""] if found["weights"] else []),
        "ignored",
        *_rows(*_ignored(found)),
    ]
    return "\n".join(line if line.startswith(" ") else wrapped(line) for line in lines)


def _rows(*pairs: tuple[str, Any]) -> list[str]:
    return listed(pairs)


def _tied(config: dict[str, Any]) -> str:
    return "tied to the unembedding" if config["tied_embeddings"] else "unembedding of its own"


def _attention(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for kind in found["attention"]:
        rope, turned = kind["rope"], "no rotation"
        if rope is not None:
            scaling = "" if rope["kind"] == "default" else f" ({rope['kind']}, factor {rope['factor']:g})"
            turned = f"rope theta {rope['theta']:g}{scaling}"
        seen = f"window {kind['window']:,}" if kind["window"] else "full"
        rows.append(("attention", f"{seen}, {turned}: {_layers(kind['layers'])}"))
    return rows


def _layers(layers: list[int]) -> str:
    shown = ", ".join(map(str, layers)) if len(layers) <= 6 else f"{', '.join(map(str, layers[:6]))} ..."
    return f"{len(layers)} layers ({shown})"


def _peculiarities(config: dict[str, Any]) -> str:
    usual = config["d_head"] ** -0.5
    parts = [
        "LayerNorm" if config.get("norm") == "layer" else "",
        "a vector for each position" if config.get("learned_positions") else "",
        "no gate in the MLP" if not config.get("gated_mlp", True) else "",
        "biases everywhere" if config.get("writer_bias") else "biases on q, k, v" if config["qkv_bias"] else "",
        "norms on q and k" if config["qk_norm"] else "",
        "norms after attention and MLP" if config["post_norms"] else "",
        "norms multiply by 1 + w" if config["norm_plus_one"] else "",
        "embeddings times sqrt(width)" if config["embed_scale"] else "",
        f"scores capped at {config['attn_softcap']:g}" if config["attn_softcap"] else "",
        f"logits capped at {config['final_softcap']:g}" if config["final_softcap"] else "",
        "" if abs(config["query_scale"] - usual) < 1e-9 else f"query scale {config['query_scale']:.6g}",
    ]
    return "; ".join(part for part in parts if part) or "nothing"


def _files(weights: dict[str, Any]) -> list[tuple[str, str]]:
    if "problem" in weights:
        return [("PROBLEM", weights["problem"])]
    dtypes = ", ".join(f"{count} tensors {name}" for name, count in weights["dtypes"].items())
    return [("weights", f"{weights['files']} files, {weights['bytes']:,} bytes, {dtypes}")]


def _ignored(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("fields", ", ".join(found["ignored_fields"]) or "none")]
    weights = found["weights"]
    if weights and "problem" in weights:
        return rows
    names = weights["ignored"] if weights else found["ignored_tensors"]
    if names:
        roots = Counter(".".join(name.split(".")[: 1 + name.startswith("model.")]) for name in names)
        listed = ", ".join(f"{root} ({n})" for root, n in sorted(roots.items()))
        size = f", {weights['ignored_bytes']:,} bytes" if weights else ""
        return [*rows, ("tensors", f"{len(names)}{size}: {listed}")]
    if weights or found["converted"]:
        return [*rows, ("tensors", "none")]
    seeing = "vision tower and projector, by name " if found["family"] == "gemma3" else ""
    return [*rows, ("tensors", f"{seeing}(there are no weights here to look at)")]
