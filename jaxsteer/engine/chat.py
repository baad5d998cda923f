"""``Chat``: a conversation that goes on, answered by a model piece by piece."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Generator, Iterator

from jaxsteer.engine.engine import Engine, EngineOptions
from jaxsteer.engine.requests import Finished, Request, Ticket
from jaxsteer.engine.settings import serves
from jaxsteer.errors import UserError
from jaxsteer.models.model import Model
from jaxsteer.models.sampling import DEFAULTS, Decoding
from jaxsteer.models.taps import Intervention
from jaxsteer.prompts.conversation import with_system
from jaxsteer.prompts.generate import encode_prompts, stream
from jaxsteer.prompts.templates import Message

_ENGINE = EngineOptions(rows=1, context=4096, timeout=86400.0)


@dataclasses.dataclass
class Chat:
    """A conversation with a model. What it holds may be changed between two replies.

    An engine of its own answers, which does not read again what it has read. ``stream``, which does, answers under
    edits that the engine does not serve, and conversations of more than 4096 tokens.
    """

    model: Model
    system: str = ""
    """System message; "" for none."""
    decoding: Decoding = DEFAULTS
    """How the model answers; each reply has a seed of its own, counted up from this one's."""
    edits: Intervention | None = None
    turns: list[Message] = dataclasses.field(default_factory=list)
    """What was said so far, by user and assistant in turn."""
    replies: int = 0
    """Replies that were asked for, also those of turns that were forgotten since."""
    _engine: Engine | None = dataclasses.field(default=None, repr=False, compare=False)

    def reply(self, text: str) -> Generator[str, None, None]:
        """What the model answers to ``text``, in pieces without whitespace at the start.

        When the iterator ends, or is closed before, ``text`` and what was answered by then become turns. Raises
        ``UserError`` at once, and leaves the turns as they are, where the model cannot answer: the conversation may be
        longer than its positions.
        """
        asked = [*self.turns, {"role": "user", "content": text}]
        decoding = dataclasses.replace(self.decoding, seed=self.decoding.seed + self.replies)
        pieces = self._pieces(with_system(asked, self.system), decoding)
        self.replies += 1
        return self._answer(asked, pieces)

    def _pieces(self, messages: list[Message], decoding: Decoding) -> Iterator[str]:
        prompt = encode_prompts(self.model, messages, roles=self.edits is not None)[0]
        long = len(prompt.ids) + decoding.max_new_tokens > _ENGINE.context
        if long or not serves(self.edits, self.model.config):
            return stream(self.model, prompt, decoding, edits=self.edits)
        if self._engine is None:
            self._engine = Engine(self.model, _ENGINE, warm=False)
            weakref.finalize(self, self._engine.close)
        return _said(self._engine.submit(Request(prompt=prompt, decoding=decoding, edits=self.edits)))

    def _answer(self, asked: list[Message], pieces: Iterator[str]) -> Generator[str, None, None]:
        said = ""
        try:
            for piece in pieces:
                piece = piece if said else piece.lstrip()
                said += piece
                yield piece
        finally:
            self.turns = [*asked, {"role": "assistant", "content": said.strip()}]


def _said(ticket: Ticket) -> Iterator[str]:
    """The text of a row as it comes. Raises ``UserError`` where the row fails."""
    try:
        for event in ticket.events():
            if not isinstance(event, Finished):
                yield event.text
            elif event.reason == "error":
                raise UserError(event.error)
    finally:
        ticket.cancel()
