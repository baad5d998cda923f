"""What all pages share: templates that escape everything, settings as pairs, JSON inside a page, shades of tokens."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from jaxsteer.display import compact, decimals, ends, escaped, interval, percent, points, signed, visible


@functools.cache
def template(name: str) -> jinja2.Template:
    """A template of this room. What is put into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxsteer.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (visible, escaped, percent, points, signed, decimals, compact, ends, interval)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(f"{name}.html.jinja")


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text) pairs; lists of plain values stay on one line."""
    if isinstance(value, Mapping):
        start = f"{prefix}." if prefix else ""
        return [pair for key, inner in value.items() for pair in flat(inner, f"{start}{key}")]
    text = value if isinstance(value, str) else json.dumps(_finite(_digits(value)), ensure_ascii=False)
    return [(visible(prefix), visible(text if len(text) <= 400 else text[:399] + "…"))]


def embedded(value: Any) -> Markup:
    """JSON that can stand inside a script element: no "<", ">" or "&" is left to be read as markup."""
    text = json.dumps(_finite(value), ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def shaded(effects: Sequence[float]) -> list[int]:
    """Strength of each token's colour in percent, 60 for the largest effect."""
    largest = max((abs(effect) for effect in effects), default=0.0) or 1.0
    return [round(60 * abs(effect) / largest) for effect in effects]


def _digits(value: Any) -> Any:
    """``value`` with numbers of six digits, as people read them."""
    if isinstance(value, list | tuple):
        return [_digits(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinities, which JSON does not know, as null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
