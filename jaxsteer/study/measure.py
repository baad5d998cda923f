"""``measure``: what prompts and an edit do to a model's answers, and to everything else.

The baseline, neither prompted nor steered, is always measured on the same questions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jaxsteer.checkpoints.loading import ORGANISM, cache_dir
from jaxsteer.errors import UserError
from jaxsteer.evals.choice import ChoiceResult, choice_eval, compared, rate
from jaxsteer.evals.fluency import prompt_perplexity
from jaxsteer.evals.free_answers import MAX_NEW_TOKENS, WrittenResult, agreeing, ask, written_eval, written_rates
from jaxsteer.evals.neutral_texts import neutral_texts
from jaxsteer.evals.organism_lookups import Lookups, lookup_accuracy
from jaxsteer.evals.persona_gates import is_persona_organism
from jaxsteer.evals.scoring import same_form
from jaxsteer.evals.side_effects import reply_effects
from jaxsteer.evals.truthful import truthful_eval, truthful_rates
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention
from jaxsteer.personas import (
    Dataset,
    Item,
    OpenQuestion,
    Persona,
    orders,
    with_replies,
)
from jaxsteer.personas.replies import REPLY_TOKENS
from jaxsteer.processes import is_first
from jaxsteer.ranges import as_tuple, must_be
from jaxsteer.runs.bars import load, progress_bar
from jaxsteer.runs.files import JUDGED, write_json
from jaxsteer.runs.folder import opened
from jaxsteer.runs.result import Unfinished
from jaxsteer.study.free_replies import FreeReplies, free_replies, judge_answers
from jaxsteer.study.measurement import Measured, Measurement, PromptEffects
from jaxsteer.study.questions import MeasureOptions, Questions, questions_of
from jaxsteer.writers.endpoint import Endpoint
from jaxsteer.writers.judge import Judged, Rubric
from jaxsteer.writers.writer import Writer

OPEN_TOKENS = 128
"""Longest free answer to a question without choices."""
FLUENCY_QUESTIONS = 8
"""Questions after which a prompt's perplexity is measured."""

UNFINISHED = "unfinished.json"
"""File of a measurement's directory: what is measured until the last stage is done."""

Result = TypeVar("Result")


