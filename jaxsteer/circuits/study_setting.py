"""What a study of circuits compares: questions as rows, a metric, and pushes beside random ones.

With a vector both runs read the same tokens. A prompt adds tokens, and values go from token to token: so the base run
reads as many *filler* tokens in its place, one token repeated, that of ``FILLERS`` which moves the metric least from
that without any prompt. Its controls are random prompts of as many tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxsteer.circuits.rows import Rows, make_rows, metric_of, on_devices, reading_logits, token_difference
from jaxsteer.circuits.runs import score_rows
from jaxsteer.circuits.study_options import CircuitOptions
from jaxsteer.errors import UserError
from jaxsteer.evals.choice import encode_answers
from jaxsteer.models.generation import NO_TOKEN
from jaxsteer.models.log_probs import LOGITS_NOT_FINITE
from jaxsteer.models.model import Model
from jaxsteer.models.run import logits as run_logits
from jaxsteer.models.taps import Intervention
from jaxsteer.objectives import TargetLogProb
from jaxsteer.objectives.reads import Objective, Reads
from jaxsteer.objectives.terms import ByContext, Term
from jaxsteer.personas import Item
from jaxsteer.personas.items import mostly_replies, orders
from jaxsteer.processes import to_host
from jaxsteer.prompts import Placement, build_slots, encode, question_conversation
from jaxsteer.prompts.generate import generate
from jaxsteer.prompts.tokens import allowed_tokens, decoded
from jaxsteer.steer.completions import room
from jaxsteer.steer.vectors import Vectors

FILLERS = (".", ",", "...", "-", "the", "and")
"""Texts of one token that may stand in the place of a prompt, with a space before them or without."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Rows of the base run, what is measured on them, and whose they are."""

    rows: Rows
    metric: Objective
    groups: tuple[str, ...]
    """The question of every row."""
    factor: float
    """From a mean over rows to one over questions."""
    match: Objective | None = None
    """Of metric "tokens": 1 where the token that the pushed run likes best is liked best."""

    @property
    def weights(self) -> Float[np.ndarray, " B"]:
        """Of every row in means: its share of all readings."""
        found: np.ndarray = self.rows.readings.sum(-1) / self.rows.readings.sum()
        return found

    def take(self, count: int) -> np.ndarray:
        """Numbers of the rows of the first ``count`` questions."""
        first = list(dict.fromkeys(self.groups))[:count]
        return np.flatnonzero(np.isin(np.asarray(self.groups), first))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Push:
    """A vector, or the prompt: what is compared with the base run, and random pushes of equal size."""

    name: str
    label: str
    vectors: Vectors | None
    """Scaled so that its coefficient is 1; None for a prompt."""
    controls: tuple[Vectors, ...] = ()
    tokens: tuple[Int[np.ndarray, " S"], ...] = ()
    """Of a prompt: the ids that stand in its place in the base run, its own, and those of random prompts."""
    start: int = 0

    @property
    def site(self) -> str:
        """Where the vector acts; "" for a prompt."""
        return "" if self.vectors is None else self.vectors.sites[0]


# Questions


def asked_copies(items: Sequence[Item]) -> list[Item]:
    """Every question once, or in both orders of its choices."""
    return [copy for item in items for copy in orders(item)]


def contexts_of(
    model: Model, items: Sequence[Item], prompt: str, slot: str, ids: np.ndarray | None = None
) -> tuple[list[np.ndarray], list[tuple[np.ndarray, ...]]]:
    """Token ids of every copy of a question up to where the answer begins, and of its two answers (persona's first).

    ``ids`` stand in the place of the prompt's. Errors as ``around_prompt``.
    """
    copies = asked_copies(items)
    groups, _ = encode_answers(
        model.tokenizer, [one.asked for one in copies], [(one.matching, one.not_matching) for one in copies],
        [prompt], Placement(slot=slot),
    )  # fmt: skip
    answers = [group[0].answers for group in groups]
    if ids is None:
        return [group[0].context for group in groups], answers
    around, _ = around_prompt(model, items, prompt, slot)
    return [np.concatenate([before, ids, behind]).astype(np.int32) for before, behind in around], answers


