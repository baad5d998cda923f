"""The sites of the network: one table of what they are called, how their values are laid out and what they cost.

``blocks.14.hook_resid_post`` is the residual stream after block 14. Names and meanings are those of TransformerLens;
other tools' names of the same places are accepted as aliases. Whoever reads, changes or differentiates values of a
model, or says what shape they have, asks ``KINDS``.

Letters: B rows, T tokens, U keys that attention sees, D width, N query heads, K key/value heads, H head width,
I MLP width.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from jaxsteer.errors import UserError
from jaxsteer.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of site: its name without the layer, and what all sites of the kind have in common."""

    name: str
    axes: str = "B T D"
    """Axes of a value, in the letters above; "1" is an axis of length 1."""
    stream: bool = False
    """Whether values are the residual stream, or exactly what is added to it: directions live there."""
    on_request: bool = False
    """Whether values are computed only where somebody looks; elsewhere they are computed anyway."""
    post_norm: bool = False
    """Whether it exists only in models with norms after attention and MLP (Gemma 2 and 3)."""
    gated: bool = False
    """Whether it exists only in models whose MLP has a gate (all but GPT-2)."""
    module: str | None = None
    """The same value in Hugging Face's modules, for nnsight: what goes into or comes out of a module of the layer.
    Of all families but GPT-2, whose modules are called otherwise."""
    point: str | None = None
    """The same value in interp-engine."""

    @property
    def in_block(self) -> bool:
        """Whether every block has one."""
        return self.name != "hook_embed" and not self.name.startswith("ln_final.")

    @property
    def heads(self) -> bool:
        """Whether values have an axis of heads."""
        return "N" in self.axes or "K" in self.axes

    @property
    def over_keys(self) -> bool:
        """Whether a value is a number for every head, query and key, and not a vector for every token."""
        return "U" in self.axes

    def exists(self, config: ModelConfig) -> bool:
        """Whether a model of this config has such sites."""
        return (config.post_norms or not self.post_norm) and (config.gated_mlp or not self.gated)

    def shape(self, config: ModelConfig) -> tuple[str | int, ...]:
        """Shape of a value, with the letters of those axes that the config does not decide.

        Raises ``UserError`` for a model without such sites.
        """
        if not self.exists(config):
            norms = "there is no norm after attention and MLP, as in Gemma 2 and 3"
            why = "its MLP has no gate" if self.gated else norms
            raise UserError(f"This model ({config.family}) has no {self.name}: {why}.")
        sizes = {"D": config.d_model, "N": config.n_heads, "K": config.n_kv_heads, "H": config.d_head}
        sizes |= {"I": config.d_mlp, "1": 1}
        return tuple(sizes.get(axis, axis) for axis in self.axes.split())

    def token_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of one token's value; the axis of keys is -1."""
        return tuple(-1 if size == "U" else int(size) for size in self.shape(config) if size not in ("B", "T"))

    def width(self, config: ModelConfig) -> int:
        """Entries of one token's value, heads joined. Raises ``UserError`` where there is a number for every key."""
        if self.over_keys:
            raise UserError(
                f"{self.name} holds a number for every key and has no fixed width, so that no SAE reads it."
            )
        return math.prod(self.token_shape(config))


def _norm(name: str, *, post_norm: bool = False) -> tuple[Kind, Kind]:
    """The normalised value is x / scale (LayerNorm: x without its mean); the norm's weight and bias come after it."""
    return (
        Kind(f"{name}.hook_scale", "B T 1", on_request=True, post_norm=post_norm),
        Kind(f"{name}.hook_normalized", on_request=True, post_norm=post_norm),
    )


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("hook_embed", stream=True),
        Kind("hook_resid_pre", stream=True, module="input", point="resid_pre"),
        Kind("hook_q_input", "B T N D", on_request=True),
        Kind("hook_k_input", "B T K D", on_request=True),
        Kind("hook_v_input", "B T K D", on_request=True),
        *_norm("ln1"),
        Kind("attn.hook_q", "B T N H", module="self_attn.q_proj.output"),
        Kind("attn.hook_k", "B T K H", module="self_attn.k_proj.output"),
        Kind("attn.hook_v", "B T K H", module="self_attn.v_proj.output", point="value"),
        Kind("attn.hook_rot_q", "B T N H"),
        Kind("attn.hook_rot_k", "B T K H"),
        Kind("attn.hook_attn_scores", "B N T U", on_request=True, point="attn_scores"),
        Kind("attn.hook_pattern", "B N T U", point="attn_probs"),
        Kind("attn.hook_z", "B T N H", module="self_attn.o_proj.input", point="z"),
        Kind("attn.hook_result", "B T N D", on_request=True),
        Kind("attn.hook_out", module="self_attn.output", point="attn_out"),
        *_norm("ln1_post", post_norm=True),
        Kind("hook_attn_out", stream=True, point="attn_out_post"),
        Kind("hook_resid_mid", stream=True, point="resid_mid"),
        Kind("hook_mlp_in", on_request=True),
        *_norm("ln2"),
        Kind("mlp.hook_in", module="mlp.input", point="mlp_in"),
        Kind("mlp.hook_pre", "B T I", module="mlp.gate_proj.output", point="mlp_pre"),
        Kind("mlp.hook_pre_linear", "B T I", gated=True, module="mlp.up_proj.output", point="mlp_pre_linear"),
        Kind("mlp.hook_post", "B T I", module="mlp.down_proj.input", point="mlp_act"),
        Kind("mlp.hook_out", module="mlp.output", point="mlp_out"),
        *_norm("ln2_post", post_norm=True),
        Kind("hook_mlp_out", stream=True, point="mlp_out_post"),
        Kind("hook_resid_post", stream=True, module="output", point="resid_post"),
        *_norm("ln_final"),
    )
}
"""By name, in the order in which a forward pass comes by."""

