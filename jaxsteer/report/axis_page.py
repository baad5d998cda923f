"""The page of an axis run: one self-contained HTML file. A little script lets its figures and its table answer to the
mouse; without it everything is still there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jaxsteer.axis import AxisResult
from jaxsteer.axis import figures as axis_figures
from jaxsteer.axis.places import Layer, Place
from jaxsteer.axis.transcripts import DEFAULT
from jaxsteer.display import Plot, decimals, percent, visible
from jaxsteer.ranges import Interval
from jaxsteer.report.axis_files import AxisFiles, cut
from jaxsteer.report.axis_parts import caps_part, caps_plot, drift_part, drift_plot, hold_part, hold_plot
from jaxsteer.report.templates import embedded, flat, template

Column = tuple[str, str, Callable[[Layer], str]]


def _with(value: float | None, ci95: Interval | None, digits: int = 2) -> str:
    if value is None or ci95 is None:
        return decimals(value, digits)
    return f"{value:.{digits}f} ({ci95[0]:.{digits}f} to {ci95[1]:.{digits}f})"


def _list(values: Sequence[float], shown: Callable[[float], str] = decimals) -> str:
    return ", ".join(map(shown, values))


LAYERS: tuple[Column, ...] = (
    ("of stream", "norm of the axis as a share of the mean norm of what is read", lambda at: decimals(at.of_stream, 3)),
    ("halves", "cosine of the axes of two halves of the questions: mean over random splits, and their spread",
     lambda at: _with(at.halves, at.halves_spread)),
    ("order", "rank correlation of the roles’ positions in two halves of the questions, with the spread over splits",
     lambda at: _with(at.order, at.order_spread)),
    ("exchanged", "control: the same where the roles of the rollouts are exchanged at random",
     lambda at: decimals(at.shuffled_order)),
    ("other block", "control: rank correlation with the positions on the axis of the block half the depth away",
     lambda at: decimals(at.other_order)),
    ("cos PC1", "cosine of the axis with the first principal component of the roles; 95 % interval over questions",
     lambda at: _with(at.cosine, at.cosine_ci95)),
    ("PC1, 2, 3", "cosines with the first three components", lambda at: _list(at.cosines)),
    ("scaled", "cosine with PC1 where every dimension is divided by its spread over roles",
     lambda at: decimals(at.scaled_cosine)),
    ("a role’s", "base rate: median cosine with PC1 where a role stands in the Assistant’s place",
     lambda at: decimals(at.base_cosine)),
    ("below", "share of the roles that have a smaller cosine there than the Assistant",
     lambda at: percent(at.base_share)),
    ("explained", "shares of the roles’ variance along the first components",
     lambda at: _list(at.explained[:3], percent)),
    ("for 70 %", "components that hold 70 % of the variance", lambda at: str(at.needed)),
    ("edge", "the Assistant’s distance from its end of PC1, in shares of the roles’ range; negative: beyond it",
     lambda at: _with(at.edge, at.edge_ci95)),
    ("rating", "rank correlation of the positions with the rating by people", lambda at: decimals(at.rating)),
    ("PC1’s rating", "and of PC1", lambda at: decimals(at.pc1_rating)),
)  # fmt: skip
"""Columns of the table of blocks: head, explanation, cell."""


def axis_plots(files: AxisFiles) -> dict[str, Plot]:
    """All figures of an axis run, and of what lies in its directory, by name."""
    result = files.result
    made = [
        axis_figures.strip(result.default, result.roles),
        axis_figures.strip(result.default, result.roles, pc1=True),
        axis_figures.scatter(result.default, result.roles),
        axis_figures.blocks(result.layers, result.target),
    ]
    if len(result.layers) > 1:
        made.append(axis_figures.correlations(result.layers, result.correlations()))
    if result.traits:
        made.append(axis_figures.traits(result.traits))
    made += [drift_plot(name, drift) for name, drift in files.drifts]
    made += [caps_plot(name, found) for name, found in files.caps]
    made += [hold_plot(name, found) for name, found in files.holds]
    return {plot.name: plot for plot in made}


def render_axis(files: AxisFiles) -> str:
    """The whole page as text. Everything that comes from the files is escaped by the template."""
    result = files.result
    return template("axis").render(
        title=visible(f"The assistant axis of {result.model}"),
        result=result,
        here=result.layer,
        tiles=_tiles(result),
        warnings=files.warnings,
        left_out=result.left_out,
        families=axis_figures.families_of(result.roles),
        places=_places(files),
        scale=_scale(result),
        columns=[(head, told) for head, told, _ in LAYERS],
        layers=[(layer, [cell(layer) for _, _, cell in LAYERS]) for layer in result.layers],
        ends=_ends(result),
        drifts=[drift_part(name, drift) for name, drift in files.drifts],
        caps=[caps_part(name, found) for name, found in files.caps],
        holds=[hold_part(name, found) for name, found in files.holds],
        plots={name: Markup(plot.svg(themed=True)) for name, plot in axis_plots(files).items()},
        settings=flat(files.config),
        environment=flat(result.environment),
        numbers=flat({"rollouts": result.rollouts, "silent": result.silent, "seconds": result.seconds}),
        command=None,
        data=embedded({"target": result.target, "roles": [_rounded(row) for row in result.to_rows()]}),
    )


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def _tiles(result: AxisResult) -> list[tuple[str, str, str]]:
    """(label, number, small print) of the headline."""
    here = result.layer
    tiles = [
        ("two halves agree", decimals(here.halves), "cosine of the axes of two halves of the questions"),
        ("order of the roles", decimals(here.order),
         f"rank correlation of two halves; {decimals(here.shuffled_order)} with roles exchanged"),
        ("axis and PC1", decimals(here.cosine),
         f"cosine, 95 %: {here.cosine_ci95[0]:.2f} to {here.cosine_ci95[1]:.2f}; a role in the Assistant’s place "
         f"{decimals(here.base_cosine)} (median)"),
    ]  # fmt: skip
    if here.rating is not None:
        rated = sum(place.assistant_like is not None for place in result.roles)
        p = "" if result.rating_p is None else f", p = {result.rating_p:.2g} by exchanging ratings"
        tiles.append(("order and people’s rating", decimals(here.rating), f"rank correlation, {rated} rated roles{p}"))
    return tiles


def _places(files: AxisFiles) -> list[tuple[str, Place, tuple[tuple[str, str], ...]]]:
    """(what its marks are called, the place, its replies), the Assistant first."""
    found = axis_figures.gids(files.result.default, files.result.roles)
    return [(gid, place, files.replies.get(place.name, ())) for gid, place in found]


def _scale(result: AxisResult) -> dict[str, Callable[[float], str]]:
    """Where a number lies in the little bars of the table, in percent of their width."""
    everyone = (result.default, *result.roles)

    def of(intervals: Sequence[Interval]) -> Callable[[float], str]:
        low, high = min(ci[0] for ci in intervals), max(ci[1] for ci in intervals)
        return lambda value: f"{100 * (value - low) / ((high - low) or 1.0):.1f}"

    return {"position": of([p.ci95 for p in everyone]), "pc1": of([p.pc1_ci95 for p in everyone])}


def _ends(result: AxisResult) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(question, [(role and position, style, reply)]): the Assistant, then roles from its end to the other."""
    positions = {place.name: place.position for place in result.roles}
    questions: dict[str, list[tuple[str, str, str]]] = {}
    for reply in result.replies:
        name, style = ("the Assistant", "other") if reply.role == DEFAULT else (reply.role, "")
        if reply.role in positions:
            place = positions[reply.role]
            name, style = f"{name} ({place:.2f})", "" if place > 0 else "persona"
        questions.setdefault(reply.question, []).append((name, style, cut(reply.text)))
    return list(questions.items())
