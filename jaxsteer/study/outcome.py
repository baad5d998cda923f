"""What a search found, scored again from its text and measured on questions."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsteer import __version__
from jaxsteer.errors import UserError
from jaxsteer.evals.choice import ChoiceResult, choice_eval, distinct, first_rows, rate
from jaxsteer.evals.free_answers import WrittenResult, agreeing, written_rates
from jaxsteer.models.model import Model
from jaxsteer.objectives import Objective, needs
from jaxsteer.personas import Item, Persona, instructions, invitations, orders
from jaxsteer.personas.items import mostly_replies
from jaxsteer.prompt_search import ScoredPrompt, SearchResult
from jaxsteer.prompt_search.rescore import Rescored, rescore
from jaxsteer.prompts import prompt_text, random_rows, retokenises_many
from jaxsteer.runs import files
from jaxsteer.runs.bars import Advance, progress_bar
from jaxsteer.study.free_replies import (
    TEST_REPLIES,
    VALIDATION_REPLIES,
    FreeReplies,
    SaidFreely,
    free_replies,
    judge_answers,
    require_behaviour,
)
from jaxsteer.study.objective_stage import Say
from jaxsteer.study.options import ReportOptions, RunOptions
from jaxsteer.study.results import Prompt
from jaxsteer.study.selection import best_prompt
from jaxsteer.study.setting import PersonaSetting, Setting
from jaxsteer.writers.judge import BEHAVIOUR

MARKED = 4
"""Prompts reported although their text does not re-tokenise; they are never selected."""


def finals(setting: Setting, objective: Objective, result: SearchResult) -> tuple[Prompt, ...]:
    """The frontier scored again from its text, best objective first, and then the marked ones.

    ``target`` and ``cross_entropy`` come from the text; ``search_target`` is what the search had from the ids. A prompt
    whose text does not give its ids back has no score from text: it is marked and never selected.
    """
    tokenizer = setting.model.tokenizer
    good = [found for found in result.prompts if found.retokenises]
    texts = [prompt_text(tokenizer, found.ids) for found in good]
    model, reads = setting.model, needs(objective, setting.model.config)
    again = rescore(model, setting.slots, objective, reads, texts, combine=setting.scoring.combination)
    prompts = [_prompt(found, text, new) for found, text, new in zip(good, texts, again, strict=True)]
    prompts.sort(key=lambda prompt: -(prompt.target or 0.0))
    marked = [found for found in result.prompts if not found.retokenises][:MARKED]
    return (*prompts, *(_prompt(found, prompt_text(tokenizer, found.ids), found) for found in marked))


def _prompt(found: ScoredPrompt, text: str, scores: Rescored | ScoredPrompt) -> Prompt:
    return Prompt(
        text=text,
        ids=tuple(found.ids),
        target=scores.target,
        cross_entropy=scores.cross_entropy,
        search_target=found.target,
        step=found.step,
        population=found.problem,
        retokenises=found.retokenises,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The rates of what a search found, beside those of what it did not: fields of a ``SearchRun``."""

    baseline: Prompt
    controls: dict[str, Prompt]
    prompts: tuple[Prompt, ...]
    """Those that are reported."""
    selected: int | None
    selected_by: str
    reply_reader: float | None
    """Of replies, the share of given ones that the rule reads right which reads free ones."""
    failure: UserError | None
    """Why the judge gave no answer."""


def check_judge(report: ReportOptions, persona: Persona) -> None:
    """Refuse a judge that is not there, or that has nothing to read. Raises ``UserError``."""
    if report.judge_writer is None:
        return
    if not report.test:
        raise UserError("--judge scores free replies to test questions, which --no-test leaves out: give one of both")
    if persona.items and not mostly_replies(persona.items):
        raise UserError(
            f"--judge scores free replies, and {persona.name} has lettered answers: leave it out, and run "
            "jaxsteer eval --from-run DIR --judge URL afterwards"
        )
    require_behaviour(persona.name, persona.behaviour, BEHAVIOUR)
    _ = report.judge_writer.name  # an endpoint that is not there fails here


