"""Sites: places in the network, by their TransformerLens names.

``blocks.14.hook_resid_post`` is the residual stream after block 14. The names and their Hugging Face places are
those of TransformerLens; the aliases are the layer names that other steering tools write.
"""

from __future__ import annotations

import dataclasses
import re

from jaxsteer.errors import UserError

STREAM_PLACES = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
BLOCK_PLACES = STREAM_PLACES + (
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_pattern",
    "attn.hook_z",
    "mlp.hook_in",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
)
"""Places inside block i, written ``blocks.i.<place>``; the ones that the transformer's ``tap`` visits."""

_AFTER = re.compile(r"(?:resid_post_layer_|model\.layers\.|layers\.|layer_)(-?\d+)|L(-?\d+)R|blocks\.(-?\d+)\.hook_out")
_BEFORE = re.compile(r"hidden_states\[(-?\d+)\]|blocks\.(-?\d+)\.hook_in")
_BLOCK = re.compile(r"blocks\.(-?\d+)\.(.+)")


@dataclasses.dataclass(frozen=True, order=True)
class Site:
    """A place in one model: ``layer`` counts from 0 (and is 0 for ``hook_embed``), ``name`` is canonical."""

    layer: int
    place: str

    @property
    def name(self) -> str:
        """The TransformerLens name."""
        return self.place if self.place == "hook_embed" else f"blocks.{self.layer}.{self.place}"


def resid_site(layer: int) -> str:
    """The name of the residual stream after block ``layer``."""
    return f"blocks.{layer}.hook_resid_post"


def parse_site(name: str, n_layers: int) -> Site:
    """The site called ``name`` in a model of ``n_layers`` layers.

    Accepts ``hook_embed``, ``blocks.i.<place>`` and the aliases ``resid_post_layer_i``, ``layers.i``,
    ``model.layers.i``, ``layer_i``, ``LiR``, ``blocks.i.hook_out`` (all: after block i), ``blocks.i.hook_in`` and
    ``hidden_states[i]`` (before block i; ``hidden_states[L]`` is refused, because transformers gives the normalised
    stream there). Negative i counts from the last layer. Raises ``UserError`` for anything else.
    """
    text = str(name).strip()
    if text == "hook_embed":
        return Site(0, "hook_embed")
    if match := _AFTER.fullmatch(text):
        return Site(_layer(next(g for g in match.groups() if g is not None), n_layers, text), "hook_resid_post")
    if match := _BEFORE.fullmatch(text):
        index = next(g for g in match.groups() if g is not None)
        if text.startswith("hidden_states") and int(index) in (n_layers, -1):
            raise UserError(
                f"Site {text!r}: the last entry of transformers' hidden_states comes after the final norm and is not a "
                f"residual stream. Use {resid_site(n_layers - 1)!r} for the stream after the last block."
            )
        # hidden_states has L + 1 entries, so that -2 is the input of the last block.
        shift = 1 if text.startswith("hidden_states") and int(index) < 0 else 0
        return Site(_layer(str(int(index) + shift), n_layers, text), "hook_resid_pre")
    if match := _BLOCK.fullmatch(text):
        if match.group(2) not in BLOCK_PLACES:
            raise UserError(
                f"Site {text!r} names no place that can be read. Inside a block there are: {', '.join(BLOCK_PLACES)}."
            )
        return Site(_layer(match.group(1), n_layers, text), match.group(2))
    raise UserError(
        f"{text!r} is not the name of a site. Write for example {resid_site(min(2, n_layers - 1))!r} (the residual "
        f"stream after that block; this model has blocks 0 to {n_layers - 1}), 'hook_embed', or a place inside a "
        f"block: {', '.join(BLOCK_PLACES)}."
    )


def _layer(text: str, n_layers: int, name: str) -> int:
    index = int(text)
    if not -n_layers <= index < n_layers:
        raise UserError(
            f"Site {name!r} is beyond the last layer: the model has {n_layers} layers, so the layer must be 0 to "
            f"{n_layers - 1} (or -{n_layers} to -1, counted from the end)."
        )
    return index % n_layers
