"""``Text``: the tokens of a row turned into text as they come, for streams and for stop strings."""

from __future__ import annotations

from collections.abc import Callable


class Text:
    """Tokens of a row turned into text bit by bit; what it gives out is never taken back."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...]) -> None:
        """``decode`` makes a text of ids; ``stops`` end it."""
        self._decode, self._stops = decode, stops
        self._ids: list[int] = []
        self._anchor = self._read = 0
        self._pending = ""
        """Decoded, but not given out: it may begin a stop string."""
        self.ended = False
        """Whether a stop string was found."""

    def add(self, ids: list[int]) -> str:
        """The text that is certain now."""
        for token in ids:  # one by one, so that it does not matter in how many calls they come
            if self.ended:
                break
            self._ids.append(token)
            self._pending += self._new(final=False)
            self._cut()
        hold = max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._pending.endswith(stop[:n])), default=0
        )
        if self.ended:
            hold = 0
        given, self._pending = self._pending[: len(self._pending) - hold], self._pending[len(self._pending) - hold :]
        return given

    def rest(self) -> str:
        """What is left at the end."""
        if not self.ended:
            self._pending += self._new(final=True)
            self._cut()
        given, self._pending = self._pending, ""
        return given

    def _new(self, *, final: bool) -> str:
        """What the ids since the last look say, as soon as the last character is whole."""
        before, whole = self._decode(self._ids[self._anchor : self._read]), self._decode(self._ids[self._anchor :])
        if not final and (whole.endswith("\ufffd") or len(whole) <= len(before)):
            return ""
        self._anchor, self._read = self._read, len(self._ids)
        return whole[len(before) :]

    def _cut(self) -> None:
        found = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            self._pending, self.ended = self._pending[: min(found)], True
