"""Answers in OpenAI's forms: choices, log-probabilities, chunks of a stream, usage."""

from __future__ import annotations

import dataclasses
import functools
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxsteer.engine import Finished, Piece, Scored
from jaxsteer.models.model import Model
from jaxsteer.serve.errors import Refused


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    """The bytes that the letters of byte-level tokenizers stand for (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class Words:
    """Texts and bytes of single tokens."""

    def __init__(self, model: Model) -> None:
        """Of the model's tokenizer."""
        self._tokenizer = model.tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def __call__(self, token: int) -> tuple[str, bytes]:
        """The text of a token, and its bytes; "bytes:\\xe2..." for what is no text by itself, as at OpenAI."""
        if token not in self._known:
            self._known[token] = self._look(token)
        return self._known[token]

    def _look(self, token: int) -> tuple[str, bytes]:
        text = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" not in text:
            return text, text.encode()
        name, table = str(self._tokenizer.convert_ids_to_tokens(token)), _bytes_of_letters()
        if all(letter in table for letter in name):
            raw = bytes(table[letter] for letter in name)
        elif len(name) == 6 and name.startswith("<0x"):
            raw = bytes([int(name[3:5], 16)])
        else:
            return text, text.encode()
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw), raw


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What all parts of an answer share."""

    model: Model
    words: Words
    chat: bool
    extra: Mapping[str, Any]
    """``x_jaxsteer``: what was applied."""
    parts: tuple[int, ...] = ()
    """How many of ``Finished.reached`` belong to each edit that was applied."""
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def head(self, *, chunk: bool) -> dict[str, Any]:
        """Fields of every object."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}", "object": kind, "created": self.created,
            "model": self.model.name, "system_fingerprint": f"jaxsteer-{self.model.fingerprint[:12]}",
        }  # fmt: skip

    def whole(self, ends: Sequence[Finished], asked: Sequence[str | list[int]], tops: int | None, echo: bool,
              n: int) -> dict[str, Any]:  # fmt: skip
        """The answer at once. ``asked`` are the prompts as they were given, each with ``n`` choices."""
        choices = []
        for i, end in enumerate(ends):
            choice: dict[str, Any] = {"index": i, "finish_reason": end.reason}
            scores = None if tops is None else self._scores(end, tops, asked[i // n] if echo else None)
            if self.chat:
                choice["message"] = {"role": "assistant", "content": end.text, "refusal": None}
            else:
                choice["text"] = (self._said(asked[i // n], end) if echo else "") + end.text
            choices.append(choice | {"logprobs": scores})
        return self.head(chunk=False) | {
            "choices": choices, "usage": usage(ends, n), "x_jaxsteer": self._facts(ends),
        }  # fmt: skip

    def _facts(self, ends: Sequence[Finished]) -> dict[str, Any]:
        """What was applied, and what is known of it now that rows have ended."""
        edited, gates = [end.edited for end in ends], [end.gate_open for end in ends if end.gate_open is not None]
        facts: dict[str, Any] = {"prompt_tokens_edited": edited[0] if len(ends) == 1 else edited}
        if gates:
            facts["gate_open"] = gates[0] if len(ends) == 1 else gates
        warnings = [*self.extra.get("warnings", ()), *dict.fromkeys(said for end in ends for said in self._missed(end))]
        return {**self.extra, **facts} | ({"warnings": warnings} if warnings else {})

    def _missed(self, end: Finished) -> Iterator[str]:
        """Edits that reach no token of the prompt, though they are not of the response alone."""
        at = 0
        for i, (said, count) in enumerate(zip(self.extra.get("edits", ()), self.parts, strict=False)):
            own, at = end.reached[at : at + count], at + count
            if own and not any(own) and said["positions"] != "response":
                none = "" if end.edited else ": prompt_tokens_edited is 0"
                yield f"edits[{i}] reaches no token of the prompt (positions {said['positions']}){none}"

    def _said(self, prompt: str | list[int], end: Finished) -> str:
        if isinstance(prompt, str):
            return prompt
        return str(self.model.tokenizer.decode(prompt, clean_up_tokenization_spaces=False))

    def _scores(self, end: Finished, tops: int, echoed: str | list[int] | None) -> dict[str, Any]:
        """``echoed`` is the prompt as it was given, where it stands before the text."""
        if self.chat:
            return self.chat_scores(_without_stop(end), tops)
        if echoed is None:
            return self.text_scores(end.scores, tops)
        scores = [*end.prompt_scores, *end.scores]
        first = self.words(scores[0].token)[0]
        added = isinstance(echoed, str) and scores[0].token in self.model.tokenizer.all_special_ids
        # A token that the tokenizer put before a text is not in it.
        begin = -len(first) if added and not str(echoed).startswith(first) else 0
        return self.text_scores(scores, tops, begin)

    def chat_scores(self, scores: Sequence[Scored], tops: int) -> dict[str, Any]:
        """In the form of chat completions."""

        def one(token: int, log_prob: float | None) -> dict[str, Any]:
            text, raw = self.words(token)
            return {"token": text, "logprob": log_prob, "bytes": list(raw)}

        return {
            "content": [
                one(s.token, s.log_prob) | {"top_logprobs": [one(t, p) for t, p in s.top[:tops]]} for s in scores
            ],
            "refusal": None,
        }

    def text_scores(self, scores: Sequence[Scored], tops: int, begin: int = 0) -> dict[str, Any]:
        """In the form of completions. A token's own number is among the most likely ones where it is one of them.

        The first token begins at ``begin`` of the text; one before the text is told to begin where the text does.
        """
        texts = [self.words(s.token)[0] for s in scores]
        offsets = [begin]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts, "token_logprobs": [s.log_prob for s in scores],
            "top_logprobs": [None if s.log_prob is None else self._top(s, tops) for s in scores] if tops else None,
            "text_offset": [max(offset, 0) for offset in offsets[:-1]],
        }  # fmt: skip

    def _top(self, score: Scored, tops: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, log_prob in score.top[:tops]:
            found.setdefault(self.words(token)[0], log_prob)  # the likeliest of those that read alike
        assert score.log_prob is not None
        found.setdefault(self.words(score.token)[0], score.log_prob)
        return found

    # Streams

    def begin(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice: the role, and what was applied."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) | {"x_jaxsteer": dict(self.extra)}

    def part(self, index: int, piece: Piece, tops: int | None, begin: int) -> dict[str, Any]:
        """A chunk of text, which begins at ``begin`` of the whole."""
        scores = None
        if tops is not None:
            scores = self.chat_scores(piece.scores, tops) if self.chat else self.text_scores(piece.scores, tops, begin)
        if self.chat:
            return self._chunk(index, {"content": piece.text}, None, scores)
        return self._text(index, piece.text, None, scores)

    def end(self, index: int, finished: Finished) -> dict[str, Any]:
        """The last chunk of a choice."""
        made = self._chunk(index, {}, finished.reason) if self.chat else self._text(index, "", finished.reason, None)
        return made | {"x_jaxsteer": self._facts([finished])}

    def last(self, ends: Sequence[Finished], n: int) -> dict[str, Any]:
        """The chunk of usage, without choices."""
        return self.head(chunk=True) | {"choices": [], "usage": usage(ends, n)}

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None, scores: Any = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": reason}
        return self.head(chunk=True) | {"choices": [choice]}

    def _text(self, index: int, text: str, reason: str | None, scores: Any) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": scores, "finish_reason": reason}
        return self.head(chunk=True) | {"choices": [choice]}


def usage(ends: Sequence[Finished], n: int) -> dict[str, Any]:
    """Tokens of prompts, each counted once, and of answers."""
    prompt, made = sum(end.prompt_tokens for end in ends[::n]), sum(len(end.tokens) for end in ends)
    return {
        "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in ends[::n])},
    }  # fmt: skip


def refuse_failed(end: Finished) -> None:
    """Raise ``Refused`` for a row that did not come to an end of its own."""
    if end.reason == "error":
        code = "engine_failed" if end.internal else "request_failed"
        raise Refused(end.error, status=500 if end.internal else 400, code=code)
    if end.reason == "timeout":
        raise Refused("The request took longer than its time.", status=504, code="timeout")
    if end.reason == "cancelled":
        raise Refused("The server is shutting down.", status=503, code="shutting_down")


def event(body: Mapping[str, Any]) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _without_stop(end: Finished) -> Sequence[Scored]:
    """Scores of what is said: a stop token is not."""
    ended = end.reason == "stop" and end.scores and len(end.scores) == len(end.tokens)
    return end.scores[:-1] if ended and end.stopped_by_token else end.scores
