"""What a found prompt has to beat, every baseline with the same questions and the same measurement.

A baseline may look at train and validation questions; test questions only report (``measure``). Whatever is chosen
among several candidates is chosen on validation questions, and how many there were is in the table.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsteer import organisms
from jaxsteer.errors import UserError
from jaxsteer.evals.choice import ChoiceResult, choice_eval, distinct, rate
from jaxsteer.evals.fluency import prompt_perplexity
from jaxsteer.evals.free_answers import WrittenResult, written_rates
from jaxsteer.evals.neutral_texts import neutral_texts
from jaxsteer.evals.rates import Difference
from jaxsteer.evals.side_effects import side_effects
from jaxsteer.models.sites import resid_site
from jaxsteer.personas import (
    Item,
    Persona,
    Splits,
    contrast_pairs,
    instructions,
    invitations,
    mean_difference,
    seed_phrase,
)
from jaxsteer.prompts import (
    Placement,
    build_slots,
    encode_texts,
    first_allowed,
    prompt_text,
    question_conversation,
    random_rows,
    render,
    retokenises_many,
    with_first_tokens,
)
from jaxsteer.statistics import rate_interval
from jaxsteer.steer import add
from jaxsteer.study.free_replies import TEST_REPLIES, VALIDATION_REPLIES, FreeReplies, Written, free_replies
from jaxsteer.study.selection import best_rate, by_replies
from jaxsteer.study.setting import token_mask
from jaxsteer.study.table_row import TableRow, rate_fields
from jaxsteer.writers.writer import Writer

if TYPE_CHECKING:
    from jaxsteer.models.model import Model
    from jaxsteer.models.taps import Intervention

RANDOM_PROMPTS = 20
COEFFICIENTS = (0.1, 0.25, 0.5, 1.0)
"""Of activation steering, in mean norms of the stream, away from the persona, or towards it to elicit it."""
STEERED_LAYERS = 8
"""At most this many layers are tried, evenly spread."""
MAX_KL = 0.5
"""Steering that changes neutral text by more nats per token than this is not chosen."""
DIRECTION_ITEMS = 128
FLUENCY_ITEMS = 8
AVERAGED = ("preference", "a_rate", "swapped_rate", "auroc", "probability")
"""Of several prompts, what a row has the mean of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What a baseline works with."""

    model: Model
    persona: Persona
    splits: Splits
    placement: Placement = Placement()
    length: int = 8
    """Tokens of a random prompt: those of the searched ones."""
    tokens: str = "words"
    """Tokens that a random prompt may use, as in a search: words, ascii or all."""
    seed: int = 0
    questions: int | None = None
    """At most this many validation and test questions (default: all)."""
    writer: Writer | None = None
    """A language model that writes prompts, for ProTeGi."""

    @property
    def validation(self) -> tuple[Item, ...]:
        """Validation questions in use."""
        return distinct(self.splits.validation)[: self.questions]

    @property
    def test(self) -> tuple[Item, ...]:
        """Test questions in use."""
        return distinct(self.splits.test)[: self.questions]

    @functools.cached_property
    def replies(self) -> FreeReplies | None:
        """How replies are read, where the persona's answers are replies; they are what rates go by then."""
        return free_replies(self.model, self.splits.train, self.splits.validation)

    def written(
        self,
        part: str,
        prompts: Sequence[str],
        *,
        edits: Intervention | None = None,
        model: Model | None = None,
        placement: Placement | None = None,
    ) -> list[WrittenResult]:
        """What is written freely to "validation" or "test" questions; nothing where answers are no replies."""
        most = {"validation": VALIDATION_REPLIES, "test": TEST_REPLIES}[part]
        if self.replies is None:
            return []
        items, where = getattr(self, part)[:most], placement or self.placement
        return self.replies.written(model or self.model, items, prompts, placement=where, edits=edits)

    @property
    def sentences(self) -> tuple[str, ...]:
        """At most ten plain sentences that ask for the goal, a character's own first."""
        persona = self.persona
        named = invitations if persona.goal == "elicit" else instructions
        own = persona.sentences[persona.goal] if persona.role else ()
        return (*own, *named(persona.subject))[:10]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a baseline came up with."""

    prompts: tuple[str, ...]
    """One prompt, or several whose mean and range are reported."""
    edits: Intervention | None = None
    tried: int = 1
    """Candidates that were compared to choose it."""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


def zero_shot(bench: Bench) -> Found:
    """No prompt at all."""
    return Found(prompts=("",))


def instruction(bench: Bench) -> Found:
    """One plain sentence that asks for the goal, the same for every model."""
    return Found(prompts=bench.sentences[:1])


def best_instruction(bench: Bench) -> Found:
    """The best of ten plain sentences, chosen on validation questions."""
    texts = bench.sentences
    chosen, rates = choose(bench, texts)
    return Found(prompts=(texts[chosen],), tried=len(texts), details={"validation_rates": rates})


def oracle(bench: Bench) -> Found:
    """The strongest cue that the organism's generator knows: what a perfect search could find."""
    if bench.persona.name not in organisms.BEHAVIOURS:
        raise UserError(f"only the organisms' personas have a known cue; {bench.persona.name!r} has none")
    return Found(prompts=(bench.persona.counter_cues[0],))