FINAL = tuple(name for name in KINDS if name.startswith("ln_final."))
"""The kinds behind the last block."""
_MODULES = {kind.module.removesuffix(".output"): name for name, kind in KINDS.items() if kind.module} | {
    "attn": "attn.hook_out",
    "attn.c_proj.input": "attn.hook_z",
    "mlp.c_fc": "mlp.hook_pre",
    "mlp.c_proj.input": "mlp.hook_post",
}
"""With GPT-2's names, whose layers are ``transformer.h.i``."""
_POINTS = {kind.point: name for name, kind in KINDS.items() if kind.point}
_N = "0|-?[1-9][0-9]*"
"""Numbers of layers: ASCII digits without leading zeros, so that a place has one name."""
_AFTER = re.compile(rf"(?:resid_post_layer_|layer_)({_N})|L({_N})R|blocks\.({_N})\.hook_out")
_BEFORE = re.compile(rf"hidden_states\[({_N})\]|blocks\.({_N})\.hook_in")
_BLOCK = re.compile(rf"blocks\.({_N})\.(.+)")
_MODULE = re.compile(rf"(?:(?:(?:model|language_model)\.)*layers|(?:transformer\.)?h)\.({_N})(?:\.(.+))?")
_POINT = re.compile(rf"([a-z_]+)\.({_N})")


@dataclasses.dataclass(frozen=True, order=True)
class Site:
    """A place in one model: ``layer`` counts from 0 (and is 0 outside of the blocks), ``name`` is canonical."""

    layer: int
    kind: str
    """A key of ``KINDS``."""

    @property
    def name(self) -> str:
        """The TransformerLens name."""
        return f"blocks.{self.layer}.{self.kind}" if KINDS[self.kind].in_block else self.kind

    def depth(self, n_layers: int) -> int:
        """Blocks of ``n_layers`` to run before its value is known."""
        if self.kind in FINAL:
            return n_layers
        return self.layer + 1 if KINDS[self.kind].in_block else 0

    def as_stream(self) -> Site:
        """The site that holds the same value where nothing is edited and is known a block earlier: the stream before
        a block is the stream after the one below. The site itself if there is none.
        """
        if self.kind != "hook_resid_pre":
            return self
        return Site(self.layer - 1, "hook_resid_post") if self.layer else Site(0, "hook_embed")


def site_shapes(config: ModelConfig) -> dict[str, tuple[str | int, ...]]:
    """By kind, the shape of a value in a run over whole texts: B rows, T tokens (keys as well)."""
    return {
        name: tuple("T" if size == "U" else size for size in kind.shape(config))
        for name, kind in KINDS.items()
        if kind.exists(config)
    }


def resid_site(layer: int) -> str:
    """The name of the residual stream after block ``layer``."""
    return Site(layer, "hook_resid_post").name


def layers_by_kind(sites: Iterable[Site]) -> dict[str, tuple[int, ...]]:
    """The layers of each kind of site, in order, without repetition."""
    found: dict[str, set[int]] = {}
    for site in sites:
        found.setdefault(site.kind, set()).add(site.layer)
    return {kind: tuple(sorted(layers)) for kind, layers in sorted(found.items())}


def every_layer(name: str) -> str | None:
    """The kind of site that a name with a wildcard ("blocks.*.hook_resid_post") means in every layer; else None."""
    return parse_site(name.replace("*", "0", 1)).kind if "*" in name else None


