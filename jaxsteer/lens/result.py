"""What a lens read, as an object: statistics of every place and token, their means over texts, maps and tables.

Letters: S places, n tokens of all texts one behind the other, k top tokens, c chosen ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int

from jaxsteer.display import ACCENT, PAGE, Plot, aligned, decimals, in_style, panels, percent, short, visible
from jaxsteer.errors import UserError
from jaxsteer.files.records import Record
from jaxsteer.models.model import Model
from jaxsteer.ranges import Interval
from jaxsteer.runs.result import Result
from jaxsteer.statistics import student

GRID = 6
"""Tokens that the table shows: the last ones of the first text."""
WRITTEN = 48
"""Tokens up to which a figure has the words in its cells."""


A = TypeVar("A", bound="Arrays")


class Arrays(Record):
    """Base of dataclasses of arrays: integers where an annotation says Int, else float32."""

    def arrays(self) -> dict[str, np.ndarray]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """Nested lists by name."""
        return {name: array.tolist() for name, array in self.arrays().items()}

    @classmethod
    def from_json(cls: type[A], record: Any, where: str = "") -> A:
        """What ``to_json`` wrote, or arrays by name; null is NaN. Raises ``UserError`` for arrays that are missing."""
        found = {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            whole = str(field.type).startswith("Int")
            try:
                found[field.name] = np.asarray(record[field.name], np.int32 if whole else np.float32)
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{where or cls.__name__}.{field.name} is missing, or is no array of numbers") from None
        return cls(**found)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cells(Arrays):
    """Statistics of places and tokens, as arrays. In nats; ranks count the tokens that are more likely, from 0."""

    ids: Int[np.ndarray, " n"]
    text: Int[np.ndarray, " n"]
    """The number of the text that a token belongs to."""
    entropy: Float[np.ndarray, "S n"]
    kl: Float[np.ndarray, "S n"]
    """KL(output || lens)."""
    top_ids: Int[np.ndarray, "S n k"]
    """The most likely tokens, the likeliest first."""
    top_log_probs: Float[np.ndarray, "S n k"]
    next_rank: Int[np.ndarray, "S n"]
    """Of the token that follows in the text; -1 at its last token."""
    next_log_prob: Float[np.ndarray, "S n"]
    """NaN at the last token of a text."""
    chosen_ranks: Int[np.ndarray, "S n c"]
    chosen_log_probs: Float[np.ndarray, "S n c"]

    @classmethod
    def from_json(cls, record: Any, where: str = "") -> Cells:
        """What ``to_json`` wrote, or arrays by name. Raises ``UserError`` for arrays that are missing or misshapen."""
        cells = super().from_json(record, where)
        shape = cells.entropy.shape
        fitting = len(shape) == 2 and cells.ids.shape == cells.text.shape == shape[1:]
        fitting &= all(
            array.shape[:2] == shape for name, array in cells.arrays().items() if name not in ("ids", "text")
        )
        if not fitting:
            raise UserError(f"{where or 'Cells'}: the arrays are not of the same places and tokens")
        return cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadText(Record):
    """One text."""

    tokens: tuple[str, ...]
    """The text of every token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceSummary(Record):
    """One place in the mean over texts, each of which is the mean over its tokens; nats."""

    place: str
    kl: float
    """KL(output || lens)."""
    kl_ci95: Interval | None = None
    """None for a single text: tokens of one text are not independent."""
    entropy: float
    agrees: float
    """Share of tokens at which the likeliest token is the output's."""
    agrees_ci95: Interval | None = None
    loss: float
    """Minus the log-probability of the token that follows; NaN where texts have one token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LensReading(Result):
    """Texts read at places. Made by ``lens.read``."""

    model: str
    fingerprint: str
    lens: str
    """ "logit lens", or "tuned lens" and its name."""
    steered: str = ""
    """What the run was steered by."""
    places: tuple[str, ...]
    """Names of sites, with the number of a head in brackets; the last one is the model's output."""
    texts: tuple[ReadText, ...]
    chosen: tuple[int, ...] = ()
    """Ids of the tokens that were chosen."""
    summary: tuple[PlaceSummary, ...]
    words: Mapping[str, str]
    """The texts of all ids that occur, by the id in decimals."""
    cells: Cells

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        lens: str,
        places: tuple[str, ...],
        texts: tuple[ReadText, ...],
        chosen: tuple[int, ...],
        steered: str,
        cells: Cells,
    ) -> LensReading:
        """The reading with its summary and words. Many parameters: its parts."""
        return cls(
            model=model.name, fingerprint=model.fingerprint, lens=lens, steered=steered, places=places, texts=texts,
            chosen=chosen, summary=tuple(summarised(places, cells)),
            words=words_of(model, np.concatenate([cells.top_ids.ravel(), np.asarray(chosen, np.int32), cells.ids])),
            cells=cells,
        )  # fmt: skip

    def word(self, token: int | np.integer) -> str:
        """The text of a token that occurs."""
        return self.words.get(str(int(token)), f"<{int(token)}>")

    def at(self, text: int) -> Cells:
        """The cells of one text. Raises ``UserError`` for one that there is not."""
        if not 0 <= text < len(self.texts):
            raise UserError(f"there are texts 0 to {len(self.texts) - 1}, got {text}")
        here = self.cells.text == text
        flat = ("ids", "text")
        return Cells(**{
            name: array[here] if name in flat else array[:, here] for name, array in self.cells.arrays().items()
        })  # fmt: skip

    def to_rows(self) -> list[dict[str, Any]]:
        """One entry for every place and token."""
        c = self.cells
        position = np.concatenate([np.arange(len(text.tokens)) for text in self.texts])
        tokens = [token for text in self.texts for token in text.tokens]
        return [
            {
                "place": place, "text": int(c.text[i]), "position": int(position[i]), "token": tokens[i],
                "top": self.word(c.top_ids[s, i, 0]), "probability": float(np.exp(c.top_log_probs[s, i, 0])),
                "kl": float(c.kl[s, i]), "entropy": float(c.entropy[s, i]), "next_rank": int(c.next_rank[s, i]),
                "next_log_prob": float(c.next_log_prob[s, i]),
            }
            for s, place in enumerate(self.places) for i in range(len(tokens))
        ]  # fmt: skip

    def grid(self, text: int = 0, tokens: slice | None = None, *, width: int = 12) -> str:
        """The likeliest token of every place (the output on top) at some tokens of a text, with its probability.

        By default at the text's last tokens.
        """
        cells = self.at(text)
        where = range(len(cells.ids))[slice(-GRID, None) if tokens is None else tokens]

        def cell(s: int, i: int) -> str:
            share = 100 * np.exp(cells.top_log_probs[s, i, 0])
            return f"{short(self.word(cells.top_ids[s, i, 0]), width)} {share:.0f} %"

        head = ["", *(f"{i} {short(self.texts[text].tokens[i], width)}" for i in where)]
        return aligned(
            [head, *([self.places[s], *(cell(s, i) for i in where)] for s in reversed(range(len(self.places))))]
        )

    def table(self) -> str:
        """The summary of every place, then what is read at the last tokens of the first text."""
        several = len(self.texts) > 1
        head = ["place", "KL to output", *["95 %"] * several, "entropy", "top is output's", "loss of next"]
        rows = [
            [
                one.place, decimals(one.kl), *[spread(one.kl_ci95)] * several, decimals(one.entropy),
                percent(one.agrees), decimals(one.loss),
            ]
            for one in self.summary
        ]  # fmt: skip
        tokens = sum(len(text.tokens) for text in self.texts)
        note = (
            f"{self.lens} of {self.model}: {len(self.texts)} text{'s' * several} of {tokens} tokens; nats, in the mean "
            f"over texts." + (f" Steered by {short(self.steered, 120)}." if self.steered else "")
        )
        return f"{aligned([head, *rows], note=note)}\n\n{self.grid()}{self._chosen_table()}"

    def _chosen_table(self) -> str:
        if not self.chosen:
            return ""
        cells = self.at(0)
        head = ["last token", *(f"{short(self.word(token), 12)}: rank, probability" for token in self.chosen)]
        rows = [
            [
                place,
                *(
                    f"{rank}, {100 * np.exp(value):.2g} %"
                    for rank, value in zip(cells.chosen_ranks[s, -1], cells.chosen_log_probs[s, -1], strict=True)
                ),
            ]
            for s, place in enumerate(self.places)
        ]
        return f"\n\n{aligned([head, *rows])}"

    def plot(self, text: int = 0, *, shown: str = "kl") -> Plot:
        """A map of places over the tokens of a text: KL to the output, or "probability" of the likeliest token, or
        "entropy". Cells of short texts hold the likeliest token."""
        cells = self.at(text)
        known = {"kl": cells.kl, "entropy": cells.entropy, "probability": np.exp(cells.top_log_probs[..., 0])}
        if shown not in known:
            raise UserError(f"a map shows {', '.join(known)}, got {shown!r}")
        words = [[self.word(cells.top_ids[s, i, 0]) for i in range(len(cells.ids))] for s in range(len(self.places))]
        label = {"kl": "KL(output || lens), nats", "entropy": "entropy, nats"}.get(shown, shown)
        return token_map(f"lens-{text}-{shown}", label, known[shown], self.places, self.texts[text].tokens, words)


