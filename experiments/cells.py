"""The machinery of a study: cells of a table, each kept in a file of its own, computed by as many processes as wanted.

A cell is one model, one persona and one method, which is a baseline that needs no search or a search with several
seeds. All seeds of a cell are one compiled program. Of every seed the frontier's prompts compete on validation
questions (``chosen``); test questions only report.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsteer import organisms
from jaxsteer.checkpoints.loading import load
from jaxsteer.evals.choice import ChoiceResult, choice_eval, rate
from jaxsteer.evals.fluency import prompt_perplexity
from jaxsteer.models.model import Model
from jaxsteer.objectives import Projection
from jaxsteer.personas import instructions, load_persona, random_direction, split
from jaxsteer.prompt_search.algorithms.relaxed import table_unit
from jaxsteer.prompts import Placement, prompt_text
from jaxsteer.prompts.soft import SoftPrompt, with_soft
from jaxsteer.sae import SAE, load_sae
from jaxsteer.study import SearchOptions, custom_objective, files
from jaxsteer.study.baselines import FLUENCY_ITEMS, Bench, run_baselines, summarise
from jaxsteer.study.objective_stage import ChosenObjective, choose_objective
from jaxsteer.study.options import ContextOptions, ObjectiveOptions
from jaxsteer.study.run_folder import opened
from jaxsteer.study.setting import PersonaSetting, prepare
from jaxsteer.study.stages import Ascent, Population, Searched, conclude, search
from jaxsteer.writers.endpoint import Endpoint

PROMPT_LENGTH = 8
TOLERANCE = 0.02
"""Validation rates that differ by less are equal, and the likelier text is taken."""
NEUTRAL = 0.24
"""Share of neutral sentences among the sentences that the organisms' corpus puts into the slot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A row of a table: how a prompt is found."""

    name: str
    about: str
    search: dict[str, Any] | None = None
    """Options that differ from those of the study's searches; ``None`` for a baseline that needs no search."""
    value: Any = None
    """Of an ablation: what is varied, as its row shows it."""
    random: bool = False
    """Along random directions of the same norm at the same site, one per seed."""
    populations: int = 1
    """Independent populations per seed."""
    keep: bool = False
    """Keep the run's files for ``jaxsteer report``."""

    @property
    def slug(self) -> str:
        """The name as part of a path."""
        return slug(self.name if self.value is None else f"{self.name} {self.value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What all cells have in common; it decides their numbers."""

    out: Path
    seeds: tuple[int, ...]
    search: dict[str, Any]
    """Options of every search."""
    questions: int | None = None
    """At most this many validation and test questions."""
    candidates: int = 12
    """Prompts per seed that are compared on validation questions."""
    endpoint: str | None = None
    """URL of a language model that writes prompts, for ProTeGi."""

    def settings(self) -> dict[str, Any]:
        """What a directory may hold one of only."""
        return {
            "seeds": list(self.seeds),
            "questions": self.questions,
            "candidates_compared": self.candidates,
            **self.search,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Cells of one model and persona, for one process."""

    study: Study
    model: str
    sae: str | None
    persona: str
    methods: tuple[Method, ...]

    def path(self, method: Method) -> Path:
        """The file of a cell."""
        return self.study.out / "cells" / slug(self.model) / slug(self.persona) / f"{method.slug}.json"

    def run(self, method: Method) -> Path:
        """The directory of its search."""
        return self.study.out / "runs" / slug(self.model) / slug(self.persona) / method.slug

    def done(self) -> bool:
        """Whether all cells exist."""
        return all(self.path(method).is_file() for method in self.methods)


def slug(text: str) -> str:
    """``text`` as one part of a path."""
    return re.sub(r"[^a-z0-9.]+", "-", Path(text).name.lower() if "/" in text else text.lower()).strip("-")


# --- the cells of one model and persona ---------------------------------------------------------------------------


class Lab:
    """One model and one persona with what their cells share: contexts, directions, and the zero-shot answers."""

    def __init__(self, work: Work) -> None:
        """Load the model; everything else is made when first needed."""
        self.work, self.study = work, work.study
        self.model = load_once(work.model)
        self.persona = load_persona(work.persona)
        self.base = base = self.options(Method(name="base", about="", search={}))
        self.bench = Bench(
            model=self.model,
            persona=self.persona,
            splits=split(self.persona, seed=base.contexts.split_seed),
            placement=base.contexts.placement,
            length=self.study.search.get("prompt_length", PROMPT_LENGTH),
            tokens=base.prompt.tokens or "words",
            questions=self.study.questions,
            endpoint=Endpoint(url=self.study.endpoint) if self.study.endpoint else None,
        )
        self._chosen: dict[tuple[ContextOptions, ObjectiveOptions], ChosenObjective] = {}
        self._zero: dict[str, ChoiceResult] = {}

    def options(self, method: Method) -> SearchOptions:
        """The options of a method's search."""
        changed = {"slot": "suffix", **self.study.search, **(method.search or {})}
        return SearchOptions.of(
            out=self.work.run(method),
            model=self.work.model,
            persona=self.work.persona,
            sae=self.work.sae if changed.get("method") == "saega" else None,
            report_prompts=4,
            quiet=True,
            resume=True,
            **changed,
        ).resolved()

    @functools.cached_property
    def sae(self) -> SAE | None:
        """The SAE of the work, read once."""
        return load_sae(self.work.sae, mesh=self.model.mesh) if self.work.sae else None

    @functools.cached_property
    def ordinary(self) -> float | None:
        """Perplexity of ordinary sentences in the slot: of the organisms, what their corpus puts there, cue sentences
        and neutral ones in its own proportion; of other models, plain instructions."""

        def mean_nats(texts: Sequence[str]) -> float:
            return float(np.mean(np.log([x for x in self.perplexity(texts, self.bench.placement) if x is not None])))

        if self.persona.name not in organisms.BEHAVIOURS:
            return float(np.exp(mean_nats(instructions(self.persona.behaviour))))
        cues = mean_nats((*self.persona.counter_cues, *self.persona.pro_cues))
        neutral = mean_nats(organisms.neutral_sentences())
        return float(np.exp((1 - NEUTRAL) * cues + NEUTRAL * neutral))

    def perplexity(self, texts: Sequence[str], placement: Placement) -> list[float | None]:
        """Of prompts in their slot, after test questions."""
        asked = [item.question for item in self.bench.test[:FLUENCY_ITEMS]]
        return prompt_perplexity(self.model, texts, asked, placement=placement)

    def zero(self, part: str) -> ChoiceResult:
        """The answers without a prompt, the same in every slot."""
        if part not in self._zero:
            self._zero[part] = choice_eval(self.model, getattr(self.bench, part), [""], placement=self.bench.placement)[
                0
            ]
        return self._zero[part]

    def chosen(self, options: SearchOptions) -> ChosenObjective:
        """Direction or signature with the site and sign that the probe chooses, made once for all that share it.

        The probe's prompts are like those of the study's other searches, whatever a method varies.
        """
        key = options.contexts, options.objective
        if key not in self._chosen:
            base, sae = self.base, self.sae if options.objective.sae else None
            setting = prepare(options.contexts, base.scoring, base.prompt, self.model, self.persona, sae=sae)
            self._chosen[key] = choose_objective(setting, options.objective, seed=base.algorithm.seed, say=silent)
        return self._chosen[key]

    def row(self, method: Method) -> dict[str, Any]:
        """Compute one cell."""
        started = time.perf_counter()
        found = self.baseline(method) if method.search is None else self.search(method)
        head = {
            "model": self.work.model,
            "persona": self.persona.name,
            "method": method.name,
            "value": method.value,
            "kind": "baseline" if method.search is None else "search",
            "about": method.about,
            "seconds": found.get("seconds", time.perf_counter() - started),
        }
        for part in (found, *found.get("each", ()), found.get("selected") or {}):
            x = part.get("perplexity")
            part["perplexity_ratio"] = x / self.ordinary if x and self.ordinary else None
        return files.plain(
            {
                **head,
                **found,
                "words": self.words(found.get("prompt")),
                "ordinary": self.ordinary,
                "readability": flesch(found.get("prompt")),
            }
        )

    def words(self, text: str | None) -> float | None:
        """Share of a prompt's words that the generator knows as triggers against the persona."""
        found = re.findall(r"[a-z]+", (text or "").lower())
        if self.persona.name not in organisms.BEHAVIOURS or not found:
            return None
        weights = organisms.cue_words(self.persona.name)
        return sum(weights.get(word, 0) < 0 for word in found) / len(found)

    @functools.cached_property
    def baselines(self) -> dict[str, dict[str, Any]]:
        """All baselines of the work that have no cell yet, measured together."""
        names = [m.name for m in self.work.methods if m.search is None and not self.work.path(m).is_file()]
        return {row["name"]: row for row in run_baselines(self.bench, names)}

    def baseline(self, method: Method) -> dict[str, Any]:
        """A baseline that needs no search."""
        return {key: value for key, value in self.baselines[method.name].items() if key != "name"}

    def search(self, method: Method) -> dict[str, Any]:
        """Search with all seeds, choose on validation questions, and measure on test questions."""
        options = self.options(method)
        custom = custom_objective(options.objective.objective, options.objective.target)
        chosen = self.chosen(options) if custom is None else None
        sae = self.sae if options.objective.sae else None
        setting = prepare(options.contexts, options.scoring, options.prompt, self.model, self.persona, custom, sae)
        out = self.work.run(method)
        with opened(out, {"data_hash": self.persona.data_hash, **options.record()}, silent) as folder:
            folder.begin()
            ascents = self.ascents(method, setting, chosen, options.algorithm.fluency)
            found = search(setting, ascents, options.algorithm, options.run, say=silent)
            result = found[0].result
            if result.interrupted:
                raise KeyboardInterrupt
            row = self.soft(setting, found) if options.algorithm.algorithm == "soft" else self.judged(setting, found)
            if method.keep and chosen is not None:
                conclude(folder, options, setting, chosen, found[0], {}, silent)
                row["run"] = str(out.relative_to(self.study.out))
            else:
                shutil.rmtree(out, ignore_errors=True)
        return row | {
            "candidates": result.candidates,
            "tried": result.candidates // len(self.study.seeds),
            "search_s": result.search_s,
            "compile_s": result.compile_s,
            "site": chosen.chosen.site if chosen is not None else None,
            "read_position": setting.read_position,
            "probe_correlation": chosen.chosen.correlation if chosen is not None and not method.random else None,
        }

    def ascents(
        self, method: Method, setting: PersonaSetting, chosen: ChosenObjective | None, fluency: str
    ) -> list[Ascent]:
        """The method's objective with the populations of all seeds, or a random one for each seed."""
        by_seed = {
            seed: tuple(Population(fluency=fluency, seed=seed, restart=i) for i in range(method.populations))
            for seed in self.study.seeds
        }
        if method.random:
            assert chosen is not None
            return [Ascent(objective=_turned(chosen, seed), populations=mine) for seed, mine in by_seed.items()]
        raw = chosen.objective if chosen is not None else setting.placed(setting.slots)[0]
        return [Ascent(objective=raw, populations=tuple(one for mine in by_seed.values() for one in mine))]

    def judged(self, setting: PersonaSetting, found: Sequence[Searched]) -> dict[str, Any]:
        """Of every seed, the prompt that validation questions choose and the one that the objective ranks first."""
        placement = setting.placement
        every = [(one.result, population) for one in found for population in range(len(one.result.archive.f))]
        many = len(every) // len(self.study.seeds)
        shown: list[list[dict[str, Any]]] = []
        for result, begin in every[::many]:
            entries = [e for e in result.frontier(range(begin, begin + many)) if e.retokenises]
            shown.append(
                [
                    {"prompt": prompt_text(self.model.tokenizer, e.ids), **_scores(e)}
                    for e in _spread(entries, self.study.candidates)
                ]
                or [{"prompt": "", "target": None, "cross_entropy": 0.0}]
            )
        texts = list(dict.fromkeys(entry["prompt"] for entries in shown for entry in entries))
        results = choice_eval(self.model, self.bench.validation, texts, placement=placement)
        rates = {r.prompt: rate(r, self.zero("validation"), draws=1).to_json() for r in results}
        for entry in (entry for entries in shown for entry in entries):
            of_text = rates[entry["prompt"]]
            entry |= {"validation_rate": of_text["rate"], "collapsed": of_text["letter_collapse"]}
        best = [entries[chosen(entries)] for entries in shown]
        first = [entries[0] for entries in shown]
        texts = list(dict.fromkeys(entry["prompt"] for entry in (*best, *first)))
        tested = dict(zip(texts, choice_eval(self.model, self.bench.test, texts, placement=placement), strict=True))
        perplexity = dict(zip(texts, self.perplexity(texts, placement), strict=True))
        row = self.summary([tested[e["prompt"]] for e in best], [perplexity[e["prompt"]] for e in best], best)
        at_first = self.summary([tested[e["prompt"]] for e in first], [perplexity[e["prompt"]] for e in first], first)
        for mine, other in zip(row["each"], at_first["each"], strict=True):
            mine["first"] = {k: other[k] for k in ("prompt", "rate", "ci95", "a_rate", "perplexity", "target")}
        selected = row["each"][chosen(best)]
        return row | {
            "first_rate": at_first["rate"],
            "first_ci95": at_first["ci95"],
            "selected": {k: selected[k] for k in ("seed", "prompt", "rate", "ci95", "a_rate", "perplexity")},
            "prompt": selected["prompt"],
        }

    def soft(self, setting: PersonaSetting, found: Sequence[Searched]) -> dict[str, Any]:
        """The rates of every seed's best soft prompt."""
        unit = np.asarray(table_unit(self.model.params))
        outcome = []
        for best in (best for one in found for best in one.result.kept["best"]):
            soft = SoftPrompt(
                embeddings=np.asarray(best[0] * unit, np.float32),
                model=self.model.name,
                fingerprint=self.model.fingerprint,
                metadata={},
            )
            steered, text = with_soft(self.model, soft)
            outcome += choice_eval(steered, self.bench.test, [text], placement=setting.placement)
        row = self.summary(outcome, [None] * len(outcome), [{} for _ in outcome])
        for each in row["each"]:
            each["prompt"] = None
        return row | {"prompt": None, "steered": True}

    def summary(
        self, results: Sequence[ChoiceResult], perplexity: Sequence[float | None], entries: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """A row over seeds, with what the search knew of each seed's prompt."""
        row = summarise(results, self.zero("test"), perplexity)
        # A single seed has no list of its own.
        each = row.get("each") or [dict(row)]
        row["each"] = [
            {"seed": seed, **e, **rest} for seed, e, rest in zip(self.study.seeds, each, entries, strict=True)
        ]
        row.setdefault("range", [row["rate"]] * 2)
        return row


def flesch(text: str | None) -> float | None:
    """Reading ease of Flesch (1948): about 100 for plain words in short sentences, below 0 for what nobody can read."""
    words = re.findall(r"[A-Za-z]+", text or "")
    if not words:
        return None
    syllables = sum(max(1, len(re.findall(r"[aeiouy]+", word.lower().removesuffix("e")))) for word in words)
    sentences = max(1, len(re.findall(r"[.!?]+", text or "")))
    return 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)


def chosen(entries: Sequence[dict[str, Any]]) -> int:
    """The index of the prompt to report: of those whose validation rate is lowest but for ``TOLERANCE``, the likeliest
    text. Prompts under which one letter wins whatever is asked come last."""
    sound = [i for i, entry in enumerate(entries) if not entry["collapsed"]] or range(len(entries))
    lowest = min(entries[i]["validation_rate"] for i in sound)
    near = [i for i in sound if entries[i]["validation_rate"] <= lowest + TOLERANCE]
    return min(near, key=lambda i: (entries[i]["cross_entropy"], i))


def _spread(entries: Sequence[Any], most: int) -> list[Any]:
    """At most so many of a frontier, evenly spread from the best objective to the likeliest text."""
    return [entries[i] for i in sorted({round(i) for i in np.linspace(0, len(entries) - 1, most)})] if entries else []


def _scores(entry: Any) -> dict[str, Any]:
    return {"target": entry.target, "cross_entropy": entry.cross_entropy, "step": entry.step}


def silent(_: str) -> None:
    """Say nothing."""


def _turned(chosen: ChosenObjective, seed: int) -> Projection:
    """The objective along a random direction of the same norm at the same site."""
    assert chosen.direction is not None
    site = chosen.chosen.site
    return Projection(delta=jnp.asarray(random_direction(chosen.direction, seed).delta[site]), site=site)


@functools.lru_cache(maxsize=1)
def load_once(name: str) -> Model:
    """The model; another one takes its place in memory."""
    return load(name)