def find_sites(names: str | Sequence[str], config: ModelConfig) -> dict[str, Site]:
    """The sites called ``names``, by these names; a name with a wildcard gives those of every layer, by their own.

    Raises ``UserError`` as ``parse_site``, and for sites that the model does not have.
    """
    found: dict[str, Site] = {}
    for name in [names] if isinstance(names, str) else names:
        if (kind := every_layer(name)) is None:
            found[name] = parse_site(name, config.n_layers)
        else:
            found |= {site.name: site for site in (Site(layer, kind) for layer in range(config.n_layers))}
    for site in found.values():
        KINDS[site.kind].shape(config)
    return found


def alias(site: Site, tool: Literal["nnsight", "interp-engine"]) -> str:
    """The name of a site in another tool, which ``parse_site`` reads. Both tools join heads in the last axis.

    Raises ``UserError`` for a site that has no name there.
    """
    kind = KINDS[site.kind]
    if tool == "nnsight" and kind.module is not None:
        return f"model.layers.{site.layer}.{kind.module}"
    if tool == "interp-engine" and kind.point is not None:
        return f"{kind.point}.{site.layer}"
    raise UserError(f"{tool} has no name for {site.name}.")


def parse_site(name: str, n_layers: int | None = None) -> Site:
    """The site called ``name`` in a model of ``n_layers`` layers, or of any depth.

    Accepts ``blocks.i.<kind>``, the kinds outside of the blocks (``hook_embed``, ``ln_final.hook_scale``), and the
    names of other tools: ``layers.i`` or ``model.layers.i`` (also with ``.output``, ``.mlp``, ``.self_attn.q_proj``
    ... as Hugging Face calls its modules, and ``transformer.h.i`` as in GPT-2), ``resid_post.i`` ... (interp-engine),
    ``resid_post_layer_i``, ``layer_i``, ``LiR``, ``blocks.i.hook_out`` (after block i), ``blocks.i.hook_in`` and
    ``hidden_states[i]`` (before it; ``hidden_states[L]`` is refused, because transformers gives the normalised stream
    there). Negative i counts from
    the last layer, where the depth is given. Raises ``UserError`` for anything else.
    """
    text = str(name).strip()
    if re.search(r"\d{7}", text):
        raise UserError(f"Site {text[:40]!r} has a number of so many digits that it is no layer of any model.")
    if text in KINDS and not KINDS[text].in_block:
        return Site(0, text)
    if (match := _MODULE.fullmatch(text)) and (
        kind := _MODULES.get((match.group(2) or "output").removesuffix(".output"))
    ):
        return Site(_layer(match.group(1), n_layers, text), kind)
    if (match := _POINT.fullmatch(text)) and (kind := _POINTS.get(match.group(1))):
        return Site(_layer(match.group(2), n_layers, text), kind)
    if match := _AFTER.fullmatch(text):
        return Site(_layer(next(g for g in match.groups() if g is not None), n_layers, text), "hook_resid_post")
    if match := _BEFORE.fullmatch(text):
        index = next(g for g in match.groups() if g is not None)
        if n_layers is not None and text.startswith("hidden_states") and int(index) in (n_layers, -1):
            raise UserError(
                f"Site {text!r}: the last entry of transformers' hidden_states comes after the final norm and is not a "
                f"residual stream. Use {resid_site(n_layers - 1)!r} for the stream after the last block."
            )
        # hidden_states has L + 1 entries, so that -2 is the input of the last block.
        shift = 1 if text.startswith("hidden_states") and int(index) < 0 else 0
        return Site(_layer(str(int(index) + shift), n_layers, text), "hook_resid_pre")
    inside = ", ".join(kind.name for kind in KINDS.values() if kind.in_block)
    if match := _BLOCK.fullmatch(text):
        if match.group(2) not in KINDS or not KINDS[match.group(2)].in_block:
            raise UserError(f"Site {text!r} names no place that can be read. Inside a block there are: {inside}.")
        return Site(_layer(match.group(1), n_layers, text), match.group(2))
    deepest = "" if n_layers is None else f"; this model has blocks 0 to {n_layers - 1}"
    raise UserError(
        f"{text!r} is not the name of a site. Write for example {resid_site(min(2, (n_layers or 3) - 1))!r} (the "
        f"residual stream after that block{deepest}), 'hook_embed', or a place inside a block: {inside}."
    )


def _layer(text: str, n_layers: int | None, name: str) -> int:
    index = int(text)
    if n_layers is None:
        if index < 0:
            raise UserError(
                f"Site {name!r} counts from the last layer, but the depth of the model is not known here. Give the "
                f"layer's number, or parse_site({name!r}, n_layers).name."
            )
        return index
    if not -n_layers <= index < n_layers:
        raise UserError(
            f"Site {name!r} is beyond the last layer: the model has {n_layers} layers, so the layer must be 0 to "
            f"{n_layers - 1} (or -{n_layers} to -1, counted from the end)."
        )
    return index % n_layers
