"""``Chat``: a conversation that goes on, answered by a model piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator

from jaxsteer.models.model import Model
from jaxsteer.models.sampling import DEFAULTS, Decoding
from jaxsteer.models.taps import Intervention
from jaxsteer.prompts.conversation import with_system
from jaxsteer.prompts.generate import stream
from jaxsteer.prompts.templates import Message


@dataclasses.dataclass
class Chat:
    """A conversation with a model. What it holds may be changed between two replies."""

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

    def reply(self, text: str) -> Generator[str, None, None]:
        """What the model answers to ``text``, in pieces without whitespace at the start.

        When the iterator ends, or is closed before, ``text`` and what was answered by then become turns. Raises
        ``UserError`` at once, and leaves the turns as they are, where the model cannot answer: the conversation may be
        longer than its positions.
        """
        asked = [*self.turns, {"role": "user", "content": text}]
        decoding = dataclasses.replace(self.decoding, seed=self.decoding.seed + self.replies)
        pieces = stream(self.model, with_system(asked, self.system), decoding, edits=self.edits)
        self.replies += 1
        return self._answer(asked, pieces)

    def _answer(self, asked: list[Message], pieces: Iterator[str]) -> Generator[str, None, None]:
        said = ""
        try:
            for piece in pieces:
                piece = piece if said else piece.lstrip()
                said += piece
                yield piece
        finally:
            self.turns = [*asked, {"role": "assistant", "content": said.strip()}]
