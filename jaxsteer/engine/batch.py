"""Rows on the host: what each has said so far, and the batch of the device that holds them all."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxsteer.engine import device
from jaxsteer.engine.programs import Programs
from jaxsteer.engine.requests import Finished, Piece, Reason, Scored, Ticket, scored
from jaxsteer.models.decoding import NOT_FINITE
from jaxsteer.models.log_probs import not_finite
from jaxsteer.models.model import Model
from jaxsteer.models.sampling import stop_ids
from jaxsteer.prompts.pieces import Text


class Row:
    """One request on its way."""

    def __init__(self, model: Model, ticket: Ticket, context: int) -> None:
        """A row that has said nothing yet."""
        request = ticket.request
        self.ticket, self.request = ticket, request
        self.prompt_tokens, self.cached_tokens = len(request.prompt.ids), 0
        wanted = request.decoding.max_new_tokens if request.max_tokens is None else request.max_tokens
        self.limit = min(wanted, context - self.prompt_tokens)
        self.stops = stop_ids(model, request.decoding)
        self.tokens: list[int] = []
        self.scores: list[Scored] = []
        self.prompt_scores: list[Scored] = []
        self.gate_open: bool | None = None
        self.edited, self.reached = 0, tuple[int, ...]()
        self.error, self.internal = "", False
        decode = lambda ids: model.tokenizer.decode(  # noqa: E731
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self._text, self._said, self._fresh, self._told = Text(decode, request.decoding.stop_texts), "", "", 0

    def add(self, made: tuple[np.ndarray, device.Scores], done: bool) -> Reason | None:
        """What a call of the device decoded; why the row ends, or None."""
        tokens, scores = made
        if (tokens == NOT_FINITE).any():
            edits = self.request.edits
            self.error = not_finite("" if edits is None else edits.label)
            return "error"
        ids = tokens.tolist()
        stopped = bool(ids) and ids[-1] in self.stops
        text = ""
        for n, token in enumerate(ids, 1):
            text += self._text.add([] if stopped and n == len(ids) else [token])
            if self._text.ended:
                ids = ids[:n]
                break
        self.tokens += ids
        if (most := self.request.tops) is not None:
            self.scores += scored(tokens[: len(ids)], scores, most)
        self._fresh += text
        if self._text.ended or stopped or done:
            return "stop" if self._text.ended or stopped else "length"
        if self._fresh:
            self._tell()
        return None

    def _tell(self) -> None:
        """What was not told yet."""
        begin, self._told = self._told, len(self.tokens)
        self.ticket.tell(Piece(text=self._fresh, tokens=tuple(self.tokens[begin:]), scores=tuple(self.scores[begin:])))
        self._said, self._fresh = self._said + self._fresh, ""

    def finish(self, reason: Reason) -> None:
        """Tell the rest, and how it ended."""
        self._fresh += "" if reason == "error" else self._text.rest()
        if self._fresh or self._told < len(self.tokens):
            self._tell()
        self.ticket.tell(
            Finished(
                reason=reason,
                text=self._said,
                tokens=tuple(self.tokens),
                prompt_tokens=self.prompt_tokens,
                cached_tokens=self.cached_tokens,
                scores=tuple(self.scores),
                prompt_scores=tuple(self.prompt_scores),
                gate_open=self.gate_open,
                stopped_by_token=bool(self.tokens) and self.tokens[-1] in self.stops,
                edited=self.edited,
                reached=self.reached,
                error=self.error,
                internal=self.internal,
            )
        )


class Batch:
    """The rows that are decoded together, at the smallest width and room that hold them."""

    def __init__(self, programs: Programs) -> None:
        """No rows."""
        self.programs = programs
        self.rows: dict[int, Row] = {}
        """By their places."""
        self.width = self.slots = 0
        self._state: Any = None

    def add(self, row: Row, one: device.Rows) -> None:
        """A row whose prompt has been run."""
        self._shape(len(self.rows) + 1, self._needed(row.prompt_tokens + device.PER_CALL))
        at = next(i for i in range(self.width) if i not in self.rows)
        self._state = self.programs.put(self._state, one, at)
        self.rows[at] = row

    def remove(self, at: int) -> None:
        """The row leaves; its place is free."""
        del self.rows[at]

    def settle(self, steps: int) -> None:
        """The width and room for so many steps of the rows that are here, whose places may change."""
        self._shape(len(self.rows), self._needed(0, steps))

    def advance(self, steps: int) -> device.Made:
        """Up to so many tokens more of every row."""
        alive = np.isin(np.arange(self.width), list(self.rows))
        self._state, made = self.programs.advance(self._state, alive, steps)
        return made

    def _needed(self, tokens: int, steps: int = 1) -> int:
        """Tokens of the longest row after so many steps."""
        return max([tokens, *(row.prompt_tokens + len(row.tokens) + steps for row in self.rows.values())])

    def _shape(self, rows: int, tokens: int) -> None:
        """Another width or room, if these are too small or much too large."""
        width, slots = self.programs.width(rows), self.programs.rung(tokens)
        if (width, slots) == (self.width, self.slots):
            return
        ones = [(row, self.programs.take(self._state, at)) for at, row in self.rows.items()]
        self._state = self.programs.blank(width, slots)
        self.rows, self.width, self.slots = {}, width, slots
        for at, (row, one) in enumerate(ones):
            self._state = self.programs.put(self._state, one, at)
            self.rows[at] = row