def words_of(model: Model, ids: Int[np.ndarray, " n"]) -> dict[str, str]:
    """The text of every id that occurs, by the id in decimals."""
    different = np.unique(ids)
    known = 0 if model.tokenizer is None else len(model.tokenizer)
    return {str(i): model.tokenizer.decode([i]) if i < known else f"<{i}>" for i in different.tolist()}


def text_means(values: Float[np.ndarray, "S n"], text: Int[np.ndarray, " n"]) -> Float[np.ndarray, "S texts"]:
    """Means over the tokens of each text, those that are NaN left out."""
    return np.stack([np.nanmean(np.where(text == i, values, np.nan), 1) for i in np.unique(text)], 1)


def over_texts(values: Float[np.ndarray, " texts"]) -> tuple[float, tuple[float, float] | None]:
    """Mean and 95 % interval over texts (Student's); None for fewer than two."""
    kept = values[np.isfinite(values)].astype(np.float64)
    return (float(kept.mean()) if len(kept) else float("nan")), student(kept)


def spread(ends: Sequence[float] | None) -> str:
    """An interval in words."""
    return "–" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"


def summarised(places: Sequence[str], cells: Cells) -> list[PlaceSummary]:
    """The summary of every place."""
    agrees = (cells.top_ids[..., 0] == cells.top_ids[-1:, :, 0]).astype(np.float32)
    loss = cells.next_log_prob[:, cells.next_rank[-1] >= 0]
    lost = (
        text_means(-loss, cells.text[cells.next_rank[-1] >= 0]) if loss.shape[1] else np.full((len(places), 1), np.nan)
    )
    kl, entropy, same = (text_means(each, cells.text) for each in (cells.kl, cells.entropy, agrees))
    found = []
    for s, place in enumerate(places):
        (far, ends), (share, within) = over_texts(kl[s]), over_texts(same[s])
        found.append(
            PlaceSummary(
                place=place,
                kl=far,
                kl_ci95=ends,
                entropy=over_texts(entropy[s])[0],
                agrees=share,
                agrees_ci95=within,
                loss=over_texts(lost[s])[0],
            )  # fmt: skip
        )
    return found