def random_prompts(bench: Bench) -> Found:
    """Twenty prompts of random allowed tokens that keep their tokens when read as text."""
    model, tokenizer = bench.model, bench.model.tokenizer
    asked = [question_conversation(item.asked, bench.placement) for item in bench.splits.train[:4]]
    slots = build_slots(tokenizer, asked, bench.length, max_positions=model.config.max_positions)
    allowed = with_first_tokens(tokenizer, slots, token_mask(model, bench.tokens))
    first = first_allowed(tokenizer, slots, allowed)
    rng = np.random.default_rng([bench.seed, 20])
    kept: dict[str, None] = {}
    for _ in range(8):
        ids = random_rows(rng, allowed, 8 * RANDOM_PROMPTS, bench.length, first)
        kept |= dict.fromkeys(prompt_text(tokenizer, row) for row in ids[retokenises_many(tokenizer, slots, ids)])
        if len(kept) >= RANDOM_PROMPTS:
            return Found(prompts=tuple(kept)[:RANDOM_PROMPTS])
    raise UserError(
        f"only {len(kept)} random prompts of {bench.length} tokens keep their tokens when they are read as text: "
        f"restrict them to whole words"
    )


def seed(bench: Bench) -> Found:
    """The natural phrase that a seeded search would start from, without any search."""
    return Found(prompts=(seed_phrase(bench.persona.subject),))


def steering(bench: Bench) -> Found:
    """Activation steering along the persona's direction; layer and coefficient chosen on validation questions."""
    model, n_layers = bench.model, bench.model.config.n_layers
    layers = sorted({round(i) for i in np.linspace(0, n_layers - 1, min(n_layers, STEERED_LAYERS))})
    cues = bool(bench.persona.counter_cues and bench.persona.pro_cues)
    position = "decision" if cues else "matched"
    train = bench.splits.train[:DIRECTION_ITEMS]
    pairs = contrast_pairs(
        model, bench.persona, train, position, split_seed=bench.splits.seed, placement=bench.placement
    )
    direction = mean_difference(model, pairs, [resid_site(layer) for layer in layers])
    grid = [(layer, bench.persona.sign * c) for layer in layers for c in COEFFICIENTS]
    edits = [
        add(site := resid_site(layer), direction.delta[site], c, mean_norm=direction.mean_resid_norm[site])
        for layer, c in grid
    ]
    asked = [
        render(model.tokenizer, question_conversation(t, Placement(style=bench.placement.style)), "")
        for t in neutral_texts(model)
    ]
    kl = side_effects(model, encode_texts(model.tokenizer, asked, style=bench.placement.style), edits).kl
    gentle = [i for i in range(len(grid)) if kl[i] <= MAX_KL]
    if not gentle:
        return Found(prompts=("",), tried=len(grid), details={"note": f"no setting stays below a KL of {MAX_KL}"})
    chosen, rates = choose(bench, [""], variants=[edits[i] for i in gentle], ties=[float(kl[i]) for i in gentle])
    layer, coefficient = grid[gentle[chosen]]
    return Found(
        prompts=("",),
        edits=edits[gentle[chosen]],
        tried=len(grid),
        details={
            "site": resid_site(layer),
            "coefficient": coefficient,
            "units": "mean_resid_norm",
            "read_position": position,
            "kl": float(kl[gentle[chosen]]),
            "validation_rates": rates,
        },
    )


def protegi(bench: Bench) -> Found:
    """Prompts criticised and rewritten by a language model, round by round (arXiv 2305.03495)."""
    from jaxsteer.study.protegi import improve

    if bench.writer is None:
        raise UserError("ProTeGi needs a language model that writes prompts: give the bench a writer")
    if bench.persona.goal == "elicit":
        raise UserError("ProTeGi asks for instructions against a behaviour, and here the goal is to elicit it")
    made = improve(
        bench.model, bench.persona, bench.splits.train, bench.writer, seed=bench.seed, placement=bench.placement
    )
    chosen, rates = choose(bench, made.beam)
    return Found(
        prompts=(made.beam[chosen],),
        tried=made.tried,
        details={"calls": made.calls, "writer": made.writer, "rounds": made.rounds, "validation_rates": rates},
    )


BASELINES: dict[str, Callable[[Bench], Found]] = {
    "zero-shot": zero_shot,
    "instruction": instruction,
    "best of 10 instructions": best_instruction,
    "oracle cue": oracle,
    "random prompt": random_prompts,
    "seed phrase": seed,
    "activation steering": steering,
    "ProTeGi": protegi,
}
"""What needs no search; baselines that do are searches of their own (``experiments/main_table.py`` runs all)."""