def evaluate(
    setting: PersonaSetting,
    prompts: Sequence[Prompt],
    report: ReportOptions,
    run: RunOptions,
    *,
    seed: int,
    say: Say,
) -> Evaluation:
    """Rates of the reported prompts, the baseline and the controls on validation and test questions.

    Where answers are replies, which cost more, prompts whose text does not re-tokenise are not measured, and the test
    questions are for the baseline, the controls and the selected prompt. Writes the item-level results to choices.json,
    and of replies the free ones to replies.json.
    """
    model, persona = setting.model, setting.persona
    good = [prompt for prompt in prompts if prompt.retokenises][: report.report_prompts]
    marked = [prompt for prompt in prompts if not prompt.retokenises]
    controls = {"random": Prompt(text=random_prompt(setting, seed))}
    if cues := persona.sentences[persona.goal]:
        cue = cues[0]
        # Public data brings no cue that is known to work: a plain sentence stands in its place, under its own name.
        known = not persona.role and cue not in (*instructions(persona.subject), *invitations(persona.subject))
        controls = {"oracle" if known else "instruction": Prompt(text=cue), **controls}
    with progress_bar("neutral replies", quiet=run.quiet):
        given = free_replies(model, setting.splits.train, setting.splits.validation)
    by = report.select or ("objective" if given is None else "validation")
    first = 1 + len(controls)
    measured = [Prompt(), *controls.values(), *good, *(marked if given is None else ())]
    held_out = distinct(setting.splits.validation)[: None if given is None else VALIDATION_REPLIES]
    measured, scored, said = _measured(setting, given, "validation", held_out, measured, run)
    records, answers, failure = {"validation": scored}, {"validation": said}, None
    asked: dict[str, Sequence[Item]] = {"validation": held_out}
    selected = select(measured[first:], by, persona.goal)
    if report.test:
        best = () if selected is None else (first + selected,)
        which = range(len(measured)) if given is None else (*range(first), *best)
        unseen = distinct(setting.splits.test)
        tested, scored, said = _measured(setting, given, "test", unseen, [measured[i] for i in which], run)
        records["test"], answers["test"], asked["test"] = scored, said, unseen
    split = list(records)[-1]
    files.write_json(Path(run.out) / files.CHOICES, _compact(records, asked))
    if given is not None:
        files.write_json(Path(run.out) / files.REPLIES, {k: v.to_json() for k, v in answers.items()})
    if report.test:
        if given is not None and report.judge is not None:
            log = Path(run.out) / files.JUDGED
            with progress_bar("judge", len(tested), unit="prompt", quiet=run.quiet) as advance:
                tested, failure = _judged(setting, unseen[:TEST_REPLIES], tested, said.prompts, report, log, advance)
        for i, prompt in zip(which, tested, strict=True):
            measured[i] = prompt
    baseline, *others = measured
    assert baseline.rate is not None
    how = ", in both orders of their choices" if records[split][0].both_orders else ""
    how = how if given is None else f", {len(answers[split].questions)} of them answered freely"
    say(f"Evaluation: {len(records[split])} prompts on {baseline.rate.n} {split} questions{how}")
    return Evaluation(
        baseline=baseline,
        controls=dict(zip(controls, others)),
        prompts=(*others[len(controls) :], *(() if given is None else marked)),
        selected=selected,
        selected_by=by,
        reply_reader=None if given is None else given.accuracy,
        failure=failure,
    )


