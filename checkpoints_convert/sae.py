"""SAE files: any known layout in, one layout out.

``python -m checkpoints_convert sae SRC OUT`` reads what ``jaxsteer.load_sae`` reads and writes SAELens' layout
(``cfg.json`` and ``sae_weights.safetensors``), in canonical form and with our whole record in the metadata.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from checkpoints_convert.files import DTYPES, all_finite
from checkpoints_convert.sae_files import Overrides, SAEFiles, find_sae
from checkpoints_convert.sae_libraries import OURS, dictionary_learning, saelens, sparsify
from checkpoints_convert.sae_releases import (
    gemma_scope_1,
    gemma_scope_2,
    goodfire,
    goodfire_r1,
    llama_scope,
    openmoss,
    qresearch,
    qwen_scope,
)
from jaxsteer.errors import UserError
from jaxsteer.files.sae_form import Dictionary, Matrix, canonical, unit_decoder

log = logging.getLogger(__name__)

WEIGHTS = "sae_weights.safetensors"
CONFIG = "cfg.json"
OUT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Layout(NamedTuple):
    """A layout of files: how it is recognised (by keys first, names second) and read."""

    name: str
    files: str
    """For the message about an unknown folder."""
    fits: Callable[[SAEFiles, set[str]], bool]
    read: Callable[[SAEFiles], Dictionary]


def _oriented(found: SAEFiles) -> bool:
    """Whether W_enc is [in, out]: b_enc has an entry per latent."""
    W, b = found.tensors.get("W_enc"), found.tensors.get("b_enc")
    return W is None or b is None or W.shape[-1:] == b.shape


def _has_trainer(found: SAEFiles) -> bool:
    return isinstance(found.settings.get("config.json", {}).get("trainer"), dict)


_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
_OPENMOSS_CONFIG = {"act_fn", "norm_activation", "sae_type"}
LAYOUTS = (
    Layout(
        "Gemma Scope 1",
        "params.npz with W_enc, W_dec, b_enc, b_dec, threshold",
        lambda f, k: f.file.suffix == ".npz" and {"w_enc", "w_dec", "threshold"} <= {key.lower() for key in k},
        gemma_scope_1,
    ),
    Layout(
        "Gemma Scope 2",
        "params.safetensors with w_enc, w_dec, b_enc, b_dec, threshold",
        lambda f, k: f.file.suffix == ".safetensors" and {"w_enc", "w_dec", "b_enc", "b_dec"} <= k,
        gemma_scope_2,
    ),
    Layout(
        "Llama Scope",
        "hyperparams.json, checkpoints/final.safetensors with encoder.*, decoder.*",
        lambda f, k: "hyperparams.json" in f.settings and {"encoder.weight", "decoder.weight"} <= k,
        llama_scope,
    ),
    Layout(
        "OpenMOSS",
        "config.json, sae_weights.safetensors with encoder.*, decoder.* or W_E, b_E, W_D, b_D",
        lambda f, k: (
            bool(_OPENMOSS_CONFIG & f.settings.get("config.json", {}).keys())
            and ({"encoder.weight", "decoder.weight"} <= k or {"W_E", "W_D"} <= k)
        ),
        openmoss,
    ),
    Layout(
        "SAELens",
        "cfg.json, sae_weights.safetensors with W_enc, W_dec, b_dec",
        lambda f, k: "cfg.json" in f.settings and {"W_dec", "b_dec"} <= k and "encoder.weight" not in k,
        saelens,
    ),
    Layout(
        "sparsify",
        "cfg.json, sae.safetensors with encoder.weight, encoder.bias, W_dec, b_dec",
        lambda f, k: {"encoder.weight", "encoder.bias", "W_dec", "b_dec"} <= k,
        sparsify,
    ),
    Layout(
        "dictionary_learning",
        'ae.pt, config.json with "trainer"',
        lambda f, k: _has_trainer(f),
        dictionary_learning,
    ),
    Layout(
        "Qwen-Scope",
        "layer{i}.sae.pt with W_enc [F, D], W_dec [D, F], b_enc, b_dec",
        lambda f, k: (
            k == {"W_enc", "W_dec", "b_enc", "b_dec"} and f.file.name.endswith(".sae.pt") and not _has_trainer(f)
        ),
        qwen_scope,
    ),
    Layout(
        "Goodfire",
        "one .pt or .pth with encoder_linear.*, decoder_linear.*",
        lambda f, k: {"encoder_linear.weight", "decoder_linear.weight"} <= k,
        goodfire,
    ),
    Layout(
        "Goodfire R1",
        "one .pt with W, b_enc, b_dec",
        lambda f, k: k == {"W", "b_enc", "b_dec"},
        goodfire_r1,
    ),
    Layout(
        "qresearch",
        "one .pt with encoder.weight, encoder.bias, decoder.weight, decoder.bias, and no JSON",
        lambda f, k: k == _LINEAR and not _has_trainer(f) and f.file.suffix in (".pt", ".pth", ".bin"),
        qresearch,
    ),
)
"""Everything that is read."""

REFUSED: tuple[tuple[str, Callable[[SAEFiles, set[str]], bool]], ...] = (
    ("a cross-layer transcoder", lambda f, k: any(key.startswith(("W_enc_", "W_dec_")) for key in k)),
    ("a temporal SAE of SAELens, which attends to earlier tokens", lambda f, k: any(".attn" in f".{x}" for x in k)),
    ("an SAE of saex", lambda f, k: bool({"s_gate", "tgt_mean_norm", "mean_norm"} & k)),
    (
        "a transcoder of circuit-tracer (layer_{i}.safetensors, W_enc stored [F, D])",
        lambda f, k: f.file.suffix == ".safetensors" and "cfg.json" not in f.settings and not _oriented(f),
    ),
)
"""What is recognised and not read yet."""


def recognise_layout(found: SAEFiles) -> Layout:
    """The one layout that the file is of. Raises ``UserError`` with what was found and what is known."""
    keys = set(found.tensors)
    for name, fits in REFUSED:
        if fits(found, keys):
            found.refuse(f"it is {name}; jaxsteer does not read these yet")
    fitting = [layout for layout in LAYOUTS if layout.fits(found, keys)]
    if len(fitting) == 1:
        return fitting[0]
    known = "\n".join(f"  {layout.name}: {layout.files}" for layout in LAYOUTS)
    if fitting:
        names = " and ".join(layout.name for layout in fitting)
        found.refuse(
            f"it could be {names}. Move the file with its own JSON into a folder of its own. Known are\n{known}"
        )
    found.refuse(f"it is of no layout that is known. Known are\n{known}\n")


def read_sae(
    source: str | os.PathLike[str], *, unit_decoder_rows: bool | None = None, overrides: Overrides | None = None
) -> Dictionary:
    """The SAE at ``source`` (see ``sae_files.find``) in canonical form: no input scale, no subtraction of b_dec.

    ``unit_decoder_rows`` scales the decoder's rows to norm 1, which changes the units of the latents; by default it is
    done where the library of the layout does it. Raises ``UserError`` for what is unknown, ambiguous, damaged, or says
    too little (the message names the argument that is missing).
    """
    found = find_sae(source, dataclasses.replace(overrides or Overrides(), unit_decoder=unit_decoder_rows))
    try:
        d = canonical(recognise_layout(found).read(found))
    except UserError as error:
        raise error if found.origin in str(error) else UserError(f"{found.origin}: {error}") from error
    if unit_decoder_rows and d.config.latent_units != "unit decoder":
        d = unit_decoder(d)
    elif unit_decoder_rows is False and d.config.latent_units == "unit decoder":
        d.refuse("its layout gives latents in units of a unit decoder, and the stored ones cannot be had")
    return d


def saelens_config(d: Dictionary) -> tuple[dict[str, Any], list[str]]:
    """``cfg.json`` of SAELens 6 for an SAE in canonical form, and what SAELens cannot express about it."""
    config = d.config
    d_in, d_out, latents = *d.W_enc.shape[:1], len(d.b_dec), len(d.b_enc)
    site_out = config.site_out or config.site_in
    transcoder = site_out != config.site_in or d_in != d_out or d.W_skip is not None
    lost = []
    if config.activation == "groupmax":
        lost.append("the activation groupmax")
    if config.activation == "topk" and not config.relu:
        lost.append("top-k that keeps negative values")
    if transcoder and config.activation not in ("relu", "jumprelu"):
        lost.append(f"a transcoder or skip connection with the activation {config.activation}")
    if transcoder == config.restore_norm and config.input_norm != "none":
        lost.append("how its output is taken back to the input's norm")
    architecture = {"relu": "standard"}.get(config.activation, config.activation)
    if transcoder:
        architecture = "jumprelu_" * (config.activation == "jumprelu") + "skip_" * (d.W_skip is not None) + "transcoder"
    cfg: dict[str, Any] = {
        # An architecture that SAELens does not know is refused there; a nearly right one would be misread.
        "architecture": f"jaxsteer_{config.activation}" if lost else architecture,
        "d_in": d_in,
        "d_sae": latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.subtract_b_dec,
        "normalize_activations": {"constant_norm": "constant_norm_rescale"}.get(config.input_norm, config.input_norm),
        "reshape_activations": "hook_z" if (config.site_in or "").endswith("hook_z") else "none",
    }
    if transcoder:
        cfg["d_out"] = d_out
    if config.activation in ("topk", "abstopk"):
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    if config.activation == "matching_pursuit":
        cfg |= {
            "residual_threshold": config.residual_threshold,
            "max_iterations": config.max_steps,
            "stop_on_duplicate_support": config.stop_on_same_support,
        }
    cfg["metadata"] = {
        "model_name": config.model,
        "hook_name": config.site_in,
        "hook_name_out": site_out if transcoder else None,
        "hook_head_index": None,
        "prepend_bos": config.trained_with_bos,
        "jaxsteer": {"format": OURS, "config": config.to_json()},
    }
    return cfg, lost


def _saelens_tensors(d: Dictionary, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Arrays by SAELens' names: matrices in ``dtype``, vectors in float32."""
    matrices: dict[str, Matrix] = {"W_dec": d.W_dec}
    vectors = {"b_dec": d.b_dec}
    if d.config.activation != "matching_pursuit":
        matrices["W_enc"] = d.W_enc
        vectors["b_gate" if d.b_mag is not None else "b_enc"] = d.b_enc
    if d.b_mag is not None and d.mag_scale is not None:
        if not (np.all(d.mag_scale > 0) and np.all(np.isfinite(d.mag_scale))):
            d.refuse("the scales of its magnitudes are not positive numbers")
        vectors |= {"b_mag": d.b_mag, "r_mag": np.log(d.mag_scale)}
    if d.threshold is not None:
        vectors["threshold"] = d.threshold
    if d.W_skip is not None:  # SAELens keeps it [out, in]
        matrices["W_skip"] = Matrix(d.W_skip.stored, not d.W_skip.transposed, d.W_skip.columns, d.W_skip.rows)
    with np.errstate(over="ignore"):
        arrays = {name: matrix.read(dtype=dtype) for name, matrix in matrices.items()}
        arrays |= {name: vector.astype(np.float32) for name, vector in vectors.items()}
    for name, array in arrays.items():
        # An infinite threshold is how a latent is switched off.
        if name != "threshold" and not all_finite(array.reshape(-1).view(np.uint8).data, array.dtype):
            d.refuse(f"its {name} holds NaN or infinity as {array.dtype}")
    return arrays


