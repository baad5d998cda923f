"""Conversations of several turns that a model is led through: all side by side, turn by turn, and resumable.

The user's messages are those of a script, whatever the replies are; or the script begins, and a writer who is told the
conversation so far goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from jaxsteer.axis.drift import PERCENTILE, Drift, drift_of
from jaxsteer.axis.projection import axis_hash, load_axis
from jaxsteer.axis.scripts import Scripts, load_scripts
from jaxsteer.errors import refuse_unknown
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention
from jaxsteer.personas.passages import Passage, read_passages
from jaxsteer.processes import from_first
from jaxsteer.prompts import encode_turns, with_system
from jaxsteer.prompts.generate import generate
from jaxsteer.ranges import CountFrom0, Range, Seed, Weight, check_ranges
from jaxsteer.runs import files
from jaxsteer.runs.bars import Advance, behind, load, progress_bar
from jaxsteer.runs.folder import opened
from jaxsteer.steer.vectors import Vectors, check_vectors
from jaxsteer.study.measure import edits_hash
from jaxsteer.writers.endpoint import Endpoint
from jaxsteer.writers.writer import Writer

WRITTEN, TRANSCRIPTS = "written.jsonl", "transcripts.jsonl"
"""Files of the directory: messages as they come, and the conversations."""
MOST_TURNS = 15
"""Of a conversation, as in the paper."""
USER = """Below is the beginning of a conversation about {domain} between a user and an AI assistant.

{said}

Write the next message of the user, who stays with the subject and goes deeper into it: one to three sentences, in the \
first person. Reply with that message alone."""
"""What a writer is asked who plays the user; ``{domain}`` and ``{said}`` stand in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriftOptions:
    """Which conversations are led, how they are written, and how drift is told."""

    domains: tuple[str, ...] = ()
    """Domains of the scripts (default: all)."""
    limit: CountFrom0 = 0
    """Conversations of each domain, at most (0: all that the scripts have)."""
    turns: Annotated[int, Range(1, MOST_TURNS)] = MOST_TURNS
    """User messages of a conversation, at most; without a user who writes, a script has to hold them."""
    system: str = ""
    """System message of all conversations."""
    max_new_tokens: int = 64
    """Longest reply."""
    user_tokens: int = 96
    """Longest message of a user who writes."""
    temperature: Weight = 0.7
    """0: always the likeliest token."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 0.9
    """Only the likeliest tokens that together reach this probability."""
    batch: int = 64
    """Replies at the same time."""
    seed: Seed = 0
    """Seed of what is drawn."""
    site: str = ""
    """Where drift is read (default: the site of the axis file, else the block at half depth)."""
    percentile: Annotated[float, Range(0, 100)] = PERCENTILE
    """Of the default's projections: a turn below it has drifted."""
    embed_at: str = ""
    """Where user messages are read to predict what follows (default: the same)."""


@dataclasses.dataclass
class _Talk:
    """One conversation while it is written."""

    domain: str
    name: str
    script: tuple[str, ...]
    turns: list[dict[str, str]] = dataclasses.field(default_factory=list)
    over: bool = False


def drift(
    model: str | Model,
    axis: str | Path | Vectors,
    conversations: str | Path | Scripts | Sequence[Passage] = "default",
    *,
    user: Writer | None = None,
    edits: Intervention | None = None,
    calibrate_on: str | Path | Sequence[Passage] = (),
    out: str | Path | None = None,
    any_weights: bool = False,
    options: DriftOptions | None = None,
    **changed: Any,
) -> Drift:
    """Lead a model through ``conversations`` and see where they go on ``axis``; or read some that somebody else had.

    ``conversations`` are scripts ("default" ships; a file, ``Scripts``), or passages, which are read as they are.
    ``user`` writes the user's messages behind the first one of each script. Under ``edits`` (caps) the model only
    writes; it reads without them. ``calibrate_on`` (a file, or passages) sets the threshold in place of the axis file.
    ``out`` is a directory for messages as they come, transcripts.jsonl and the result (metrics.json): the same call,
    cut off, goes on there and ends with the same bytes. ``changed`` are fields of ``options``.

    Raises ``UserError``, before a model is loaded, for options and domains that do not exist; for a model without chat
    template, and for an axis of another model. Many parameters: who speaks, what is read and by which measure, and
    where it is kept.
    """
    refuse_unknown(changed, [f.name for f in dataclasses.fields(DriftOptions)], "option of drift")
    chosen = dataclasses.replace(options or DriftOptions(), **changed)
    check_ranges(chosen)
    axis = axis if isinstance(axis, Vectors) else load_axis(axis)
    scripts, brought = None, tuple[Passage, ...]()
    if isinstance(conversations, str | Path | Scripts):
        scripts = chosen_scripts(conversations, chosen)
    else:
        brought = tuple(conversations)
    base = read_passages(calibrate_on) if isinstance(calibrate_on, str | Path) else tuple(calibrate_on)
    config = {
        "kind": "drift",
        "model": model if isinstance(model, str) else [model.name, model.fingerprint],
        "axis": axis_hash(axis),
        "conversations": _hash(scripts, [one.to_json() for one in brought]),
        "calibrate_on": _hash([one.to_json() for one in base]) if base else "",
        "user": [user.url, user.model] if isinstance(user, Endpoint) else user and type(user).__name__,
        "edits": None if edits is None else edits_hash(edits),
        **dataclasses.asdict(chosen),
    }
    kept = None if out is None else Path(out)
    with contextlib.nullcontext() if kept is None else opened(kept, config, lambda _: None) as folder:
        if folder is not None and folder.finished is not None:
            return Drift.from_json(folder.finished, str(folder.path))
        ready = load(model) if isinstance(model, str) else model
        check_vectors(axis, ready, any_weights=any_weights)
        if folder is not None:
            folder.begin()
        passages = brought if scripts is None else talks(ready, scripts, chosen, user, edits, kept)
        if kept is not None:
            files.write_lines(kept / TRANSCRIPTS, [one.to_json() for one in passages])
        found = drift_of(
            ready, axis, passages, site=chosen.site, percentile=chosen.percentile, calibrate_on=base,
            embed_at=chosen.embed_at, any_weights=any_weights,
        )  # fmt: skip
        if folder is not None:
            folder.finish(found)
    return found


