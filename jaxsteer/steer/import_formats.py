"""What files of other tools mean: one reader for each format that has no library of its own (``imports`` chooses)."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files import describe, read_json, read_torch
from jaxsteer.models.sites import KINDS, parse_site, resid_site
from jaxsteer.steer.capping import CAP_SIGN, caps_of, check_caps
from jaxsteer.steer.vectors import Vectors

AFTER_BLOCK = "index i is the output of block i"
UNKNOWN_SIGN = "not stated by the file: try both, or give --sign"
TO_ASSISTANT = "towards the Assistant: mean(default) - mean(roles)"
PERSONA_FILE = re.compile(r".+_(prompt_avg|response_avg|prompt_last)_diff\.pt")
AXIS_FOLDERS = ("role_vectors", "trait_vectors")
CAA_FILE = re.compile(r"vec_layer_(\d+)(?:_(.+))?\.pt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """The arguments of ``import_vectors``."""

    path: Path
    format: str | None = None
    site: str | None = None
    name: str | None = None
    sign: str | None = None

    def vectors(
        self, arrays: dict[str, np.ndarray], source: str, sign: str, index: str, *, named: bool = False, **more: Any
    ) -> Vectors:
        """The result: float32, with its notes."""
        if self.name is not None and not named:
            raise UserError(f"--name {self.name!r} chooses nothing in a file of format {source}")
        metadata = {"index_meaning": index, "source_file": self.path.name, **more.pop("metadata", {})}
        with np.errstate(over="ignore"):  # what is infinite is refused below
            arrays = {site: np.array(array, np.float32) for site, array in arrays.items()}
        return Vectors(
            arrays=arrays,
            sign=self.sign or sign,
            source_format=source,
            metadata={key: text for key, text in metadata.items() if text},
            **more,
        )

    def as_read(self, found: Vectors) -> Vectors:
        """The result of a format that carries its own notes."""
        if self.name is not None:
            raise UserError(f"--name {self.name!r} chooses nothing in this file; --site does")
        return dataclasses.replace(found, sign=self.sign or found.sign)


def _rows(array: Any) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not array.size:
        raise UserError(f"expected one tensor [layers, D], got {describe(array)}")
    return array


def persona_vectors(ask: Ask, array: np.ndarray) -> Vectors:
    """[L+1, D] by ``hidden_states``: the embedding, the outputs of blocks 0 ... L-2, and the normalised last one."""
    rows = _rows(array)
    if len(rows) < 2:
        raise UserError(f"expected L + 1 rows, got {describe(array)}")
    match = PERSONA_FILE.fullmatch(ask.path.name)
    return ask.vectors(
        {"hook_embed": rows[0], **{resid_site(i - 1): rows[i] for i in range(1, len(rows) - 1)}},
        "persona_vectors",
        "towards the trait: mean(positive instruction) - mean(negative instruction)",
        f"row i was hidden_states[i], the output of block i-1, and row 0 the embedding; row {len(rows) - 1}, which "
        f"comes after the final norm, was dropped",
        read_position=match.group(1) if match else "",
        metadata={"n_layers": str(len(rows) - 1)},
    )


def axis_by_name(ask: Ask, array: np.ndarray) -> Vectors:
    """[L, D]: the axis where the file says so; else the mean activation of a role, which contrasts with nothing."""
    name, folder = ask.path.stem, ask.path.parent.name
    is_axis = folder not in AXIS_FOLDERS and "default_vector" not in name
    return assistant_axis(ask, array, TO_ASSISTANT if is_axis else role_sign(name), {})


def role_sign(role: str) -> str:
    """The sign of a role's mean activation."""
    return f"mean activation of {role!r}, not a contrast: subtract that of default_vector.pt before steering"


def assistant_axis(ask: Ask, array: Any, sign: str, note: dict[str, str]) -> Vectors:
    """[L, D] by block, whatever it contrasts."""
    rows = _rows(array)
    return ask.vectors(
        {resid_site(i): row for i, row in enumerate(rows)},
        "assistant_axis",
        sign,
        "row i was the output of block i",
        read_position="mean over the tokens of the answer",
        metadata={"n_layers": str(len(rows)), **note},
    )