def write_sae(d: Dictionary, out: str | os.PathLike[str], *, dtype: str = "float32") -> list[str]:
    """Write the folder ``out``, whole or not at all, and return what SAELens cannot express (empty: it reads the file).

    ``dtype`` is that of the matrices: "float32", "bfloat16" or "float16"; vectors are float32. Raises ``UserError``
    when ``out`` exists or cannot be written.
    """
    out = Path(out).absolute()
    if dtype not in OUT_DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported: give one of {', '.join(OUT_DTYPES)}.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already. Give a folder that does not, or remove it.")
    d = canonical(d)
    cfg, lost = saelens_config(d)
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        save_file(_saelens_tensors(d, DTYPES[OUT_DTYPES[dtype]]), temporary / WEIGHTS, {"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(cfg, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary / name, 0o644)  # safetensors writes for the owner alone
        os.chmod(temporary, 0o755)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}).") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    return lost


def main(arguments: list[str]) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 2 with one message for bad input."""
    parser = argparse.ArgumentParser(prog="checkpoints_convert sae", description=__doc__)
    parser.add_argument("src", metavar="SRC", help="folder or file of an SAE, or owner/name:folder on the hub")
    parser.add_argument("out", metavar="OUT", help="folder to create")
    parser.add_argument("--dtype", choices=list(OUT_DTYPES), default="float32", help="dtype of the matrices")
    parser.add_argument("--site", help="site it was trained at, where the files do not say")
    parser.add_argument("--model", help="hub id of the model it was trained on, where the files do not say")
    parser.add_argument("--k", type=int, help="number of active latents, where the files do not say")
    parser.add_argument("--norm-scaling-factor", type=float, help="factor on the inputs, where the files do not say")
    parser.add_argument("--use-threshold", action="store_true", help="top-k of dictionary_learning by its threshold")
    parser.add_argument("--unit-decoder", action="store_true", help="scale the decoder's rows to norm 1")
    options = parser.parse_args(arguments)
    overrides = Overrides(
        model=options.model,
        site=options.site,
        k=options.k,
        norm_scaling_factor=options.norm_scaling_factor,
        use_threshold=options.use_threshold,
    )
    try:
        d = read_sae(options.src, unit_decoder_rows=options.unit_decoder or None, overrides=overrides)
        lost = write_sae(d, options.out, dtype=options.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{d.config.format}: {len(d.b_enc)} latents at {d.config.site_in} of {d.config.model or 'an unknown model'}")
    for note in d.config.notes:
        print(f"  {note}")
    print(f"written to {options.out}")
    if lost:
        print(f"jaxsteer reads it; SAELens will refuse it, because it cannot express {'; '.join(lost)}")
    return 0