@in_style
def token_map(
    name: str,
    label: str,
    values: Float[np.ndarray, "S n"],
    places: Sequence[str],
    tokens: Sequence[str],
    words: Sequence[Sequence[str]] = (),
    *,
    signed: bool = False,
) -> Plot:
    """A heat map of places (the last on top) over tokens; words stand in the cells of short texts. Many parameters:
    what is drawn, and along what."""
    from matplotlib.colors import LinearSegmentedColormap

    written = bool(words) and len(tokens) <= WRITTEN
    width = min(40.0, 2.6 + (0.62 if written else 0.06 if len(tokens) > 200 else 0.3) * len(tokens))
    figure, (axis,) = panels(width=width, height=1.2 + 0.24 * len(places))
    most = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    colours = LinearSegmentedColormap.from_list("lens", ["#c2571a", PAGE, ACCENT] if signed else [PAGE, ACCENT])
    image = axis.imshow(
        values, cmap=colours, vmin=-most if signed else 0.0, vmax=most, aspect="auto", origin="lower",
        interpolation="nearest",
    )  # fmt: skip
    axis.set_yticks(range(len(places)), [visible(place) for place in places], fontsize=7)
    every = 1 if len(tokens) <= 100 else len(tokens) // 25
    labels = [short(tokens[i], 12) if every == 1 else str(i) for i in range(0, len(tokens), every)]
    axis.set_xticks(range(0, len(tokens), every), labels, rotation=90 if every == 1 else 0, fontsize=7)
    axis.grid(visible=False)
    if written:
        for s, row in enumerate(words):
            for i, word in enumerate(row):
                dark = np.abs(values[s, i]) > 0.6 * most
                axis.text(i, s, short(word.strip() or word, 9), ha="center", va="center", fontsize=6,
                          color=PAGE if dark else "#1c2330")  # fmt: skip
    figure.colorbar(image, ax=axis, label=label)
    rows = tuple(
        {"place": place, "position": i, "token": tokens[i], label: float(values[s, i])}
        | ({"top": words[s][i]} if words else {})
        for s, place in enumerate(places)
        for i in range(len(tokens))
    )
    return Plot(name=name, title=f"{label} of every place and token", figure=figure, rows=rows)
