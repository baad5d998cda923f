"""One cell of a table: search with all seeds, choose on validation questions, report on test questions.

All seeds of a cell are one compiled program. Of every seed, prompts spread over the frontier compete on validation
questions; test questions only report.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsteer import organisms
from jaxsteer.evals.choice import ChoiceResult, choice_eval, rate
from jaxsteer.evals.free_answers import WrittenResult, written_rates
from jaxsteer.objectives import Projection
from jaxsteer.personas import random_direction
from jaxsteer.prompt_search import ScoredPrompt
from jaxsteer.prompt_search.algorithms.relaxed import table_unit
from jaxsteer.prompts import Placement, prompt_text
from jaxsteer.prompts.soft import SoftPrompt, with_soft
from jaxsteer.runs.folder import opened
from jaxsteer.study.baselines import summarise
from jaxsteer.study.cells import Method, Shared, silent
from jaxsteer.study.free_replies import Written
from jaxsteer.study.objective_stage import ChosenObjective
from jaxsteer.study.options import SearchOptions
from jaxsteer.study.results import Prompt
from jaxsteer.study.selection import best_rate, by_replies
from jaxsteer.study.setting import PersonaSetting
from jaxsteer.study.stages import Ascent, Population, Searched, conclude, search
from jaxsteer.study.table_row import TableRow, shown

TOLERANCE = 0.02
"""Validation rates that differ by less are equal, and the likelier text is taken."""
SELECTED_BY = (
    f"the lowest rate on validation questions (of those within {100 * TOLERANCE:g} points the likeliest text; a prompt "
    "under which one letter wins comes last)"
)
BY_REPLIES = (
    "the rate of free replies to validation questions that is best for the goal (of those within "
    f"{100 * TOLERANCE:g} points the likeliest text)"
)
"""How a prompt of a persona in words is chosen."""


def compute_row(shared: Shared, method: Method) -> TableRow:
    """One cell: what its file holds."""
    started = time.perf_counter()
    if method.options is None:
        row = shared.baselines[method.name]
    else:
        row = _search_row(shared, method, shared.block.options(method))

    def with_ratio(part: Any) -> Any:
        x = part.perplexity
        return dataclasses.replace(part, perplexity_ratio=x / shared.ordinary if x and shared.ordinary else None)

    return dataclasses.replace(
        with_ratio(row),
        model=shared.block.model,
        persona=shared.persona.name,
        method=method.name,
        value=method.value,
        kind="baseline" if method.options is None else "search",
        about=method.about,
        seconds=time.perf_counter() - started if row.seconds is None else row.seconds,
        each=tuple(with_ratio(one) for one in row.each),
        selected=row.selected and with_ratio(row.selected),
        words=_trigger_share(shared, row.prompt),
        ordinary=shared.ordinary,
        readability=flesch(row.prompt),
    )


def _search_row(shared: Shared, method: Method, options: SearchOptions) -> TableRow:
    """Search with all seeds, choose on validation questions, and measure on test questions."""
    setting = shared.setting(options)
    chosen = shared.chosen(options) if setting.named is None else None
    out, soft = shared.block.run(method), options.algorithm.algorithm == "soft"
    with opened(out, {"data_hash": shared.persona.data_hash, **options.record()}, silent) as folder:
        folder.begin()
        ascents = _ascents(shared, method, setting, chosen, options.algorithm.fluency)
        found = search(setting, ascents, options.algorithm, options.run, say=silent)
        result = found[0].result
        if result.interrupted:
            raise KeyboardInterrupt
        row = _soft(shared, setting.placement, found) if soft else _compared(shared, setting.placement, found)
        if method.keep and chosen is not None:
            conclude(folder, options, setting, chosen, found[0], {}, silent)
            row = dataclasses.replace(row, run=str(out.relative_to(shared.table.out)))
        else:
            shutil.rmtree(out, ignore_errors=True)
    return dataclasses.replace(
        row,
        candidates=result.candidates,
        tried=result.candidates // len(shared.table.seeds),
        search_s=result.search_s,
        compile_s=result.compile_s,
        site=chosen.row.site if chosen is not None else None,
        read_position=setting.read_position,
        probe_correlation=chosen.row.correlation if chosen is not None and not method.random else None,
    )


def _ascents(
    shared: Shared, method: Method, setting: PersonaSetting, chosen: ChosenObjective | None, fluency: str
) -> list[Ascent]:
    """The method's objective with the populations of all seeds, or a random one for each seed."""
    by_seed = {
        seed: tuple(Population(fluency=fluency, seed=seed, restart=i) for i in range(method.populations))
        for seed in shared.table.seeds
    }
    if method.random:
        assert chosen is not None
        return [Ascent(objective=_random(chosen, seed), populations=mine) for seed, mine in by_seed.items()]
    raw = chosen.objective if chosen is not None else setting.named_in(setting.slots)[0]
    return [Ascent(objective=raw, populations=tuple(one for mine in by_seed.values() for one in mine))]


def _random(chosen: ChosenObjective, seed: int) -> Projection:
    """The objective along a random direction of the same norm at the same site."""
    assert chosen.direction is not None
    site = chosen.row.site
    return Projection(delta=jnp.asarray(random_direction(chosen.direction, seed).delta[site]), site=site)