def chosen_scripts(source: str | Path | Scripts, options: DriftOptions) -> Scripts:
    """The scripts of the domains, as many as are asked for. Raises ``UserError`` for a domain that is not there."""
    scripts = source if isinstance(source, Scripts) else load_scripts(source)
    refuse_unknown(options.domains, scripts.domains, "domain of conversations")
    most = options.limit or None
    return Scripts(domains={name: scripts.domains[name][:most] for name in options.domains or scripts.domains})


def talks(
    model: Model,
    scripts: Scripts,
    options: DriftOptions,
    user: Writer | None = None,
    edits: Intervention | None = None,
    kept: Path | None = None,
) -> tuple[Passage, ...]:
    """Every script as a conversation with the model. What stands in the directory ``kept`` is not written again.

    A conversation ends with its script (with ``options.turns`` where a ``user`` goes on), with a message or a reply of
    no text, and where it would not fit the model's positions. Those without a reply are left out.
    """
    led = [
        _Talk(domain=domain, name=f"{domain} {number}", script=script)
        for domain, some in scripts.domains.items()
        for number, script in enumerate(some, 1)
    ]
    log = None if kept is None else kept / WRITTEN
    lines = [] if log is None else from_first(lambda: files.resumed_lines(log))
    known = {(int(one["talk"]), int(one["turn"]), str(one["role"])): str(one["text"]) for one in lines}

    def keep(talk: int, turn: int, role: str, text: str) -> None:
        if (talk, turn, role) not in known:
            known[talk, turn, role] = text
            if log is not None:
                files.append_line(log, {"talk": talk, "turn": turn, "role": role, "text": text})

    total = sum(options.turns if user is not None else min(len(talk.script), options.turns) for talk in led)
    with progress_bar("conversations", total, unit="turn") as advance:
        done = 0
        for turn in range(options.turns):
            _ask(led, turn, user, options, known, keep)
            _answer(model, led, turn, options, edits, known, keep, partial(behind, advance, done))
            done += sum(not talk.over for talk in led)
            advance(done)
    return tuple(
        Passage(id=talk.name, group=talk.domain, messages=tuple(with_system(talk.turns, options.system)))
        for talk in led
        if talk.turns
    )


def _ask(
    led: Sequence[_Talk], turn: int, user: Writer | None, options: DriftOptions, known: Mapping[Any, str], keep: Any
) -> None:
    """The user's next message in every conversation that goes on."""
    waiting = []
    for number, talk in enumerate(led):
        if talk.over:
            continue
        if turn == 0 or (user is None and turn < len(talk.script)):
            talk.turns.append({"role": "user", "content": talk.script[turn]})
        elif user is None:
            talk.over = True
        elif (number, turn, "user") not in known:
            waiting.append(number)
    if waiting and user is not None:
        asked = [[{"role": "user", "content": _told(led[number])}] for number in waiting]
        user.reply_each(
            asked, max_tokens=options.user_tokens, keep=lambda i, text: keep(waiting[i], turn, "user", text.strip())
        )
    for number, talk in enumerate(led):
        if not talk.over and len(talk.turns) == 2 * turn:
            if text := known[number, turn, "user"]:
                talk.turns.append({"role": "user", "content": text})
            else:
                talk.over = True


def _told(talk: _Talk) -> str:
    """What a writer is asked who plays the user."""
    said = "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in talk.turns)
    return USER.format(domain=talk.domain, said=said)


def _answer(
    model: Model,
    led: Sequence[_Talk],
    turn: int,
    options: DriftOptions,
    edits: Intervention | None,
    known: Mapping[Any, str],
    keep: Any,
    advance: Advance,
) -> None:
    """The model's replies in all conversations that go on, at once: the same rows whatever stands in the log."""
    live = []
    for number, talk in enumerate(led):
        if not talk.over:
            chat = encode_turns(model.tokenizer, with_system(talk.turns, options.system))
            if len(chat.ids) + options.max_new_tokens <= model.config.max_positions:
                live.append(number)
            else:
                talk.over, talk.turns = True, talk.turns[:-1]
    if not all((number, turn, "assistant") in known for number in live):
        digest = hashlib.sha256(f"{options.seed}\x1f{turn}".encode()).digest()
        made = generate(
            model, [with_system(led[number].turns, options.system) for number in live], edits=edits,
            seed=int.from_bytes(digest[:4], "big") >> 1, temperature=options.temperature, top_p=options.top_p,
            max_new_tokens=options.max_new_tokens, batch=options.batch, progress=advance,
        )  # fmt: skip
        for number, text in zip(live, made.texts, strict=True):
            keep(number, turn, "assistant", text.strip())
    for number in live:
        if text := known[number, turn, "assistant"]:
            led[number].turns.append({"role": "assistant", "content": text})
        else:
            led[number].over, led[number].turns = True, led[number].turns[:-1]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
