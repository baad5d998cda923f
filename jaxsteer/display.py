"""What people see: numbers and texts in words, aligned tables, and figures as SVG, PNG and CSV.

Figures are drawn once by matplotlib; inside a page they take its colours, light and dark.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import html
import io
import itertools
import math
import re
import shutil
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxsteer.files import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, ACCENT, OTHER, BAND, PAGE = (
    "#1c2330", "#5d6675", "#dde1e7", "#1f6feb", "#c2571a", "#e9ebee", "#ffffff",
)  # fmt: skip
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent", OTHER: "other", BAND: "band", PAGE: "page"}
"""Colours of a figure, and the variable of the page's style sheet that takes each one's place."""

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "jaxsteer",
    "text.color": INK, "text.parse_math": False, "axes.edgecolor": RULE, "axes.labelcolor": MUTED,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "grid.color": RULE, "grid.linewidth": 0.8, "xtick.color": RULE, "ytick.color": RULE,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip


_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: Any) -> str:
    """``text`` with everything that does not print (newlines, escapes, direction marks) written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def escaped(text: str) -> str:
    """``text`` of several lines with what a terminal would obey (escapes, direction marks) and halves of characters
    written as in JSON; JSON stays JSON."""
    return _OBEYED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def short(text: Any, width: int = 60) -> str:
    """``visible`` text of at most ``width`` letters."""
    shown = visible(text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def number(value: Any) -> float | None:
    """``value`` as a finite float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def columns(otherwise: int = 120) -> int:
    """Letters in a line of the terminal, or so many where there is none."""
    return shutil.get_terminal_size((otherwise, 0)).columns


def percent(value: Any) -> str:
    """0.0625 as "6.2 %"; a dash where there is no number."""
    share = number(value)
    return "–" if share is None else f"{100 * share:.1f} %"


def decimals(value: Any, digits: int = 2) -> str:
    """A number with a fixed count of decimals; a dash where there is none."""
    given = number(value)
    return "–" if given is None else f"{given:.{digits}f}"


def duration(hours: float) -> str:
    """Hours as "0.68 h", below a tenth of one as minutes or seconds."""
    if hours >= 0.1:
        return f"{hours:.2f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.1f} s"


def compact(value: Any) -> str:
    """A number of any size in a few digits; a dash where there is none."""
    given = number(value)
    if given is None:
        return "–"
    return f"{given:.1f}" if abs(given) < 1000 else f"{given:,.0f}" if abs(given) < 1e6 else f"{given:.1e}"


def interval(found: Any) -> str:
    """What has a ``rate`` and an interval ``ci95``: "6.2 % (3.1–11.9)"; a dash for None."""
    if found is None:
        return "–"
    return share(found.rate, found.ci95)


def share(value: float | None, ci95: Sequence[float] | None) -> str:
    """A share and its interval, where it has one: "6.2 % (3.1–11.9)"; a dash for None."""
    return percent(value) + (f" ({ends(ci95)})" if value is not None and ci95 is not None else "")


def ends(ci95: Sequence[float] | None) -> str:
    """An interval of shares in percent: "3.1–11.9"."""
    return "" if ci95 is None else f"{100 * ci95[0]:.1f}–{100 * ci95[1]:.1f}"


def points(found: Any) -> str:
    """A change of a rate, which has a ``value`` and an interval ``ci95``, in points: "-75.6 (-83.0 to -67.1)"."""
    change = None if found is None else number(found.value)
    if change is None:
        return "–"
    return f"{100 * change:+.1f}" + (
        f" ({100 * found.ci95[0]:+.1f} to {100 * found.ci95[1]:+.1f})" if found.ci95 else ""
    )


def signed(found: Any) -> str:
    """A change of another number, which has a ``value`` and an interval ``ci95``: "+0.34 (+0.10 to +0.58)"."""
    change = None if found is None else number(found.value)
    if change is None:
        return "–"
    return f"{change:+.2f}" + (f" ({found.ci95[0]:+.2f} to {found.ci95[1]:+.2f})" if found.ci95 else "")


def aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,), note: str = "") -> str:
    """Columns padded to their widest cell, those of ``left`` starting at the left; a rule below row 0, and below all a
    ``note``.

    Where a terminal is narrower, cells take several lines; where words would have to be cut, every row is a paragraph
    with a line per cell.
    """
    widths, end = _widths(rows), f"\n\n{wrapped(note)}" * bool(note)
    if widths is None:
        named = [[pair for pair in zip(rows[0], row, strict=True) if any(pair)] for row in rows[1:]]
        return "\n\n".join("\n".join(listed(pairs, indent=0)) for pairs in named) + end
    lines: list[list[str]] = []
    for row in rows:
        cells = [_broken(cell, size) for cell, size in zip(row, widths, strict=True)]
        lines.append(
            [
                "  ".join(
                    cell.ljust(size) if i in left else cell.rjust(size)
                    for i, (cell, size) in enumerate(zip(line, widths, strict=True))
                ).rstrip()
                for line in itertools.zip_longest(*cells, fillvalue="")
            ]
        )
    rule = "-" * max(len(line) for row in lines for line in row)
    return "\n".join([*lines[0], rule, *itertools.chain.from_iterable(lines[1:])]) + end


def listed(pairs: Iterable[tuple[str, Any]], *, indent: int = 2) -> list[str]:
    """Lines of names and values; a value that is longer than what a terminal has left goes on below itself."""
    known = [(name, str(value)) for name, value in pairs]
    start = indent + 2 + max(len(name) for name, _ in known)
    lines = []
    for name, value in known:
        first, *more = _broken(value, max(_LEAST, columns(_ENDLESS) - start))
        lines += [f"{' ' * indent}{name}".ljust(start) + first, *(" " * start + line for line in more)]
    return [line.rstrip() for line in lines]


def wrapped(text: str) -> str:
    """Lines that are too long for the terminal (or a page), broken between words."""
    return "\n".join(
        textwrap.fill(line, columns(), break_long_words=False, break_on_hyphens=False) for line in text.split("\n")
    )


_ENDLESS = 1 << 20
_LEAST = 12
"""Letters in which a value goes on below itself, however narrow the terminal."""


def _widths(rows: Sequence[Sequence[str]]) -> list[int] | None:
    """Widths of columns that fit the terminal, the widest made narrower first; None where words would be cut."""
    room, places = columns(_ENDLESS) - 2 * (len(rows[0]) - 1), range(len(rows[0]))
    widths = [max(len(row[i]) for row in rows) for i in places]
    words = [max(len(word) for row in rows for word in row[i].split() or [""]) for i in places]
    while sum(widths) > room and (wide := [i for i in places if widths[i] > words[i]]):
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths if sum(widths) <= room else None


def _broken(cell: str, width: int) -> list[str]:
    return [cell] if len(cell) <= width else textwrap.wrap(cell, width, break_on_hyphens=False) or [""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure with the numbers behind it."""

    name: str
    """Stem of its files."""
    title: str
    """What it shows, for those who cannot see it."""
    figure: Figure
    rows: tuple[Mapping[str, Any], ...]
    """What the CSV holds."""
    tips: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Text shown over an element of the figure, by the element's gid."""

    def svg(self, *, themed: bool = False) -> str:
        """The figure as SVG; ``themed`` takes colours and fonts from the page around it."""
        text = self._saved("svg").decode("utf-8")
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
        for gid, tip in self.tips.items():
            text = text.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{html.escape(visible(tip))}</title>')
        text = text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(self.title)}" ', 1)
        if themed:
            for colour, name in VARIABLES.items():
                text = text.replace(colour, f"var(--{name})")
            text = re.sub(r'(<svg [^>]*?) width="([\d.]+)pt" height="[\d.]+pt"', _scaled, text, count=1)
            text = _small(text).replace('id="', f'id="{self.name}-')
            text = text.replace('xlink:href="#', f'xlink:href="#{self.name}-').replace("url(#", f"url(#{self.name}-")
        return text

    def png(self) -> bytes:
        """The figure on white."""
        return self._saved("png", dpi=160, facecolor=PAGE)

    def csv(self) -> str:
        """The numbers, one row per element of the figure."""
        out = io.StringIO()
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()

    def write(self, directory: Path) -> list[Path]:
        """``name.svg``, ``name.png`` and ``name.csv`` in ``directory``."""
        paths = [directory / f"{self.name}.{kind}" for kind in ("svg", "png", "csv")]
        write_text(paths[0], self.svg())
        write_bytes(paths[1], self.png())
        write_text(paths[2], self.csv())
        return paths

    def _saved(self, kind: str, **options: Any) -> bytes:
        from matplotlib import rc_context

        out = io.BytesIO()
        with rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # prompts may hold any script
            metadata = {"Date": None} if kind == "svg" else {}
            self.figure.savefig(out, format=kind, metadata=metadata, **options)
        return out.getvalue()