def _compared(shared: Shared, placement: Placement, found: Sequence[Searched]) -> TableRow:
    """Of every seed, the prompt that validation questions choose and the one that the objective ranks first."""
    model, bench = shared.model, shared.bench
    every = [(one.result, population) for one in found for population in range(len(one.result.archive.f))]
    many = len(every) // len(shared.table.seeds)
    seeds: list[list[Prompt]] = []
    for result, begin in every[::many]:
        entries = [e for e in result.frontier(range(begin, begin + many)) if e.retokenises]
        prompts = [_prompt(e, prompt_text(model.tokenizer, e.ids)) for e in _spread(entries, shared.table.candidates)]
        seeds.append(prompts or [Prompt(cross_entropy=0.0)])
    texts = list(dict.fromkeys(prompt.text for prompts in seeds for prompt in prompts))
    results = choice_eval(model, bench.validation, texts, placement=placement)
    free = [written_rates(one) for one in bench.written("validation", texts, placement=placement)]
    compared = by_replies([rate(r, shared.zero("validation"), draws=1) for r in results], free, shared.persona.goal)
    rates = dict(zip(texts, compared, strict=True))

    def best_of(prompts: Sequence[Prompt]) -> int:
        ties = [prompt.cross_entropy for prompt in prompts]
        found = [rates[prompt.text] for prompt in prompts]
        return best_rate(found, ties, goal=shared.persona.goal, tolerance=TOLERANCE)

    best, first = [prompts[best_of(prompts)] for prompts in seeds], [prompts[0] for prompts in seeds]
    texts = list(dict.fromkeys(prompt.text for prompt in (*best, *first)))
    tested = dict(zip(texts, choice_eval(model, bench.test, texts, placement=placement), strict=True))
    said = dict(zip(texts, bench.written("test", texts, placement=placement)))
    perplexity = dict(zip(texts, shared.perplexity(texts, placement), strict=True))
    row, at_first = (
        _summary(
            shared,
            [tested[p.text] for p in some],
            [perplexity[p.text] for p in some],
            [said[p.text] for p in some if said],
        )
        for some in (best, first)
    )
    each = tuple(
        dataclasses.replace(
            one,
            target=prompt.target,
            cross_entropy=prompt.cross_entropy,
            step=prompt.step,
            validation_rate=rates[prompt.text].rate,
            first=dataclasses.replace(shown(other), seed=None, target=ranked.target),
        )
        for one, other, prompt, ranked in zip(row.each, at_first.each, best, first, strict=True)
    )
    selected = each[best_of(best)]
    return dataclasses.replace(
        row,
        each=each,
        prompt=selected.prompt,
        selected=dataclasses.replace(shown(selected), target=None),
        first_rate=at_first.rate,
    )


def _soft(shared: Shared, placement: Placement, found: Sequence[Searched]) -> TableRow:
    """The rates of every seed's best soft prompt."""
    model, unit = shared.model, np.asarray(table_unit(shared.model.params))
    outcome: list[ChoiceResult] = []
    said: list[WrittenResult] = []
    for best in (best for one in found for best in one.result.kept["best"]):
        embeddings = np.asarray(best[0] * unit, np.float32)
        soft = SoftPrompt(embeddings=embeddings, model=model.name, fingerprint=model.fingerprint, metadata={})
        steered, text = with_soft(model, soft)
        outcome += choice_eval(steered, shared.bench.test, [text], placement=placement)
        said += shared.bench.written("test", [text], model=steered, placement=placement)
    row = _summary(shared, outcome, [None] * len(outcome), said)
    each = tuple(dataclasses.replace(one, prompt=None) for one in row.each)
    return dataclasses.replace(row, each=each, prompt=None, steered=True)


def _summary(
    shared: Shared,
    results: Sequence[ChoiceResult],
    perplexity: Sequence[float | None],
    said: Sequence[WrittenResult],
) -> TableRow:
    """A row over seeds."""
    written = Written(said, shared.zero_written[0], shared.persona.goal) if said else None
    row = summarise(results, shared.zero("test"), perplexity, written)
    each = tuple(
        dataclasses.replace(one, seed=seed) for seed, one in zip(shared.table.seeds, row.members, strict=True)
    )  # a single seed has no list of its own
    return dataclasses.replace(row, each=each, range=row.range or (row.rate, row.rate))


def _prompt(found: ScoredPrompt, text: str) -> Prompt:
    return Prompt(text=text, target=found.target, cross_entropy=found.cross_entropy, step=found.step)


def _spread(entries: Sequence[ScoredPrompt], most: int) -> list[ScoredPrompt]:
    """At most so many of a frontier, evenly spread from the best objective to the likeliest text."""
    return [entries[i] for i in sorted({round(i) for i in np.linspace(0, len(entries) - 1, most)})] if entries else []


def _trigger_share(shared: Shared, text: str | None) -> float | None:
    """Share of a prompt's words that the organisms' generator knows as triggers against the persona."""
    found = re.findall(r"[a-z]+", (text or "").lower())
    if not shared.of_organisms or not found:
        return None
    weights = organisms.cue_words(shared.persona.name)
    return sum(weights.get(word, 0) < 0 for word in found) / len(found)


def flesch(text: str | None) -> float | None:
    """Reading ease of Flesch (1948): about 100 for plain words in short sentences, below 0 for what nobody can read."""
    words = re.findall(r"[A-Za-z]+", text or "")
    if not words:
        return None
    syllables = sum(max(1, len(re.findall(r"[aeiouy]+", word.lower().removesuffix("e")))) for word in words)
    sentences = max(1, len(re.findall(r"[.!?]+", text or "")))
    return 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