def refusal(ask: Ask, array: np.ndarray) -> Vectors:
    """direction.pt [D]; its layer and position stand beside it."""
    note = read_json(ask.path.parent / "direction_metadata.json") if ask.site is None else {}
    layer, position = note.get("layer"), note.get("pos")
    if ask.site is None and (type(layer) is not int or layer < 0):
        raise UserError("direction_metadata.json beside it gives no layer: name the --site")
    return ask.vectors(
        {f"blocks.{layer}.hook_resid_pre" if ask.site is None else parse_site(ask.site).name: array},
        "refusal_direction",
        "towards refusal: mean(harmful) - mean(harmless)",
        "layer i was the input of block i",
        read_position=f"token {position} of the template's end of instruction" if position is not None else "",
        metadata={
            "published_use": "ablated at the input, attention output and MLP output of every block "
            "(jaxsteer.steer.ablate_everywhere), or added at the input of this block"
        },
    )


def mean_diffs(ask: Ask, array: np.ndarray) -> Vectors:
    """mean_diffs.pt [n_pos, L, D]; one position is chosen."""
    beside = ask.path.parent.parent / "direction_metadata.json"
    position = ask.name if ask.name is not None else read_json(beside).get("pos") if beside.is_file() else None
    known = [str(p) for p in range(-len(array), 0)]
    if str(position) not in known:
        raise UserError(
            f"this holds {describe(array)}: mean differences at {len(array)} positions. Choose one with --name=-1: "
            f"{', '.join(known)}, counted from the end of the instruction's template"
        )
    return ask.vectors(
        {f"blocks.{i}.hook_resid_pre": row for i, row in enumerate(array[int(str(position))])},
        "refusal_direction",
        "towards refusal: mean(harmful) - mean(harmless)",
        "layer i was the input of block i",
        read_position=f"token {position} of the template's end of instruction",
        named=True,
        metadata={"n_layers": str(array.shape[1])},
    )


def caa(ask: Ask, array: np.ndarray) -> Vectors:
    """vec_layer_<i>_<model>.pt [D]."""
    match = CAA_FILE.fullmatch(ask.path.name)
    if match is None and ask.site is None:
        raise UserError("the name of the file is not vec_layer_<i>_<model>.pt: name the --site")
    site = parse_site(ask.site).name if ask.site is not None else resid_site(int(match.group(1))) if match else ""
    return caa_vectors(ask, {site: array}, match.group(2) if match else None)


def caa_vectors(ask: Ask, arrays: dict[str, np.ndarray], model: str | None) -> Vectors:
    """Vectors of one model by site."""
    folders = {ask.path.name, ask.path.parent.name, ask.path.parent.parent.name}
    return ask.vectors(
        arrays,
        "caa",
        "towards the behaviour: mean(matching answer) - mean(other answer)",
        AFTER_BLOCK,
        model=model or "",
        read_position="the letter of the answer, token -2",
        metadata={"scaled": "per layer to the mean norm over behaviours" if "normalized_vectors" in folders else ""},
    )


def bare(ask: Ask, array: np.ndarray) -> Vectors:
    """A vector of which nothing is known."""
    if ask.site is None:
        raise UserError(
            f"this holds {describe(array)}, a bare vector. Say where it belongs, e.g. --site "
            f"blocks.14.hook_resid_post, and what going along it means (--sign)"
        )
    site = parse_site(ask.site)
    heads = KINDS[site.kind].heads
    if array.ndim != (2 if heads else 1):
        raise UserError(f"at {site.name} a vector is {'(heads, H)' if heads else '(D,)'}; this holds {describe(array)}")
    return ask.vectors({site.name: array}, "bare", UNKNOWN_SIGN, "the site was given at the import")


