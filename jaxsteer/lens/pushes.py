"""Texts read as they are, or under a push beside its absence and random pushes of equal size: what the command does."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer.errors import UserError
from jaxsteer.lens.comparison import LensComparison
from jaxsteer.lens.differences import Side, compare
from jaxsteer.lens.lens_files import FILE, KIND, read_result, write_result
from jaxsteer.lens.logit_lens import EVERY, read
from jaxsteer.lens.result import LensReading
from jaxsteer.lens.texts import Text, rows_of_texts
from jaxsteer.lens.tuned_lens import TunedLens
from jaxsteer.models.model import Model
from jaxsteer.models.roles import Rendered
from jaxsteer.personas import Persona
from jaxsteer.prompts import allowed_tokens, with_system
from jaxsteer.ranges import CountFrom0, Seed, check_ranges
from jaxsteer.runs.folder import opened
from jaxsteer.steer.edits import Edits
from jaxsteer.steer.vectors import RANDOMISED, Vectors, random_controls


@dataclasses.dataclass(frozen=True, kw_only=True)
class LensOptions:
    """What is read of texts."""

    sites: tuple[str, ...] = EVERY
    """Sites of the stream, wildcards included, or blocks.3.attn.hook_result for what each head writes; the output is
    always read."""
    top: int = 10
    """Most likely tokens kept of every place and token."""
    tokens: tuple[str, ...] = ()
    """Tokens whose rank and probability are told at every place, as they stand: " Paris" with its space."""
    prompt: str = ""
    """A system message: read the texts, as what a user says, after it and without it."""
    controls: CountFrom0 = 2
    """Random vectors of equal norm, or random prompts of as many tokens, whose KL stands beside."""
    seed: Seed = 0
    """Of the controls."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_ranges(self)


def read_pushed(
    model: Model,
    texts: Sequence[Text],
    *,
    steer: Vectors | None = None,
    against: Vectors | None = None,
    edits_of: Callable[[Vectors], Edits] = Vectors.edits,
    lens: TunedLens | None = None,
    options: LensOptions = LensOptions(),
    out: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> LensReading | LensComparison:
    """Read ``texts`` by the logit lens or ``lens``; under a push, compare the run with the one without it.

    The run is steered by ``steer``, if there is one. What it is compared with is steered by ``against``, or follows
    ``options.prompt``, or is plain. With a prompt alone, the run follows it and the other does not. ``edits_of`` makes
    edits of vectors (coefficient, positions). With ``out``, a directory gets the result (docs/run-files.md).

    Many parameters: the texts, two pushes, and how they are read. Raises ``UserError`` as ``lens.read``, for plain
    texts with a prompt, and for ``against`` without ``steer``, or with a prompt.
    """
    if against is not None and (steer is None or options.prompt):
        raise UserError("--against is what a run steered by --steer is compared with: give --steer, and no --prompt")
    rows = rows_of_texts(model, texts)
    config = {
        "kind": KIND, "model": model.name, "fingerprint": model.fingerprint, "texts": _digest(texts),
        "options": dataclasses.asdict(options), "lens": "" if lens is None else lens.name,
        "steer": _told(steer, edits_of), "against": _told(against, edits_of),
    }  # fmt: skip
    common: dict[str, Any] = {
        "sites": options.sites, "lens": lens, "tokens": chosen_tokens(model, options.tokens), "top": options.top,
        "progress": progress,
    }  # fmt: skip

    def found() -> LensReading | LensComparison:
        if steer is None and not options.prompt:
            return read(model, rows, **common)
        run, base, controls = _sides(model, texts, rows, steer, against, edits_of, options)
        return compare(model, run, base, controls=controls, **common)

    if out is None:
        return found()
    with opened(out, config, lambda _: None) as folder:
        if folder.finished is not None and (folder.path / FILE).is_file():
            return read_result(folder.path)
        folder.begin()
        result = found()
        write_result(result, folder.path)
    return result


def persona_questions(persona: Persona, count: int) -> list[Text]:
    """The first ``count`` different questions of a persona, as conversations that the assistant is to answer."""
    asked = [*(item.asked for item in persona.items), *persona.ask]
    questions = list(dict.fromkeys(asked))[:count]
    if not questions:
        raise UserError(f"{persona.name} has no questions to read")
    turns = [(("user", one),) if isinstance(one, str) else one for one in questions]
    return [[{"role": role, "content": said} for role, said in each] for each in turns]


def chosen_tokens(model: Model, texts: Sequence[str]) -> tuple[int, ...]:
    """The ids of texts that are one token each. Raises ``UserError`` for others."""
    found = []
    for text in texts:
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(
                f"--tokens {text!r} is {len(ids)} tokens of {model.name} "
                f"({', '.join(repr(model.tokenizer.decode([i])) for i in ids)}): give texts of one token"
            )
        found.append(int(ids[0]))
    return tuple(found)


def _sides(
    model: Model,
    texts: Sequence[Text],
    plain: Sequence[Rendered],
    steer: Vectors | None,
    against: Vectors | None,
    edits_of: Callable[[Vectors], Edits],
    options: LensOptions,
) -> tuple[Side, Side, list[Side]]:
    """The run, what it is compared with, and the controls of the run; ``plain`` are the texts in token space."""

    def prompted(prompt: str) -> list[Any]:
        if any(isinstance(text, str) for text in texts):
            raise UserError("a prompt is a system message, and plain text has none: give --chat, or conversations")
        return rows_of_texts(model, [with_system([dict(turn) for turn in text], prompt) for text in texts])  # type: ignore[arg-type]

    base = Side(texts=plain)
    if options.prompt and steer is not None:
        base = Side(texts=prompted(options.prompt), name="prompted")
    elif against is not None:
        base = Side(texts=plain, edits=edits_of(against), name="against")
    if steer is None:
        length = len(model.tokenizer(options.prompt, add_special_tokens=False)["input_ids"])
        allowed = np.flatnonzero(allowed_tokens(model.tokenizer, model.config.vocab_size))
        rng = np.random.default_rng(options.seed)
        drawn = [model.tokenizer.decode(rng.choice(allowed, length)) for _ in range(options.controls)]
        controls = [Side(texts=prompted(text), name=f"random {i}") for i, text in enumerate(drawn, 1)]
        return Side(texts=prompted(options.prompt), name="prompted"), base, controls
    made = random_controls(steer, options.controls, options.seed) if steer.operation in RANDOMISED else []
    controls = [Side(texts=plain, edits=edits_of(one), name=f"random {i}") for i, one in enumerate(made, 1)]
    return Side(texts=plain, edits=edits_of(steer), name="steered"), base, controls


def _told(vectors: Vectors | None, edits_of: Callable[[Vectors], Edits]) -> str:
    """What a vector does, and a digest of its numbers."""
    if vectors is None:
        return ""
    digest = hashlib.sha256(b"".join(array.tobytes() for array in vectors.arrays.values())).hexdigest()
    return f"{edits_of(vectors).label} ({digest[:12]})"


def _digest(texts: Sequence[Text]) -> str:
    return f"{len(texts)} texts, {hashlib.sha256(repr([*texts]).encode()).hexdigest()[:16]}"