def write_figure(path: Path, figure: Figure) -> Path:
    """Write a figure as it is drawn as PNG, and return its path."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    write_bytes(path, drawn.getvalue())
    return path


def _small(svg: str) -> str:
    """An SVG in half the letters: places to a hundredth of a point, fonts of the page, no indentation."""
    svg = re.sub(r' (?:d|x|y|transform)="[^"<>]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"<>]*\)"', "", svg)
    svg = re.sub(r"font-family: [^;\"<>]*sans-serif'?; ?", "", svg)
    svg = re.sub(r"(style=\"font: [^;'\"<>]*)'[^;\"<>]*sans-serif'?", r"\1system-ui, sans-serif", svg)
    return re.sub(r"\s*\n\s*", "\n", svg)


def _scaled(match: re.Match[str]) -> str:
    """As wide as its place, at most its natural size, and on a phone wide enough to be read by scrolling."""
    points = float(match[2])
    return f'{match[1]} style="width:100%;max-width:{points * 1.35:.0f}px;min-width:{min(points, 620):.0f}px"'


def panels(count: int = 1, *, width: float, height: float, share_y: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """A figure of ``count`` axes side by side, ``width`` x ``height`` inches in all; ``share_y``: with one y axis."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, count, squeeze=False, sharey=share_y)[0]
        for axis in axes:
            axis.tick_params(length=0)
    return figure, list(axes)


def in_style(draw: Any) -> Any:
    """The function run with the style of all figures: texts take their settings when they are made."""

    @functools.wraps(draw)
    def styled(*args: Any, **options: Any) -> Any:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **options)

    return styled
