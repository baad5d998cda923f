"""One cell of a table: search with all seeds, choose on validation questions, report on test questions.

All seeds of a cell are one compiled program. Of every seed, prompts spread over the frontier compete on validation
questions; test questions only report.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsteer import organisms
from jaxsteer.evals.choice import ChoiceResult, choice_eval, rate
from jaxsteer.objectives import Projection
from jaxsteer.personas import random_direction
from jaxsteer.prompt_search import ScoredPrompt
from jaxsteer.prompt_search.algorithms.relaxed import table_unit
from jaxsteer.prompts import Placement, prompt_text
from jaxsteer.prompts.soft import SoftPrompt, with_soft
from jaxsteer.study import files
from jaxsteer.study.baselines import summarise
from jaxsteer.study.cells import Method, Shared, silent
from jaxsteer.study.objective_stage import ChosenObjective
from jaxsteer.study.options import SearchOptions
from jaxsteer.study.run_folder import opened
from jaxsteer.study.selection import lowest_rate
from jaxsteer.study.setting import PersonaSetting
from jaxsteer.study.stages import Ascent, Population, Searched, conclude, search

TOLERANCE = 0.02
"""Validation rates that differ by less are equal, and the likelier text is taken."""


def compute_row(shared: Shared, method: Method) -> dict[str, Any]:
    """One cell: what its file holds."""
    started = time.perf_counter()
    if method.options is None:
        found = {key: value for key, value in shared.baselines[method.name].items() if key != "name"}
    else:
        found = _search_row(shared, method, shared.block.options(method))
    head = {
        "model": shared.block.model,
        "persona": shared.persona.name,
        "method": method.name,
        "value": method.value,
        "kind": "baseline" if method.options is None else "search",
        "about": method.about,
        "seconds": found.get("seconds", time.perf_counter() - started),
    }
    for part in (found, *found.get("each", ()), found.get("selected") or {}):
        x = part.get("perplexity")
        part["perplexity_ratio"] = x / shared.ordinary if x and shared.ordinary else None
    prompt = found.get("prompt")
    more = {"words": _trigger_share(shared, prompt), "ordinary": shared.ordinary, "readability": flesch(prompt)}
    return files.plain({**head, **found, **more})


def _search_row(shared: Shared, method: Method, options: SearchOptions) -> dict[str, Any]:
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
            row["run"] = str(out.relative_to(shared.table.out))
        else:
            shutil.rmtree(out, ignore_errors=True)
    return row | {
        "candidates": result.candidates,
        "tried": result.candidates // len(shared.table.seeds),
        "search_s": result.search_s,
        "compile_s": result.compile_s,
        "site": chosen.row.site if chosen is not None else None,
        "read_position": setting.read_position,
        "probe_correlation": chosen.row.correlation if chosen is not None and not method.random else None,
    }


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


def _compared(shared: Shared, placement: Placement, found: Sequence[Searched]) -> dict[str, Any]:
    """Of every seed, the prompt that validation questions choose and the one that the objective ranks first."""
    model, bench = shared.model, shared.bench
    every = [(one.result, population) for one in found for population in range(len(one.result.archive.f))]
    many = len(every) // len(shared.table.seeds)
    seeds: list[list[dict[str, Any]]] = []
    for result, begin in every[::many]:
        entries = [e for e in result.frontier(range(begin, begin + many)) if e.retokenises]
        shown = [_entry(e, prompt_text(model.tokenizer, e.ids)) for e in _spread(entries, shared.table.candidates)]
        seeds.append(shown or [{"prompt": "", "target": None, "cross_entropy": 0.0}])
    texts = list(dict.fromkeys(entry["prompt"] for entries in seeds for entry in entries))
    results = choice_eval(model, bench.validation, texts, placement=placement)
    rates = {r.prompt: rate(r, shared.zero("validation"), draws=1) for r in results}
    for entry in (entry for entries in seeds for entry in entries):
        validation = rates[entry["prompt"]]
        entry |= {"validation_rate": validation.rate, "collapsed": validation.letter_collapse}

    def best_of(entries: Sequence[dict[str, Any]]) -> int:
        ties = [entry["cross_entropy"] for entry in entries]
        return lowest_rate([rates[entry["prompt"]] for entry in entries], ties, tolerance=TOLERANCE)

    best, first = [entries[best_of(entries)] for entries in seeds], [entries[0] for entries in seeds]
    texts = list(dict.fromkeys(entry["prompt"] for entry in (*best, *first)))
    tested = dict(zip(texts, choice_eval(model, bench.test, texts, placement=placement), strict=True))
    perplexity = dict(zip(texts, shared.perplexity(texts, placement), strict=True))
    row, at_first = (
        _summary(shared, [tested[e["prompt"]] for e in some], [perplexity[e["prompt"]] for e in some], some)
        for some in (best, first)
    )
    for mine, other in zip(row["each"], at_first["each"], strict=True):
        mine["first"] = {k: other[k] for k in ("prompt", "rate", "ci95", "a_rate", "perplexity", "target")}
    selected = row["each"][best_of(best)]
    return row | {
        "first_rate": at_first["rate"],
        "first_ci95": at_first["ci95"],
        "selected": {k: selected[k] for k in ("seed", "prompt", "rate", "ci95", "a_rate", "perplexity")},
        "prompt": selected["prompt"],
    }


def _soft(shared: Shared, placement: Placement, found: Sequence[Searched]) -> dict[str, Any]:
    """The rates of every seed's best soft prompt."""
    model, unit, outcome = shared.model, np.asarray(table_unit(shared.model.params)), []
    for best in (best for one in found for best in one.result.kept["best"]):
        embeddings = np.asarray(best[0] * unit, np.float32)
        soft = SoftPrompt(embeddings=embeddings, model=model.name, fingerprint=model.fingerprint, metadata={})
        steered, text = with_soft(model, soft)
        outcome += choice_eval(steered, shared.bench.test, [text], placement=placement)
    row = _summary(shared, outcome, [None] * len(outcome), [{} for _ in outcome])
    for each in row["each"]:
        each["prompt"] = None
    return row | {"prompt": None, "steered": True}


def _summary(
    shared: Shared,
    results: Sequence[ChoiceResult],
    perplexity: Sequence[float | None],
    entries: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """A row over seeds, with what the search knew of each seed's prompt."""
    row = summarise(results, shared.zero("test"), perplexity)
    each = row.get("each") or [dict(row)]  # a single seed has no list of its own
    row["each"] = [{"seed": seed, **e, **rest} for seed, e, rest in zip(shared.table.seeds, each, entries, strict=True)]
    row.setdefault("range", [row["rate"]] * 2)
    return row


def _entry(found: ScoredPrompt, text: str) -> dict[str, Any]:
    return {"prompt": text, "target": found.target, "cross_entropy": found.cross_entropy, "step": found.step}


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
