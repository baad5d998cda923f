"""Whoever writes text on request: the interface of an endpoint, of a local model, and of a rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

Messages = Sequence[Mapping[str, str]]
"""A conversation: ``{"role": ..., "content": ...}`` each."""
Keep = Callable[[int, str], None]
"""Called with the number of a conversation and the reply to it, as they come."""


@runtime_checkable
class Writer(Protocol):
    """Writes the next message of a conversation. ``max_tokens`` is the longest reply; temperature 0 is greedy."""

    @property
    def name(self) -> str:
        """Who it is, for the results."""

    def reply(
        self,
        messages: Messages,
        n: int = 1,
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int | None = None,
    ) -> list[str]:
        """``n`` replies to one conversation. Raises ``UserError`` where there is none to be had."""

    def reply_each(
        self, conversations: Sequence[Messages], *, max_tokens: int = 512, keep: Keep | None = None
    ) -> list[str]:
        """One greedy reply to each conversation, in their order, as many at a time as the writer can."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A writer that is a function of the messages: for tests, and for whatever another program writes."""

    write: Callable[[Messages], str]
    name: str = "rule"

    def reply(
        self,
        messages: Messages,
        n: int = 1,
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int | None = None,
    ) -> list[str]:
        """The function's text, ``n`` times."""
        return [self.write(messages)] * n

    def reply_each(
        self, conversations: Sequence[Messages], *, max_tokens: int = 512, keep: Keep | None = None
    ) -> list[str]:
        """The function's text for each."""
        replies = []
        for i, messages in enumerate(conversations):
            replies.append(self.write(messages))
            if keep is not None:
                keep(i, replies[i])
        return replies