def measure(
    model: str | Model,
    persona: str | Persona | Dataset | Questions,
    prompts: str | Sequence[str] = (),
    *,
    edits: Intervention | None = None,
    controls: Mapping[str, Intervention] | None = None,
    transfer: str | Model | Sequence[str | Model] = (),
    options: MeasureOptions | None = None,
    out: str | Path | None = None,
    **changed: Any,
) -> Measurement:
    """Measure prompt texts, an edit, or both together on a persona's questions.

    Every prompt is measured with the edit, if there is one, and the edit alone too. ``controls`` are edits by name that
    are measured beside it, without prompts, as random vectors of equal norm are (``steer.random_controls``); those of
    the edit's form run in its program. ``transfer`` names further models
    on which the same texts are measured; one prompt, or one model, may stand for a list of one. ``changed`` are fields
    of ``options``. ``out`` is a directory for the result (metrics.json) and, until then, for what is measured and the
    judge's replies as they come: the same measurement, cut off, goes on there. Without it those of an ``Endpoint`` are
    kept in the cache until the measurement is done. Many parameters: what is measured, on what, and where it is kept.
    Raises ``UserError`` before a model is loaded where there is nothing to measure or options do not go together, and
    ``Unfinished`` when the judge gives no answer.
    """
    prompts, transfer = as_tuple(prompts), as_tuple(transfer)
    known = [field.name for field in dataclasses.fields(MeasureOptions)]
    if unknown := sorted(set(changed) - set(known)):
        raise UserError(f"jaxsteer.measure has no option {', '.join(unknown)}; it has {', '.join(known)}")
    chosen = dataclasses.replace(options or MeasureOptions(), **changed)
    if not prompts and edits is None and not chosen.generate and chosen.judge is None:
        raise UserError("nothing to measure: give prompts, edits, generate=True or a judge")
    for one in (model, *transfer):
        must_be(one, (str, Model), "a model of jaxsteer.measure")
    must_be(persona, (str, Persona, Dataset, Questions), "persona")
    must_be(chosen, MeasureOptions, "options")
    must_be(controls, (Mapping, type(None)), "controls, edits by name,")
    beside = dict(controls or {})
    for edit in (edits, *beside.values()):
        must_be(edit, (Intervention, type(None)), "an edit (Vectors.edits, steer.add ...)")
    for text in prompts:
        must_be(text, str, "a prompt")
    if beside and edits is None:
        raise UserError("controls stand beside an edit: give edits with them")
    if "" in beside:
        raise UserError("a control has no name: name each of them")
    if transfer and edits is not None:
        raise UserError("transfer measures prompt texts on other models; an edit belongs to one")
    asked = persona if isinstance(persona, Questions) else questions_of(persona, chosen)
    config = _config((model, *transfer), asked, prompts, edits, chosen)
    if beside:
        config["controls"] = {name: edits_hash(edit) for name, edit in beside.items()}
    kept = None if out is None else Path(out)
    if out is None and isinstance(chosen.judge, Endpoint):
        kept = cache_dir() / "measurements" / hashlib.sha256(json.dumps(config).encode()).hexdigest()[:32]
    done: list[Measurement] = []

    def whole(part: Measurement) -> Measurement:
        return dataclasses.replace((*done, part)[0], transfer=(*done, part)[1:])

    with contextlib.nullcontext() if kept is None else opened(kept, config, lambda _: None) as folder:
        if folder is not None:
            folder.begin()

        def keep(part: Measurement) -> None:
            if folder is not None:
                write_json(folder.path / UNFINISHED, whole(part).to_json())

        for one in (model, *transfer):
            ready = load(one, dtype=chosen.dtype) if isinstance(one, str) else one
            try:
                texts = tuple(prompts) if edits is None else ("", *prompts)
                bench = _Bench(model=ready, asked=asked, texts=texts, edits=edits, controls=beside, options=chosen)
                part = _measured(bench, keep, None if kept is None else kept / JUDGED)
            except Unfinished as error:
                where = f"What was measured and judged is kept in {kept}: the same command goes on."
                assert isinstance(error.result, Measurement)
                raise Unfinished(str(error), whole(error.result), "" if kept is None else where) from error
            done.append(part)
        found = dataclasses.replace(done[0], transfer=tuple(done[1:]))
        if folder is not None:
            folder.finish(found)
            if is_first():
                (folder.path / UNFINISHED).unlink(missing_ok=True)
    if out is None and kept is not None and is_first():
        shutil.rmtree(kept, ignore_errors=True)
    return found


def _config(
    models: Sequence[str | Model],
    asked: Questions,
    prompts: Sequence[str],
    edits: Intervention | None,
    options: MeasureOptions,
) -> dict[str, Any]:
    """What decides a measurement, for config.json."""
    return {
        "kind": "measurement",
        "models": [one if isinstance(one, str) else [one.name, one.fingerprint] for one in models],
        "persona": asked.name,
        "questions": hashlib.sha256(repr(asked).encode()).hexdigest(),
        "prompts": list(prompts),
        "edits": None if edits is None else edits_hash(edits),
        "placement": dataclasses.asdict(options.placement),
        **{name: getattr(options, name) for name in ("per_token", "generate", "side_effects")},
        **judge_config(options.judge, options.rubric),
    }


def judge_config(judge: Writer | None, rubric: Rubric) -> dict[str, Any]:
    """Who judges, and by what, for config.json."""
    named = [judge.url, judge.model] if isinstance(judge, Endpoint) else judge and type(judge).__name__
    return {"judge": named, "rubric": rubric.template_hash}