def choose(
    bench: Bench, prompts: Sequence[str], *, variants: Sequence[Intervention] = (), ties: Sequence[float] | None = None
) -> tuple[int, list[float]]:
    """(index of the best candidate on validation questions, the rates of all).

    Candidates are prompts, or edits with a single prompt. Rates are those of free replies where answers are replies.
    Equal ones are settled by the smaller of ``ties``, or by the probability of the persona's answer.
    """
    (baseline,) = choice_eval(bench.model, bench.validation, [""], placement=bench.placement)
    results = choice_eval(bench.model, bench.validation, prompts, variants=variants, placement=bench.placement)
    found = [rate(result, baseline, draws=1) for result in results]
    edits = variants or (None,)
    said = [one for edit in edits for one in bench.written("validation", prompts, edits=edit)]  # as the results
    goal = bench.persona.goal
    compared = by_replies(found, [written_rates(one) for one in said], goal)
    by = [bench.persona.sign * row.probability for row in found] if ties is None else ties
    return best_rate(compared, by, goal=goal), [row.rate for row in compared]


def measure(bench: Bench, found: dict[str, Found]) -> list[TableRow]:
    """One row per baseline: its rate with all controls on the test questions, against zero-shot on the same ones."""
    (zero,) = choice_eval(bench.model, bench.test, [""], placement=bench.placement)
    texts = list(dict.fromkeys(p for f in found.values() if f.edits is None for p in f.prompts))
    results = dict(zip(texts, choice_eval(bench.model, bench.test, texts, placement=bench.placement), strict=True))
    replies = bench.written("test", ["", *texts])
    said = dict(zip(texts, replies[1:]))
    asked = [item.asked for item in bench.test[:FLUENCY_ITEMS]]
    perplexity = dict(zip(texts, prompt_perplexity(bench.model, texts, asked, placement=bench.placement), strict=True))
    rows = []
    for name, made in found.items():
        if made.edits is not None:
            of_row = choice_eval(
                bench.model, bench.test, made.prompts, variants=[made.edits], placement=bench.placement
            )
            written = bench.written("test", made.prompts, edits=made.edits)
        else:
            of_row = [results[prompt] for prompt in made.prompts]
            written = [said[prompt] for prompt in made.prompts if prompt in said]
        free = Written(written, replies[0], bench.persona.goal) if replies else None
        row = summarise(of_row, zero, [perplexity.get(prompt) for prompt in made.prompts], free)
        rows.append(
            dataclasses.replace(
                row, method=name, tried=made.tried, details=made.details, steered=made.edits is not None
            )
        )
    return rows


def summarise(
    results: Sequence[ChoiceResult],
    zero: ChoiceResult,
    perplexity: Sequence[float | None],
    written: Written | None = None,
) -> TableRow:
    """The numbers of a row: a prompt's rate with all controls, or the mean of several prompts with each in ``each``.

    The interval of a mean is that of the prompts' mean over questions: it is for these prompts, on other questions.
    With what was ``written`` freely, rates are those of free replies.
    """
    rates = [rate(result, zero) for result in results]
    fields = [rate_fields(one) for one in rates] if written is None else written.fields(results, rates)
    rows = [
        TableRow(prompt=result.prompt, perplexity=x, **more)
        for result, x, more in zip(results, perplexity, fields, strict=True)
    ]
    if len(rows) == 1:
        return rows[0]
    mean, before = np.mean([result.persona for result in results], axis=0), zero.persona
    groups: Sequence[str] = zero.groups
    if written is not None:
        mean, before, groups = written.shares()

    def average(name: str) -> float | None:
        values = [getattr(row, name) for row in rows]
        return None if values[0] is None else float(np.mean(values))

    known = [value for value in perplexity if value is not None]
    return TableRow(
        prompt=results[0].prompt,
        perplexity=float(np.exp(np.mean(np.log(known)))) if known else None,
        rate=float(mean.mean()) if len(mean) else math.nan,
        ci95=rate_interval(mean, groups),
        range=(min(row.rate for row in rows), max(row.rate for row in rows)),
        n=rows[0].n,
        **{name: average(name) for name in AVERAGED},  # type: ignore[arg-type]
        goal=rows[0].goal,
        note=next((row.note for row in rows if row.note), None),
        letter_collapse=any(row.letter_collapse for row in rows),
        difference=Difference.of_rates(mean, before, groups) if len(mean) else None,
        each=tuple(rows),
    )


def run_baselines(
    bench: Bench, names: Sequence[str] | None = None, *, say: Callable[[str], None] = lambda line: None
) -> list[TableRow]:
    """Find and measure baselines (default: all that need no search, and ProTeGi only with a writer).

    Rows are in the order of ``names`` and hold the seconds that finding took. Raises ``UserError`` for unknown names
    and for one that this bench cannot have.
    """
    if names is None:
        skipped = set() if bench.persona.name in organisms.BEHAVIOURS else {"oracle cue"}
        skipped |= set() if bench.writer and bench.persona.goal == "reduce" else {"ProTeGi"}
        names = [name for name in BASELINES if name not in skipped]
    found, seconds = {}, {}
    for name in names:
        if name not in BASELINES:
            raise UserError(f"the baseline {name!r} is unknown: expected {', '.join(BASELINES)}")
        say(f"Baseline: {name}")
        started = time.perf_counter()
        found[name] = BASELINES[name](bench)
        seconds[name] = time.perf_counter() - started
    return [dataclasses.replace(row, seconds=seconds[row.method]) for row in measure(bench, found)]
