"""Vectors of libraries: steering-vectors, EasyEdit, axbench and pyvene (``imports`` chooses the reader)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import describe, read_json, read_log, read_torch
from jaxsteer.models.sites import parse_site
from jaxsteer.steer.import_formats import AFTER_BLOCK, UNKNOWN_SIGN, Ask
from jaxsteer.steer.vectors import Vectors

EASYEDIT_FILE = re.compile(r"layer_(\d+)(?:_((?:act_and_freq|only_act|only_freq)_trim[\d.]+))?\.pt")
EASYEDIT_FOLDER = re.compile(r"(caa|sta)_vector(_multiple_choice)?")
AXBENCH_FILE = re.compile(r"(.+)_weight\.pt")
LAYER_TYPES = {"decoder_block": "hook_resid_post", "self_attn": "attn.hook_out", "mlp": "mlp.hook_out"}
"""Modules of steering-vectors whose output is a site."""
COMPONENTS = {
    "block_input": "hook_resid_pre", "block_output": "hook_resid_post", "attention_output": "attn.hook_out",
    "mlp_input": "mlp.hook_in", "mlp_activation": "mlp.hook_post", "mlp_output": "mlp.hook_out",
}  # fmt: skip
"""Components of pyvene that are sites."""


def steering_vectors(ask: Ask, data: Mapping[Any, Any]) -> Vectors:
    """``torch.save`` of a ``SteeringVector``, or of a dict of its fields, or of its ``layer_activations`` alone."""
    layers, kind = data.get("layer_activations", data), data.get("layer_type", "decoder_block")
    ok = isinstance(layers, dict) and layers and all(type(layer) is int and layer >= 0 for layer in layers)
    if not ok or not all(isinstance(array, np.ndarray) for array in layers.values()):
        raise UserError(f"this holds {describe(data)}; expected layer_activations, one tensor [D] for a layer's number")
    if kind not in LAYER_TYPES:
        raise UserError(
            f"its vectors belong to the output of {str(kind)[:40]!r}, which is no site; "
            f"read are {', '.join(LAYER_TYPES)}"
        )
    return ask.vectors(
        {f"blocks.{layer}.{LAYER_TYPES[kind]}": layers[layer].reshape(-1) for layer in sorted(layers)},
        "steering_vectors",
        "towards the positive examples: mean(positive - negative), or what its aggregator made of the differences",
        f"layer i was the output of {kind} i",
        positions="every",  # as the library applies them
        metadata={"layer_type": str(kind)},
    )


def easyedit(ask: Ask, array: np.ndarray) -> Vectors:
    """layer_<i>.pt in caa_vector, layer_<i>_<mode>_trim<t>.pt in sta_vector."""
    match = EASYEDIT_FILE.fullmatch(ask.path.name)
    if match is None:
        raise UserError("the name of the file is not layer_<i>.pt or layer_<i>_<mode>_trim<t>.pt, as EasyEdit writes")
    return _easyedit(ask, {int(match.group(1)): array}, match.group(2), ask.path.parent.name)


def easyedit_folder(ask: Ask) -> Vectors:
    """All layers of a folder caa_vector or sta_vector."""
    found: dict[str, dict[int, Path]] = {}
    for file in sorted(ask.path.iterdir()):
        if match := EASYEDIT_FILE.fullmatch(file.name):
            found.setdefault(match.group(2) or "", {})[int(match.group(1))] = file
    modes = [mode for mode in found if ask.name in (None, mode)]
    if len(modes) != 1:
        known = ", ".join(mode or "layer_<i>.pt" for mode in found) or "nothing of EasyEdit"
        raise UserError(f"this folder holds {known}: choose one with --name")
    arrays = {}
    for layer, file in sorted(found[modes[0]].items()):
        arrays[layer] = read_torch(file)
        if not isinstance(arrays[layer], np.ndarray) or arrays[layer].ndim != 1:
            raise UserError(f"{file.name} holds {describe(arrays[layer])}; expected one tensor [D]")
    return _easyedit(dataclasses.replace(ask, name=None), arrays, modes[0] or None, ask.path.name)


def _easyedit(ask: Ask, arrays: dict[int, np.ndarray], mode: str | None, folder: str) -> Vectors:
    return ask.vectors(
        {f"blocks.{layer}.hook_resid_post": array for layer, array in arrays.items()},
        "easyedit",
        "towards the matching answer: mean(matching - not matching)",
        AFTER_BLOCK,
        read_position="the letter, token -2" if folder.endswith("multiple_choice") else "mean over the answer's tokens",
        metadata={"method": "STA" if mode else "CAA", "mode": mode or ""},
    )


def axbench(ask: Ask, array: np.ndarray) -> Vectors:
    """<Method>_weight.pt [concepts, D]; one concept by its row, or by its words in metadata.jsonl beside the file."""
    beside = [ask.path.parent / "metadata.jsonl", ask.path.parent.parent / "generate" / "metadata.jsonl"]
    file = next((path for path in beside if path.is_file()), None)
    concepts = [str(line.get("concept", "")) for line in read_log(file)[0]] if file is not None else []
    if len(concepts) != len(array):  # rows are of the concepts that were trained, in their order
        concepts = [""] * len(array)
    rows = [i for i, concept in enumerate(concepts) if ask.name is not None and ask.name in (str(i), concept)]
    if len(rows) != 1:
        some = "; ".join(f"{i}: {concept}" for i, concept in enumerate(concepts[:4]) if concept)
        raise UserError(
            f"this holds vectors of {len(array)} concepts: choose one with --name, its row (0 to {len(array) - 1})"
            + (f" or its words ({some} …)" if some else "; metadata.jsonl beside the file would give their words")
        )
    if ask.site is None:
        raise UserError("a file of axbench does not say its layer: name the --site, e.g. blocks.20.hook_resid_post")
    match = AXBENCH_FILE.fullmatch(ask.path.name)
    return ask.vectors(
        {parse_site(ask.site).name: array[rows[0]]},
        "axbench",
        "towards the concept",
        "row i was concept i of those that were trained; the site was given at the import",
        named=True,
        metadata={
            "method": match.group(1) if match else "",
            "concept": concepts[rows[0]] or f"row {rows[0]}",
            "published_use": "added times a factor and the concept's largest activation on its examples, which the "
            "file does not hold",
        },
    )


def pyvene(ask: Ask) -> Vectors:
    """A folder that ``IntervenableModel.save`` wrote: additions and subtractions of constant vectors."""
    config = read_json(ask.path / "config.json")
    keys, places, types = (config.get(name) for name in ("sorted_keys", "representations", "intervention_types"))
    if not all(isinstance(part, list) and len(part) == len(keys or ()) for part in (keys, places, types)) or not keys:
        raise UserError("its config.json is not one of pyvene: it needs sorted_keys, representations and types")
    arrays = {}
    for key, place, kind in zip(keys, places or (), types or (), strict=True):
        layer, component = (place.get("layer"), place.get("component")) if isinstance(place, dict) else place[:2]
        signs = {"AdditionIntervention": 1, "SubtractionIntervention": -1}
        sign = next((s for name, s in signs.items() if str(kind).endswith(f"pyvene.models.interventions.{name}'>")), 0)
        if not sign or component not in COMPONENTS or type(layer) is not int or layer < 0:
            raise UserError(
                f"it has {str(kind)[:80]} at {str(component)[:40]} of layer {str(layer)[:10]}: read are additions and "
                f"subtractions of a constant at {', '.join(COMPONENTS)}"
            )
        state = read_torch(ask.path / f"intkey_{Path(str(key)).name}.bin")
        array = state.get("source_representation") if isinstance(state, dict) else None
        site = f"blocks.{layer}.{COMPONENTS[component]}"
        if not isinstance(array, np.ndarray) or array.size != array.shape[-1] or site in arrays:
            raise UserError(f"expected one source_representation [D] for {site}, got {describe(state)}")
        arrays[site] = sign * array.reshape(-1)
    return ask.vectors(
        arrays,
        "pyvene",
        UNKNOWN_SIGN + "; coefficient 1 is what pyvene does, subtractions negated",
        "component of layer i",
        positions="every",
    )