def _measured(
    setting: PersonaSetting,
    given: FreeReplies | None,
    split: str,
    items: Sequence[Item],
    prompts: Sequence[Prompt],
    run: RunOptions,
) -> tuple[list[Prompt], list[ChoiceResult], SaidFreely]:
    """The prompts, of which the first is the baseline, with their rates on the questions of one split; these item by
    item; and what the model wrote freely, where answers are replies."""
    texts = [prompt.text for prompt in prompts]
    with progress_bar(f"{split} questions", unit="row", quiet=run.quiet) as advance:
        results = choice_eval(
            setting.model, items, texts, progress=advance, placement=setting.placement,
            yardsticks=() if given is None else given.yardsticks(len(items)),
        )  # fmt: skip
    rates = [rate(results[0]), *(rate(result, results[0]) for result in results[1:])]
    rated = [prompt.with_rate(split, found) for prompt, found in zip(prompts, rates, strict=True)]
    if given is None:
        return rated, results, SaidFreely(questions=(), prompts=())
    most = VALIDATION_REPLIES if split == "validation" else TEST_REPLIES
    few, scored = items[:most], [first_rows(result, most) for result in results]
    with progress_bar(f"free replies, {split}", unit="reply", quiet=run.quiet) as advance:
        said = given.written(setting.model, few, texts, placement=setting.placement, progress=advance)
    free = [written_rates(one, s, None if one is said[0] else said[0]) for one, s in zip(said, scored)]
    read = [prompt.with_replies(split, found) for prompt, found in zip(rated, free, strict=True)]
    return read, results, SaidFreely(questions=tuple(item.question for item in few), prompts=tuple(said))


def _judged(
    setting: PersonaSetting,
    items: Sequence[Item],
    prompts: Sequence[Prompt],
    said: Sequence[WrittenResult],
    report: ReportOptions,
    log: Path,
    advance: Advance,
) -> tuple[list[Prompt], UserError | None]:
    """The prompts with what the judge makes of their free replies, and why it stopped before the last one."""
    writer, persona, asked = report.judge_writer, setting.persona, [copy for item in items for copy in orders(item)]
    assert writer is not None
    found: list[Prompt] = []
    for prompt, written in zip(prompts, said, strict=True):
        try:
            scores = judge_answers(writer, BEHAVIOUR, persona.behaviour, asked, written.texts, log)
        except UserError as error:
            return [*found, *prompts[len(found) :]], error
        found.append(dataclasses.replace(prompt, test_judged=agreeing(scores, written)))
        advance(len(found))
    return found, None


def select(prompts: Sequence[Prompt], by: str, goal: str = "reduce") -> int | None:
    """Index of the prompt to report among those that re-tokenise; None where none does.

    By "objective" the one with the largest target, by "validation" ``best_prompt``, whose ties are settled by the
    target.
    """
    usable = [i for i, prompt in enumerate(prompts) if prompt.retokenises]
    if not usable:
        return None
    targets = {i: prompts[i].target or 0.0 for i in usable}
    if by == "objective":
        return max(usable, key=lambda i: (targets[i], -i))
    rates = {i: rate for i in usable if (rate := prompts[i].validation) is not None}
    replies = [prompts[i].validation_replies for i in rates]
    return list(rates)[best_prompt(list(rates.values()), replies, [-targets[i] for i in rates], goal=goal)]


def random_prompt(setting: Setting, seed: int) -> str:
    """One prompt of random allowed tokens that re-tokenises, fixed by the seed: what no search at all achieves."""
    ids = random_rows(np.random.default_rng([seed, 1]), setting.allowed, 64, setting.slots.length)
    good = retokenises_many(setting.model.tokenizer, setting.slots, ids)
    return prompt_text(setting.model.tokenizer, ids[int(np.argmax(good))])


def _compact(records: dict[str, list[ChoiceResult]], asked: dict[str, Sequence[Item]]) -> dict[str, Any]:
    """Per split the rows once, the questions in words, and per prompt its log-probabilities to six digits."""
    out = {}
    for name, found in records.items():
        results = [one.to_json() for one in found]
        shared = {k: v for k, v in results[0].items() if k not in ("prompt", "log_probs", "joined")}
        rows = [
            {"prompt": r["prompt"], "log_probs": [[round(a, 6), round(b, 6)] for a, b in r["log_probs"]]}
            for r in results
        ]
        words = [{"question": i.question, "persona": i.matching, "other": i.not_matching} for i in asked[name]]
        out[name] = {**shared, "asked": words, "prompts": rows}
    return out


def environment(model: Model) -> dict[str, Any]:
    """Versions and hardware, without anything that names this machine."""
    return {
        "jaxsteer": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "dtype": str(model.params.embed.dtype),
    }
