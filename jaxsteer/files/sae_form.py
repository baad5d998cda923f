"""Sparse autoencoders on the host: the one form that every reader gives and every writer takes.

    x' = input_norm(x) * input_scale - [subtract_b_dec] * b_dec
    p  = x' @ W_enc + b_enc;    f = activation(p)
    y  = input_norm^-1((f @ W_dec + b_dec) / output_scale) + x @ W_skip

The rewritings below are exact: after ``canonical`` neither input scale nor subtraction of the decoder's bias is left,
and only ``unit_decoder`` changes the units of the latents. All arithmetic is float64; matrices stay in the dtype of
their file and take their factors when they are read.

Letters: D_in width at the input site, D_out at the output site, F latents.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NoReturn

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.files.records import Record

Activation = Literal["relu", "jumprelu", "gated", "topk", "abstopk", "groupmax", "matching_pursuit"]
ELEMENTWISE = ("relu", "jumprelu", "gated")
"""Activations in which a latent does not depend on the others."""
NEEDS_K = ("topk", "abstopk", "groupmax")
_BLOCK = 1 << 23


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAEConfig(Record):
    """What an SAE computes, and where it belongs. Frozen and hashable: the static part of the pytree ``SAE``."""

    activation: Activation
    """relu; jumprelu: relu(p) where p > threshold; gated; topk: the k largest; abstopk: the k of largest magnitude,
    signs kept; groupmax: the largest of each of k equal blocks; matching_pursuit: greedy, with the decoder's rows."""
    k: int | None = None
    relu: bool = True
    """Of topk and groupmax: negative values become 0 (Qwen-Scope keeps them)."""
    input_norm: Literal["none", "constant_norm", "layer_norm"] = "none"
    """Of every row: none; to norm sqrt(D_in); minus its mean, over its standard deviation (n - 1) + 1e-5."""
    restore_norm: bool = True
    """Whether the output is taken back to the row's norm (and mean). Transcoders of SAELens do not."""
    input_scale: float = 1.0
    output_scale: float = 1.0
    subtract_b_dec: bool = False
    """Whether b_dec is subtracted from the (normalised, scaled) input."""
    residual_threshold: float = 0.0
    """Of matching_pursuit: stop once the residual's norm is smaller; 0 for never."""
    max_steps: int | None = None
    """Of matching_pursuit: at most so many latents are added up; D_in by default."""
    stop_on_same_support: bool = True
    """Of matching_pursuit: stop after a step that made no new latent active."""
    latent_units: Literal["as stored", "unit decoder"] = "as stored"
    """The folding: latents, thresholds and signature weights are comparable only within one."""
    model: str | None = None
    """Hub id of the model that it was trained on, or None if nothing says so."""
    site_in: str | None = None
    """Name of the site that is encoded."""
    site_out: str | None = None
    """Name of the site that is reconstructed: that of the input, but for transcoders."""
    trained_with_bos: bool | None = None
    """Whether rows began with BOS in training (None: not said). In either case leave BOS out of statistics."""
    format: str = "jaxsteer"
    """The layout that it was read from."""
    notes: tuple[str, ...] = ()
    """What was rewritten while it was read, and what differs from training."""

    def __post_init__(self) -> None:
        """Refuse a selection without its k, and numbers that cannot be."""
        if (self.activation in NEEDS_K or self.k is not None) and (type(self.k) is not int or self.k < 1):
            raise UserError(f"An SAE with the activation {self.activation!r} needs k >= 1, got k={self.k!r}.")
        for name in ("input_scale", "output_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"The {name} of an SAE must be a finite number above 0, got {getattr(self, name)}.")
        if not 0 <= self.residual_threshold < math.inf or (self.max_steps is not None and self.max_steps < 1):
            raise UserError(
                f"Matching pursuit needs residual_threshold >= 0 and max_steps >= 1, got {self.residual_threshold} and "
                f"{self.max_steps}."
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary of all fields; ``from_json`` is its inverse."""
        return dataclasses.asdict(self) | {"notes": list(self.notes)}


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix [in, out] as a file holds it, with factors on its rows and columns that are applied when it is read."""

    stored: np.ndarray
    transposed: bool = False
    """The file has [out, in]."""
    rows: np.ndarray | None = None
    """float64 [in]."""
    columns: np.ndarray | None = None
    """float64 [out]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        a, b = self.stored.shape
        return (b, a) if self.transposed else (a, b)

    def scaled(self, *, rows: np.ndarray | float = 1.0, columns: np.ndarray | float = 1.0) -> Matrix:
        """``diag(rows) @ self @ diag(columns)``."""

        def merged(old: np.ndarray | None, new: np.ndarray | float, size: int) -> np.ndarray | None:
            if np.ndim(new) == 0 and new == 1.0:
                return old
            factor = np.broadcast_to(np.asarray(new, np.float64), (size,))
            return factor if old is None else old * factor

        n_in, n_out = self.shape
        return dataclasses.replace(
            self, rows=merged(self.rows, rows, n_in), columns=merged(self.columns, columns, n_out)
        )

    def read(self, rows: slice = slice(None), columns: slice = slice(None), dtype: Any = np.float64) -> np.ndarray:
        """A part, rounded once from float64 where there are factors. Takes little memory beyond its result."""
        view = (self.stored.T if self.transposed else self.stored)[rows, columns]
        if self.rows is None and self.columns is None and view.dtype == dtype:
            return np.array(view, order="C")  # a copy: the file may be mapped, and change later
        out = np.empty(view.shape, dtype)
        along = 1 if self.transposed else 0  # blocks of whole rows of the file
        step = max(1, _BLOCK // max(1, view.shape[1 - along]))
        for start in range(0, view.shape[along], step):
            part = (slice(start, start + step), slice(None))[:: 1 - 2 * along]
            with np.errstate(over="ignore", invalid="ignore"):  # whoever cannot use NaN or infinity looks for them
                block = view[part].astype(np.float64)
                if self.rows is not None:
                    block *= self.rows[rows][part[0], None]
                if self.columns is not None:
                    block *= self.columns[columns][part[1]]
                out[part] = block
        return out

    def before(self, vector: np.ndarray) -> np.ndarray:
        """``vector @ self`` in float64, block by block."""
        n_in, n_out = self.shape
        out = np.empty(n_out)
        step = max(1, _BLOCK // max(1, n_in))
        for start in range(0, n_out, step):
            out[start : start + step] = vector @ self.read(columns=slice(start, start + step))
        return out

    def row_norms(self) -> np.ndarray:
        """The norm of every row, float64 [in]."""
        n_in, n_out = self.shape
        step = max(1, _BLOCK // max(1, n_out))
        parts = [np.linalg.norm(self.read(slice(i, i + step)), axis=1) for i in range(0, n_in, step)]
        return np.concatenate(parts) if parts else np.zeros(0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dictionary:
    """One SAE on the host. Vectors are float64; shapes are checked when it is made."""

    config: SAEConfig
    W_enc: Matrix
    W_dec: Matrix
    b_enc: np.ndarray
    """[F]; of a gated SAE the bias of the gate."""
    b_dec: np.ndarray
    threshold: np.ndarray | None = None
    b_mag: np.ndarray | None = None
    """Of a gated SAE: f = (g + b_enc > 0) * relu(g * mag_scale + b_mag) with g = x' @ W_enc."""
    mag_scale: np.ndarray | None = None
    W_skip: Matrix | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that do not belong together (biases decide which side of a matrix is which), and NaN."""
        for name in ("b_enc", "b_dec", "threshold", "b_mag", "mag_scale"):
            vector = getattr(self, name)
            # An infinite threshold is how a latent is switched off.
            if vector is not None and (np.isnan(vector) | (np.isinf(vector) & (name != "threshold"))).any():
                self.refuse(f"its {name} holds NaN or infinity")
        f, d_out, d_in = len(self.b_enc), len(self.b_dec), self.W_enc.shape[0]
        expected: dict[str, tuple[Any, tuple[int, ...]]] = {
            "W_enc": (self.W_enc, (d_in, f)),
            "W_dec": (self.W_dec, (f, d_out)),
        }
        expected |= {"W_skip": (self.W_skip, (d_in, d_out))}
        expected |= {name: (getattr(self, name), (f,)) for name in ("threshold", "b_mag", "mag_scale")}
        wrong = [f"{n} {a.shape}, not {s}" for n, (a, s) in expected.items() if a is not None and a.shape != s]
        if wrong:
            self.refuse(
                f"with {f} latents (b_enc) and an output of width {d_out} (b_dec), these shapes [in, out] do not fit: "
                f"{'; '.join(wrong)}. The file is damaged, or is of another layout than it looks like"
            )
        kind = self.config.activation
        if (kind == "jumprelu") != (self.threshold is not None) or (kind == "gated") != (self.b_mag is not None):
            self.refuse(f"its arrays are not those of the activation {kind!r}")
        if self.config.subtract_b_dec and d_in != d_out:
            self.refuse(f"b_dec of width {d_out} cannot be subtracted from an input of width {d_in}")
        if self.config.k is not None and (self.config.k > f or (kind == "groupmax" and f % self.config.k)):
            self.refuse(f"k={self.config.k} does not go with {f} latents")

    def refuse(self, why: str) -> NoReturn:
        """Raise the error of an SAE that cannot be used."""
        raise UserError(f"This SAE ({self.config.format}) is refused: {why}.")

    def replace(self, note: str | None = None, /, **changes: Any) -> Dictionary:
        """Changed fields, those of the config by their own names, with a note of what was done."""
        names = {field.name for field in dataclasses.fields(SAEConfig)}
        config = dataclasses.replace(self.config, **{k: v for k, v in changes.items() if k in names})
        if note:
            config = dataclasses.replace(config, notes=(*config.notes, note))
        return dataclasses.replace(self, config=config, **{k: v for k, v in changes.items() if k not in names})


def drop_b_dec(d: Dictionary) -> Dictionary:
    """The same SAE without subtraction of b_dec from its input: ``b_enc -= b_dec @ W_enc``. Latents keep their units.

    Matching pursuit, which is not affine in its input, is returned as it is.
    """
    if not d.config.subtract_b_dec or d.config.activation == "matching_pursuit":
        return d
    shift = d.W_enc.before(d.b_dec)
    if not np.isfinite(shift).all():
        d.refuse("its W_enc holds NaN or infinity")
    b_mag = None if d.b_mag is None or d.mag_scale is None else d.b_mag - d.mag_scale * shift
    return d.replace(
        "subtraction of b_dec from the input folded into b_enc",
        b_enc=d.b_enc - shift,
        b_mag=b_mag,
        subtract_b_dec=False,
    )


def drop_scales(d: Dictionary) -> Dictionary:
    """The same SAE without constant input and output scales: ``W_enc *= s; W_dec /= s_out; b_dec /= s_out``."""
    s, s_out = d.config.input_scale, d.config.output_scale
    if s == 1.0 and s_out == 1.0:
        return d
    if d.config.activation == "matching_pursuit":
        d.refuse("an input scale cannot be folded into a decoder that also encodes (matching pursuit)")
    d = drop_b_dec(d)  # first: it is subtracted from the scaled input
    return d.replace(
        f"input scale {s:.9g} and output scale {s_out:.9g} folded into the weights",
        W_enc=d.W_enc.scaled(columns=s),
        W_dec=d.W_dec.scaled(columns=1.0 / s_out),
        b_dec=d.b_dec / s_out,
        input_scale=1.0,
        output_scale=1.0,
    )


def canonical(d: Dictionary) -> Dictionary:
    """Without scales and without subtraction; the same latents in the same units."""
    return drop_b_dec(drop_scales(d))


def unit_decoder(d: Dictionary, *, selects_by_norm: bool = False) -> Dictionary:
    """The same SAE with decoder rows of norm 1 (rows of zeros stay): latent j becomes f_j * |W_dec[j]|.

    Refused where latents compete, because their order would change, unless they competed by p_j * |W_dec[j]| already
    (``selects_by_norm``).
    """
    if d.config.activation not in ELEMENTWISE and not selects_by_norm:
        d.refuse(f"unit decoder rows would change which latents win ({d.config.activation}); read it without")
    norms = d.W_dec.row_norms()
    norms = np.where((norms > 0) & np.isfinite(norms), norms, 1.0)

    def times(vector: np.ndarray | None) -> np.ndarray | None:
        return None if vector is None else vector * norms

    return d.replace(
        "decoder rows scaled to norm 1, and the encoder with them",
        W_enc=d.W_enc.scaled(columns=norms),
        W_dec=d.W_dec.scaled(rows=1.0 / norms),
        b_enc=d.b_enc * norms,
        b_mag=times(d.b_mag),
        threshold=times(d.threshold),
        latent_units="unit decoder",
    )