def around_prompt(
    model: Model, items: Sequence[Item], prompt: str, slot: str
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Of every copy of a question the ids before and behind the prompt; and the prompt's ids, equal in all.

    Raises ``UserError`` where the prompt's tokens depend on what stands around it.
    """
    copies = asked_copies(items)
    conversations = [question_conversation(one.asked, Placement(slot=slot)) for one in copies]
    slots = build_slots(model.tokenizer, conversations, 1)
    ids: list[np.ndarray] = []
    for before, behind, conversation in zip(slots.before, slots.closing, conversations, strict=True):
        row = encode(model.tokenizer, conversation, prompt)
        inside = row[len(before) : len(row) - len(behind)]
        if not np.array_equal(np.concatenate([before, inside, behind]), row):
            raise UserError(f"the prompt {prompt[:60]!r} merges with the text around it: give another --slot")
        ids.append(inside)
    if not len(ids[0]) or any(not np.array_equal(ids[0], other) for other in ids):
        raise UserError(f"the prompt {prompt[:60]!r} has other tokens in some questions: give another --slot")
    return list(zip(slots.before, slots.closing, strict=True)), ids[0]


def random_prompts(model: Model, length: int, options: CircuitOptions) -> list[np.ndarray]:
    """Random prompts of ``length`` tokens that a prompt may have."""
    allowed = np.flatnonzero(allowed_tokens(model.tokenizer, model.config.vocab_size))
    rng = np.random.default_rng([options.seed, length])
    return [rng.choice(allowed, length).astype(np.int32) for _ in range(options.controls)]


def fillers(model: Model, length: int) -> list[np.ndarray]:
    """What may stand in the place of a prompt of ``length`` tokens. Raises ``UserError`` where there is nothing."""
    texts = decoded(model.tokenizer, range(len(model.tokenizer)))
    ids = [texts.index(text) for filler in FILLERS for text in (f" {filler}", filler) if text in texts]
    if not ids:
        raise UserError(f"none of {', '.join(FILLERS)} is one token of {model.name}: there is no filler for the prompt")
    return [np.full(length, i, np.int32) for i in ids]


def answer_rows(model: Model, contexts: Sequence[np.ndarray], answers: Sequence[tuple], items: Sequence[Item]) -> Task:
    """Both answers behind every question; the metric is the log-probability of the persona's minus that of the other,
    nats (per token where answers are replies)."""
    copies = asked_copies(items)
    texts = [context for context in contexts for _ in range(2)]
    rows = make_rows(model, texts, answers=[answer.tolist() for pair in answers for answer in pair])
    signs = jnp.tile(jnp.asarray([1.0, -1.0], jnp.float32), len(copies))
    metric = ByContext(TargetLogProb(per_token=mostly_replies(items)), signs)
    groups = tuple(one.group for one in copies for _ in range(2))
    return Task(rows=rows, metric=metric, groups=groups, factor=2.0)


@struct.dataclass
class Matches(Term):
    """1 where the token that is liked best is that of the context."""

    tokens: Int[Array, " c"]

    def __call__(self, reads: Reads) -> Float[Array, " rows"]:
        """The agreement of every reading."""
        wanted = self.tokens.at[reads.context].get(mode="fill", fill_value=-1)
        return (reads.logits.argmax(-1) == wanted).astype(jnp.float32)


def token_rows(
    model: Model,
    contexts: Sequence[Sequence[np.ndarray]],
    items: Sequence[Item],
    source: Intervention | None,
    options: CircuitOptions,
) -> tuple[Task, list[Rows]]:
    """The pushed run's own greedy replies, read where the two runs like different tokens (2604.08524).

    ``contexts`` are the questions in the base run, in the pushed one, and in others; the replies stand behind all, and
    the rows of all but the first come back beside the task. The metric is the logit of the pushed run's token minus
    that of the base run's. Raises ``UserError`` where they never differ.
    """
    made = generate(model, list(contexts[1]), temperature=0, max_new_tokens=options.max_new_tokens, edits=source)
    said = [row[row != NO_TOKEN] for row in made.tokens]
    starts = [len(context) for context in contexts[0]]
    every = [
        make_rows(model, [np.concatenate(pair) for pair in zip(some, said, strict=True)], prompt_length=starts)
        for some in contexts
    ]
    liked = [
        np.asarray(to_host(run_logits(model, r.tokens, r.mask, edits=e, prompt_length=r.prompt_length).argmax(-1)))
        for r, e in ((every[0], None), (every[1], source))
    ]
    steps = np.arange(every[0].tokens.shape[1])
    differ = (liked[0] != liked[1]) & (steps >= np.asarray(starts)[:, None] - 1)
    differ &= steps < every[0].lengths[:, None] - 1
    kept = np.flatnonzero(differ.any(-1))
    if not len(kept):
        raise UserError("the push changes no token of the replies: there is nothing to explain. Push more strongly")
    read = [np.flatnonzero(differ[row]).tolist() for row in kept]
    base, *others = (rows.take(kept).reading(read) for rows in every)
    metric = token_difference(reading_logits(model, base), reading_logits(model, others[0], source))
    groups = tuple(np.asarray([one.group for one in asked_copies(items)])[kept].tolist())
    return Task(rows=base, metric=metric, groups=groups, factor=1.0, match=Matches(metric.plus)), others


def row_scores(model: Model, rows: Rows, metric: Objective, edits: Intervention | None) -> Float[np.ndarray, " B"]:
    """The metric of every row, float64, a few rows at a time. Raises ``UserError`` where it is not finite."""
    pytree, found = metric_of(metric, model.config)
    size = max(1, min(len(rows.tokens), room() // rows.tokens.shape[1]))
    parts = []
    for begin in range(0, len(rows.tokens), size):
        index = np.minimum(np.arange(begin, begin + size), len(rows.tokens) - 1)
        part = on_devices(model, rows.take(index))
        parts.append(to_host(score_rows(model.params, model.config, part, edits, pytree, needs=found)))
    scores = np.concatenate(parts)[: len(rows.tokens)].astype(np.float64)
    if not np.isfinite(scores).all():
        raise UserError(f"the metric is NaN or infinite. {LOGITS_NOT_FINITE}")
    return scores


def digest(vectors: Vectors) -> str:
    """sha256 of what a vector does, for config.json."""
    facts = vectors.operation, vectors.coefficient, vectors.coefficient_units, vectors.positions
    whole = hashlib.sha256(repr(facts).encode())
    for site, array in vectors.arrays.items():
        whole.update(site.encode() + np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()