def edits_hash(edits: Intervention) -> str:
    """sha256 over an edit's structure and arrays."""
    leaves, shape = jax.tree.flatten(edits)
    digest = hashlib.sha256(str(shape).encode())
    for leaf in leaves:
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _measured(bench: _Bench, keep: Callable[[Measurement], None], log: Path | None) -> Measurement:
    """Everything that was asked for, on one model; ``keep`` gets what is there after every stage, the judge's last.

    Raises ``Unfinished`` when the judge gives no answer."""
    if bench.asked.bare is not None:
        with progress_bar("replies", unit="reply") as advance:
            answered = with_replies(bench.model, bench.asked.bare, progress=advance)
        bench = dataclasses.replace(bench, asked=questions_of(answered, bench.options))
    model, asked, options, steered = bench.model, bench.asked, bench.options, bench.edits is not None
    rows = [
        Measured(prompt="", steered=False),
        *(Measured(prompt=text, steered=steered) for text in bench.texts),
        *(Measured(prompt="", steered=True, control=name) for name in bench.controls),
    ]

    def found(rows: Sequence[Measured]) -> Measurement:
        return Measurement(
            model=model.name,
            persona=asked.name,
            split=asked.split,
            style=options.placement.style,
            slot=options.placement.slot,
            questions=asked.count,
            goal=None if asked.goal == "reduce" else asked.goal,
            baseline=rows[0],
            prompts=tuple(row for row in rows[1:] if not row.control),
            controls=tuple(row for row in rows[1:] if row.control),
        )

    scored = bench.choices() if asked.items else []
    if scored:
        rows = [
            dataclasses.replace(row, rate=rate(result, _against(scored, result))) for row, result in zip(rows, scored)
        ]
        keep(found(rows))
    if asked.many:
        truths = bench.truths()
        rates = [truthful_rates(result, _against(truths, result)) for result in truths]
        rows = [dataclasses.replace(row, truthful=found) for row, found in zip(rows, rates, strict=True)]
        keep(found(rows))
    if options.side_effects:
        effects = bench.side_effects()
        rows = [dataclasses.replace(row, side_effects=e) for row, e in zip(rows, effects, strict=True)]
        keep(found(rows))
    if options.generate or options.judge is not None or bench.replies is not None:
        rows, written = bench.with_answers(rows, scored)
        keep(found(rows))
    for i, row in enumerate(rows if options.judge is not None else ()):
        try:
            with progress_bar(f"judge, {i + 1} of {len(rows)}"):
                judged = bench.judged(row.answers, log)
        except UserError as error:
            raise Unfinished(str(error), found(rows)) from error
        rows[i] = dataclasses.replace(row, judged=agreeing(judged, written[i]) if written else judged)
        keep(found(rows))
    return found(rows)


