"""What the engine is asked, and what it answers: requests, pieces of text, and how a row ended."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from jaxsteer.engine.device import Scores
from jaxsteer.errors import UserError
from jaxsteer.models.roles import Rendered
from jaxsteer.models.sampling import DEFAULTS, Decoding
from jaxsteer.models.taps import Intervention

Reason = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One row that is asked for."""

    prompt: Rendered
    """With roles, where edits are to be told them; ``unlabelled`` otherwise."""
    decoding: Decoding = DEFAULTS
    number: int = 0
    """Which of the answers to one prompt this is: each has random numbers of its own, as in ``generate``."""
    edits: Intervention | None = None
    """One row's."""
    tops: int | None = None
    """Log-probabilities are wanted of every token, and of so many most likely ones (0 to 20); None: none."""
    echo: bool = False
    """With ``tops``: also those of the prompt's tokens."""
    max_tokens: int | None = None
    """Tokens that are decoded at most, 0 included; None: those of ``decoding``."""
    timeout: float | None = None
    """Seconds from now after which the row ends as it is; None: the engine's."""
    client: str = ""
    """Who asks. Clients take turns."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """A token and how likely it was."""

    token: int
    log_prob: float | None
    """Natural logarithm, float32; None for the first token of a prompt."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens in its place, the most likely one first."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """What a row has decoded since the last piece."""

    text: str
    """Ends where a character is complete, and holds nothing that may begin a stop string."""
    tokens: tuple[int, ...]
    """Those of the text; a stop token is among them, and no part of the text."""
    scores: tuple[Scored, ...] = ()
    """Of each token, where they were asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """How a row ended."""

    reason: Reason
    text: str
    """All of it."""
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt whose keys and values were there already."""
    scores: tuple[Scored, ...] = ()
    prompt_scores: tuple[Scored, ...] = ()
    """With ``echo``: of every token of the prompt."""
    gate_open: bool | None = None
    """What the prompt decided, where edits stand behind a gate."""
    stopped_by_token: bool = False
    """Whether the last token is a stop token, which is no part of the text."""
    edited: int = 0
    """Tokens of the prompt that the edits reach."""
    reached: tuple[int, ...] = ()
    """The same of each edit (``settings.leaves``); () where a gate decides which there are."""
    error: str = ""
    internal: bool = False
    """Whether the error is the engine's and not the request's."""


class Ticket:
    """A request that was accepted. Its pieces come in order, and ``Finished`` last."""

    def __init__(self, request: Request, listener: Callable[[Piece | Finished], None] | None) -> None:
        """``listener`` is called by the engine's thread with everything; without one, ``events`` gives it."""
        self.request = request
        self._queue: queue.SimpleQueue[Piece | Finished] = queue.SimpleQueue()
        self._tell = listener or self._queue.put
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End the row with the engine's next step, or take the request out of the queue."""
        self._cancelled.set()

    def tell(self, event: Piece | Finished) -> None:
        """By the engine: the next event."""
        self._tell(event)

    def events(self) -> Iterator[Piece | Finished]:
        """Pieces as they come, and ``Finished``."""
        while True:
            event = self._queue.get()
            yield event
            if isinstance(event, Finished):
                return

    def result(self) -> Finished:
        """Wait for the end. Raises ``UserError`` where the row failed."""
        *_, end = self.events()
        assert isinstance(end, Finished)
        if end.reason == "error":
            raise UserError(end.error)
        return end


def scored(tokens: np.ndarray, scores: Scores, most: int) -> list[Scored]:
    """Scores of some tokens, the first of ``scores`` [N], with the ``most`` likeliest of each."""
    n = len(tokens)
    log_probs, ids, tops = (np.asarray(a)[:n] for a in (scores.log_prob, scores.top_ids, scores.top_log_probs))
    return [
        Scored(
            token=int(token),
            log_prob=float(log_prob),
            top=tuple((int(i), float(p)) for i, p in zip(own_ids[:most], own[:most], strict=True)),
        )
        for token, log_prob, own_ids, own in zip(tokens, log_probs, ids, tops, strict=True)
    ]