def capping(ask: Ask, data: dict[Any, Any]) -> Vectors:
    """One experiment of capping_config.pt, as ceilings."""
    experiments = caps_of(data)
    if ask.name not in experiments:
        some = ", ".join(list(experiments)[:6])
        raise UserError(
            f"this holds {len(experiments)} capping experiments ({some} …): choose one with --name. The authors "
            f"recommend layers_46:54-p0.25 for Qwen3-32B and layers_56:72-p0.25 for Llama-3.3-70B"
        )
    caps = experiments[ask.name]
    sites = [cap.site for cap in caps]
    if not caps or len(set(sites)) < len(sites):
        raise UserError(
            f"the experiment {ask.name!r} has {len(caps)} caps at {len(set(sites))} sites, and a vector file holds one "
            f"for each: use jaxsteer.steer.read_capping"
        )
    axis = ask.path.parent / "assistant_axis.pt"
    found = ask.vectors(
        {cap.site: cap.vector for cap in caps},
        "capping",
        CAP_SIGN + (f"; the vectors do point against the axis in {axis.name}" if axis.is_file() else ""),
        "layer i is the output of block i; ranges in the experiment's name are half open",
        operation="ceiling",
        values={cap.site: cap.value for cap in caps},
        positions="every",  # as the released code applies them
        named=True,
        metadata={"experiment": ask.name, "vector_names": json.dumps([cap.name for cap in caps])},
    )
    if axis.is_file():
        check_caps(found, _axis_beside(axis))
    return found


def _axis_beside(path: Path) -> Vectors:
    data = read_torch(path)
    rows = data["axis"] if isinstance(data, dict) and "axis" in data else data
    return assistant_axis(Ask(path=path), rows, TO_ASSISTANT, {})


def svec(ask: Ask) -> Vectors:
    """JSON of activation-steering and of AISteer360."""
    data = read_json(ask.path)
    if not isinstance(data.get("directions"), dict) or not data["directions"]:
        raise UserError(f"this is no .svec file: it holds {describe(data)}, expected a dict 'directions'")
    sizes = (data.get("num_heads"), data.get("head_dim"))
    heads = sizes if any(sizes) else None
    arrays, nested = {}, False
    for index, values in data["directions"].items():
        try:
            array = np.asarray(values, np.float64)
        except (ValueError, TypeError) as error:
            raise UserError(f"the direction {index[:40]!r} is not a list of numbers") from error
        nested |= array.ndim == 2
        array = array[0] if array.ndim == 2 and len(array) == 1 and heads is None else array
        fits = array.ndim == 1 if heads is None else array.shape == heads
        if not re.fullmatch(r"0|[1-9]\d{0,5}", index) or not fits:
            raise UserError(
                f"the direction {index[:40]!r} has shape {list(array.shape)}; expected one "
                + ("vector" if heads is None else f"[num_heads, head_dim] = {list(heads)}")
                + " for a block's number"
            )
        arrays[int(index)] = array
    if heads is not None:
        return ask.vectors(
            {f"blocks.{i}.attn.hook_z": arrays[i] for i in sorted(arrays)},
            "svec (AISteer360)",
            "by its name (ITI) towards the true statements: mean(true) - mean(false), per head",
            "block i, what each head gives to the output projection",
            model=str(data.get("model_type") or ""),
            metadata={
                "family": str(data.get("model_type") or ""),
                "probe_accuracies": json.dumps(data.get("probe_accuracies") or {}),
                "published_use": "added at the heads of the best probes only; here all heads are in the file",
            },
        )
    return ask.vectors(
        {resid_site(i): arrays[i] for i in sorted(arrays)},
        "svec (AISteer360)" if nested else "svec (activation-steering)",
        UNKNOWN_SIGN if nested else f"{UNKNOWN_SIGN}; a principal component of pairwise differences, usually",
        AFTER_BLOCK
        + ("" if nested else ", where it was read; activation-steering itself adds it at the input of block i"),
        model=str(data.get("model_type") or ""),
        metadata={
            "family": str(data.get("model_type") or ""),
            "explained_variances": json.dumps(data.get("explained_variances") or {}),
        },
    )