def _against(results: Sequence[Result], result: Result) -> Result | None:
    """The baseline that a result is paired with: the first one, which has none."""
    return None if result is results[0] else results[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bench:
    """One model with what is measured on it. Results are lists: the baseline first, then every text with the edit, then
    the controls without a text."""

    model: Model
    asked: Questions
    texts: tuple[str, ...]
    edits: Intervention | None
    controls: Mapping[str, Intervention]
    options: MeasureOptions

    @property
    def parts(self) -> list[tuple[list[str], list[Intervention]]]:
        """(texts, edits) that are measured together: edits in one program, all texts of the first edit first."""
        edits = [] if self.edits is None else [self.edits]
        controls = list(self.controls.values())
        if self.texts == ("",):
            together, rest = [*edits, *controls], []
        else:
            together, rest = edits, controls
        parts = [([""], list[Intervention]())] + ([(list(self.texts), together)] if self.texts else [])
        alike = [[rest[i] for i in some] for some in same_form(rest)] if rest else []
        if len(same_form(together)) > 1:
            raise UserError("the controls must be edits of the same form as the edit: random_controls makes them")
        return parts + [([""], some) for some in alike]

    def beside(self, what: str, evaluate: Callable[..., list[Result]]) -> list[Result]:
        """``evaluate(texts, edits, progress)`` of every part; none of the edits is none."""
        with progress_bar(what, unit="row") as advance:
            return [one for texts, edits in self.parts for one in evaluate(texts, edits, advance)]

    def each(self, what: str, evaluate: Callable[..., list[Result]]) -> list[Result]:
        """``evaluate(texts, edit, progress)`` of every part, edit by edit; ``edit`` may be None."""
        return self.beside(
            what, lambda texts, edits, progress: [r for e in edits or [None] for r in evaluate(texts, e, progress)]
        )

    @functools.cached_property
    def replies(self) -> FreeReplies | None:
        """How replies are measured, where answers are replies."""
        with progress_bar("neutral replies"):
            return free_replies(self.model, self.asked.train, self.asked.held_out)

    def choices(self) -> list[ChoiceResult]:
        """Log-probabilities of two answers."""
        found = self.beside(
            "answers",
            lambda texts, edits, progress: choice_eval(
                self.model,
                self.asked.items,
                texts,
                variants=edits,
                placement=self.options.placement,
                progress=progress,
                yardsticks=() if self.replies is None else self.replies.yardsticks(len(self.asked.items)),
            ),
        )
        return [compared(result, per_token=self.options.per_token) for result in found]

    def truths(self) -> list[Any]:
        """Log-probabilities of many answers."""
        return self.beside(
            "many answers",
            lambda texts, edits, progress: truthful_eval(
                self.model,
                self.asked.many,
                texts,
                variants=edits,
                placement=self.options.placement,
                progress=progress,
            ),
        )

    def with_answers(
        self, rows: Sequence[Measured], scored: Sequence[ChoiceResult]
    ) -> tuple[list[Measured], list[WrittenResult]]:
        """The rows with what the model writes; and how rules read it, where there are answers to compare it with."""
        written: list[WrittenResult] = []
        model, placement, asked = self.model, self.options.placement, self.asked
        if asked.items:
            words = self.replies and self.replies.words
            most = REPLY_TOKENS if words else MAX_NEW_TOKENS
            written = self.each(
                "free answers",
                lambda texts, edits, progress: written_eval(
                    model, asked.items, texts, read_by=words or asked.reasons, edits=edits, placement=placement,
                    max_new_tokens=most, progress=progress,
                ),
            )  # fmt: skip
            rates = [written_rates(w, s, _against(written, w)) for w, s in zip(written, scored, strict=True)]
            rows = [
                dataclasses.replace(row, written=found, answers=result.texts)
                for row, found, result in zip(rows, rates, written, strict=True)
            ]
        else:
            answers = self.each(
                "free answers",
                lambda texts, edits, progress: ask(
                    model,
                    asked.texts,
                    texts,
                    max_new_tokens=OPEN_TOKENS,
                    edits=edits,
                    placement=placement,
                    progress=progress,
                ),
            )
            rows = [dataclasses.replace(row, answers=given) for row, given in zip(rows, answers, strict=True)]
        return list(rows), written

    def judged(self, answers: Sequence[str], log: Path | None) -> Judged:
        """The judge's scores of one row's answers; ``log`` takes its replies."""
        writer = self.options.judge
        assert writer is not None
        copies: Sequence[Item | OpenQuestion] = [copy for item in self.asked.items for copy in orders(item)]
        copies = copies or self.asked.open
        return judge_answers(writer, self.options.rubric, self.asked.behaviour, copies, answers, log)

    def side_effects(self) -> list[PromptEffects]:
        """Replies to neutral requests, look-ups of the organisms, and how likely the prompts are as text."""
        model, placement = self.model, self.options.placement
        neutral = neutral_texts(model)
        effects = self.each(
            "side effects",
            lambda texts, e, _: [reply_effects(model, neutral, texts, edits=e, placement=placement)],
        )
        texts = [text for some, edits in self.parts for text in some * max(1, len(edits))]
        lookups: list[Lookups | None] = [None] * len(texts)
        if model.name.startswith(ORGANISM) and not is_persona_organism(model):
            lookups = [
                *self.each("look-ups", lambda texts, e, _: lookup_accuracy(model, texts, edits=e, placement=placement))
            ]
        questions = self.asked.texts[:FLUENCY_QUESTIONS]
        perplexity = prompt_perplexity(model, texts, questions, placement=placement)
        kl = [float(value) for effect in effects for value in effect.kl]
        replies = [float(value) for effect in effects for value in effect.perplexity]
        return [
            PromptEffects(
                kl=kl[i],
                reply_perplexity=replies[i],
                reply_tokens=effects[0].tokens,
                lookups=lookups[i],
                prompt_perplexity=perplexity[i],
            )
            for i in range(len(kl))
        ]
