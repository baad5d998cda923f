"""``generate``: texts that a model writes after conversations, texts or token ids."""

from __future__ import annotations

import bisect
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from jaxsteer.display import escaped, short, visible
from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.models.generation import NO_TOKEN, Progress, generate_tokens
from jaxsteer.models.model import Model
from jaxsteer.models.roles import Rendered, unlabelled
from jaxsteer.models.sampling import DEFAULTS, Decoding, stop_ids
from jaxsteer.models.taps import Intervention, edits_of
from jaxsteer.prompts.conversation import encode_texts
from jaxsteer.prompts.pieces import Text
from jaxsteer.prompts.roles import encode_turns
from jaxsteer.prompts.templates import Message, apply_template
from jaxsteer.runs.result import Shown
from jaxsteer.writers.writer import Keep, Messages

log = logging.getLogger(__name__)

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | np.ndarray | Rendered
"""A plain text, the turns of a conversation, token ids, or what ``encode_turns`` made of a conversation."""
ROLES = ("system", "user", "assistant")
_CHUNK = 16
"""Tokens between two looks for stop strings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation(Shown):
    """What was generated. Row ``i * samples + j`` is sample j of prompt i."""

    tokens: Int[np.ndarray, "B M"]
    """int32; a row's stop token or stop string is included, ``-1`` fills up after it."""
    texts: tuple[str, ...]
    """Without special tokens, stop token and stop string."""
    finish: tuple[Literal["stop", "length"], ...]
    """Why each row ended: a stop token or string, or no room (``max_new_tokens``, the model's positions)."""
    prompt_length: Int[np.ndarray, " B"]
    """Tokens of each row's prompt."""
    seconds: float
    """Wall time of the call, compilation included."""
    asked: tuple[str, ...] = ()
    """What each row continues, as a person would tell it: the text, or what was said last."""
    unsteered: Callable[[], Generation] | None = dataclasses.field(default=None, repr=False, compare=False)
    """Of a steered generation: the same call without steering."""

    def __repr__(self) -> str:
        shown = ", ".join(repr(short(text.strip())) for text in self.texts[:3])
        return f"Generation({len(self.texts)} texts: {shown}{', ...' if len(self.texts) > 3 else ''})"

    def compare(self) -> Beside:
        """The texts beside those of the same call without steering, from the same random numbers: it is made now.

        Raises ``UserError`` where nothing steered them."""
        if self.unsteered is None:
            raise UserError("nothing steered this generation: give steer=..., then compare() shows both sides")
        rows = zip(self.asked, self.unsteered().texts, self.texts, strict=True)
        return Beside(rows=tuple(rows))

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per text."""
        rows = zip(self.asked, self.texts, self.finish, self.lengths.tolist(), strict=True)
        return [{"prompt": a, "text": t, "finish": f, "tokens": n} for a, t, f, n in rows]

    def table(self) -> str:
        """Every prompt and its text."""
        return "\n\n".join(f"> {visible(a)}\n{escaped(t.strip())}" for a, t in zip(self.asked, self.texts))

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Tokens of each row."""
        return (self.tokens != NO_TOKEN).sum(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside(Shown):
    """Texts that were steered beside those that were not."""

    rows: tuple[tuple[str, str, str], ...]
    """(prompt, text as it is, text steered)."""

    def __str__(self) -> str:
        return self.table()

    def to_rows(self) -> list[dict[str, Any]]:
        """One row per prompt and sample."""
        return [dict(zip(("prompt", "unsteered", "steered"), row, strict=True)) for row in self.rows]

    def table(self) -> str:
        """Every prompt with both texts."""
        return "\n\n".join(
            f"> {visible(asked)}\n  as it is:  {visible(bare.strip())}\n  steered:   {visible(text.strip())}"
            for asked, bare, text in self.rows
        )


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    decoding: Decoding = DEFAULTS,
    *,
    samples: int = 1,
    steer: Any = None,
    edits: Intervention | None = None,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Generation:
    """Continue prompts: greedily at ``temperature`` 0, by sampling otherwise.

    ``prompts`` is one prompt or a list of them. A prompt is a conversation (a list of ``{"role", "content"}``: the
    model's chat template is applied and it answers as assistant), a string (continued as it stands, no template), or
    token ids (taken as they are, BOS included). ``samples`` continuations are drawn of each.

    ``decoding`` says how; ``options`` are single fields of it: ``generate(model, prompts, temperature=0)``. Rows end at
    the stop tokens of the checkpoint's generation config, the tokenizer's EOS, and whatever ``stop`` names: ids, or
    strings that end a row when its text contains one. ``top_k`` and then ``top_p`` restrict the tokens as in
    transformers; 0 and 1 mean no restriction. ``edits`` act on the prompt and on every token that is decoded, and are
    told whose each token of a conversation is (see ``jaxsteer.steer``); an intervention with an attribute ``rows``
    holds one edit per row. ``steer`` are vectors with a strength (``Direction.at``, ``steer.Vectors``), whose edits
    these then are; ``.compare()`` of the result shows the texts beside unsteered ones.

    Many parameters: what is continued, how, under which edits, and how many at once.

    Row r's tokens depend on the seed, on r and on its prompt, not on the rows beside it. At most ``batch`` rows are
    decoded at a time, equal prompts being run once; ``progress(done, total)`` counts them. With a mesh, rows
    are spread over "prompts". Raises ``UserError`` for prompts that do not fit, or that the model's template refuses,
    before anything is computed.
    """
    started = time.perf_counter()
    if steer is not None and edits is not None:
        raise UserError("steer= and edits= both say how to steer: give one of them, or join edits in steer.Edits")
    edits = edits if steer is None else edits_of(steer)
    rows, decoding = encode_prompts(model, prompts, roles=edits is not None), changed(decoding, options)
    end = _end(model, decoding)
    every = None if end is None else _CHUNK
    made: dict[int, np.ndarray] = {}
    for part in generate_tokens(model, rows, decoding, samples=samples, edits=edits, end=end, every=every, batch=batch):
        made |= {int(row): tokens for row, tokens in zip(part.rows, part.tokens, strict=True)}
        if progress is not None:
            progress(len(made), len(rows) * samples)
    kept = [made[row][made[row] != NO_TOKEN].astype(np.int32) for row in range(len(rows) * samples)]
    tokens = np.full((len(kept), max((len(row) for row in kept), default=0)), NO_TOKEN, np.int32)
    for row, ids in enumerate(kept):
        tokens[row, : len(ids)] = ids
    stops = stop_ids(model, decoding)
    ended = [(len(ids) > 0 and int(ids[-1]) in stops) or (end is not None and end(ids) is not None) for ids in kept]
    return Generation(
        tokens=tokens,
        texts=tuple(_text(model, ids, decoding) for ids in kept),
        finish=tuple("stop" if stopped else "length" for stopped in ended),
        prompt_length=np.repeat([len(row.ids) for row in rows], samples).astype(np.int32),
        seconds=time.perf_counter() - started,
        asked=tuple(text for prompt in _several(prompts) for text in [_told(prompt)] * samples),
        unsteered=None if edits is None else partial(generate, model, prompts, decoding, samples=samples, batch=batch),
    )


def stream(
    model: Model,
    prompt: Prompt,
    decoding: Decoding = DEFAULTS,
    *,
    edits: Intervention | None = None,
    every: int = 2,
    **options: Any,
) -> Iterator[str]:
    """The text that ``generate`` would write after one prompt, in pieces, a look at the device every ``every`` tokens.

    A piece ends where a character is complete, and nothing is given out that may turn out to begin a stop string.
    Errors are raised by the call itself, before the first piece.
    """
    rows, decoding = encode_prompts(model, prompt, roles=edits is not None), changed(decoding, options)
    if len(rows) != 1:
        raise UserError(f"stream continues one prompt, got {len(rows)}. Use jaxsteer.generate for several.")
    steps = generate_tokens(model, rows, decoding, edits=edits, end=_end(model, decoding), every=every)
    return _pieces(model, steps, decoding)


def changed(decoding: Decoding, options: Mapping[str, Any]) -> Decoding:
    """``decoding`` with some of its fields changed. Raises ``UserError`` for fields that it does not have."""
    refuse_unknown(options, [field.name for field in dataclasses.fields(Decoding)], "option of generating")
    return dataclasses.replace(decoding, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelWriter:
    """A local model as a writer (``jaxsteer.writers.writer.Writer``): it answers conversations as assistant."""

    model: Model
    edits: Intervention | None = None
    batch: int = 64
    """Replies at the same time."""

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    def reply(
        self,
        messages: Messages,
        n: int = 1,
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int | None = None,
    ) -> list[str]:
        """``n`` replies to one conversation. Raises ``UserError`` as ``generate`` does."""
        made = generate(
            self.model, [messages], max_new_tokens=max_tokens, temperature=temperature, seed=seed or 0, samples=n,
            edits=self.edits, batch=self.batch,
        )  # fmt: skip
        return list(made.texts)

    def reply_each(
        self, conversations: Sequence[Messages], *, max_tokens: int = 512, keep: Keep | None = None
    ) -> list[str]:
        """One greedy reply to each conversation, ``batch`` at a time."""
        replies: list[str] = []
        for begin in range(0, len(conversations), self.batch):
            some = list(conversations[begin : begin + self.batch])
            made = generate(
                self.model, some, max_new_tokens=max_tokens, temperature=0, edits=self.edits, batch=self.batch
            )
            for i, text in enumerate(made.texts, begin):
                if keep is not None:
                    keep(i, text)
            replies += made.texts
        return replies


def _pieces(model: Model, steps: Iterator[Progress], decoding: Decoding) -> Iterator[str]:
    text, stops, read = Text(lambda ids: _decode(model, ids), decoding.stop_texts), stop_ids(model, decoding), 0
    for progress in steps:
        made, done = progress.tokens[0], bool(progress.done[0])
        ids = made[made != NO_TOKEN].tolist()
        stopped = done and bool(ids) and ids[-1] in stops
        piece = text.add(ids[read : len(ids) - stopped]) + (text.rest() if done else "")
        read = len(ids)
        if piece:
            yield piece


# Prompts


def encode_prompts(model: Model, prompts: Prompt | Sequence[Prompt], *, roles: bool = False) -> list[Rendered]:
    """Every prompt in token space; one prompt alone counts as a list of one. Raises ``UserError`` for anything else.

    With ``roles`` it is known of conversations whose each token is, unless their template rewrites what is said.
    """
    several = _several(prompts)
    if not several:
        raise UserError("No prompt was given: pass a conversation, a text, token ids, or a list of them.")
    return [_encoded(model, i, prompt, roles) for i, prompt in enumerate(several)]


def _several(prompts: Any) -> list[Any]:
    """The prompts; one alone is a list of one."""
    one = isinstance(prompts, str | Rendered) or (isinstance(prompts, np.ndarray) and prompts.ndim == 1)
    one = one or (len(prompts) > 0 and isinstance(prompts[0], Mapping | int | np.integer))
    return [prompts] if one else list(prompts)


def _told(prompt: Any) -> str:
    """A prompt in words."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Rendered):
        return f"({len(prompt.ids)} tokens)"
    return str(prompt[-1]["content"]) if isinstance(prompt[-1], Mapping) else f"({len(prompt)} tokens)"


def _encoded(model: Model, i: int, prompt: Any, roles: bool) -> Rendered:
    if isinstance(prompt, Rendered):
        return prompt
    if isinstance(prompt, str):
        return unlabelled(encode_texts(_tokenizer(model), [prompt])[0])
    if len(prompt) and isinstance(prompt[0], Mapping):
        tokenizer, turns = _tokenizer(model), _turns(i, prompt)
        if roles:
            try:
                return encode_turns(tokenizer, turns)
            except UserError as error:
                log.warning("prompt %d: whose its tokens are is not known (%s)", i, error)
        return unlabelled(encode_texts(tokenizer, [apply_template(tokenizer, turns)], style="chat")[0])
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(
            f"Prompt {i} is neither a text, nor a list of messages, nor a list of token ids: {prompt!r:.80}"
        )
    return unlabelled(ids.astype(np.int32))


def _turns(i: int, messages: Sequence[Any]) -> list[Message]:
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UserError(f"Prompt {i}: every message needs the keys 'role' and 'content', got {message!r:.80}")
        if message["role"] not in ROLES:
            raise UserError(f"Prompt {i}: unknown role {message['role']!r}. Expected {', '.join(ROLES)}.")
        if not isinstance(message["content"], str):
            raise UserError(f"Prompt {i}: the content of a message must be text, got {message['content']!r:.80}")
    return [dict(message) for message in messages]


def _tokenizer(model: Model) -> PreTrainedTokenizerBase:
    if model.tokenizer is None:
        raise UserError(f"{model.name} came without tokenizer.json, so that it can continue token ids only.")
    return model.tokenizer


# Ends


def _end(model: Model, decoding: Decoding) -> Callable[[np.ndarray], int | None] | None:
    """What tells how many tokens complete a stop string (None: there is none yet); None without stop strings."""
    texts = decoding.stop_texts
    if not texts:
        return None
    _tokenizer(model)

    def end(made: np.ndarray) -> int | None:
        def complete(n: int) -> bool:
            said = _decode(model, made[:n].tolist())
            return any(text in said for text in texts)

        if not complete(len(made)):
            return None
        # The shortest beginning that holds one, so that it does not matter how often this is asked.
        return bisect.bisect_left(range(len(made) + 1), True, lo=1, key=complete)

    return end


def _text(model: Model, tokens: np.ndarray, decoding: Decoding) -> str:
    stopped = len(tokens) and int(tokens[-1]) in stop_ids(model, decoding)
    text = _decode(model, (tokens[:-1] if stopped else tokens).tolist())
    return text[: min((text.find(stop) for stop in decoding.stop_texts if stop in text), default=len(text))]


def _decode(model: Model, ids: list[int]) -> str:
    if model.tokenizer is None:
        return ""
    return model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
