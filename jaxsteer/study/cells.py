"""Tables of methods: what a cell is, and what the cells of one model and persona share.

A cell is one model, one persona and one method, which is a baseline that needs no search or a search with several
seeds. It is one file, computed once (``cell_runs``).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsteer import organisms
from jaxsteer.checkpoints.loading import load
from jaxsteer.evals.choice import ChoiceResult, choice_eval
from jaxsteer.evals.fluency import prompt_perplexity
from jaxsteer.evals.free_answers import WrittenResult
from jaxsteer.models.model import Model
from jaxsteer.personas import Persona, instructions, load_persona, split
from jaxsteer.personas.written_persona import ready
from jaxsteer.prompts import Placement
from jaxsteer.sae import SAE, load_sae
from jaxsteer.study.baselines import FLUENCY_ITEMS, Bench, run_baselines
from jaxsteer.study.named_objectives import named_objective
from jaxsteer.study.objective_stage import ChosenObjective, choose_objective
from jaxsteer.study.options import ContextOptions, ObjectiveOptions, SearchOptions
from jaxsteer.study.probe import PROMPTS
from jaxsteer.study.setting import PersonaSetting, prepare
from jaxsteer.study.table_row import TableRow
from jaxsteer.writers.endpoint import Endpoint

PROMPT_LENGTH = 8
NEUTRAL = 0.24
"""Share of neutral sentences among the sentences that the organisms' corpus puts into the slot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A row of a table: how a prompt is found."""

    name: str
    about: str
    options: dict[str, Any] | None = None
    """Of its search, where they differ from the table's; ``None`` for a baseline that needs no search."""
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
class Table:
    """What all cells have in common; it decides their numbers."""

    out: Path
    seeds: tuple[int, ...]
    options: dict[str, Any]
    """Of every search."""
    questions: int | None = None
    """At most this many validation and test questions."""
    candidates: int = 12
    """Prompts per seed that are compared on validation questions."""
    endpoint: str | None = None
    """URL of a language model that writes prompts, for ProTeGi."""

    def settings(self) -> dict[str, Any]:
        """What all cells of a directory must have in common."""
        return {
            "seeds": list(self.seeds),
            "questions": self.questions,
            "candidates_compared": self.candidates,
            **self.options,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Cells of one model and persona, for one process."""

    table: Table
    model: str
    sae: str | None
    persona: str
    methods: tuple[Method, ...]

    def path(self, method: Method) -> Path:
        """The file of a cell."""
        return self.table.out / "cells" / slug(self.model) / slug(self.persona) / f"{method.slug}.json"

    def run(self, method: Method) -> Path:
        """The directory of its search."""
        return self.table.out / "runs" / slug(self.model) / slug(self.persona) / method.slug

    def options(self, method: Method) -> SearchOptions:
        """The options of a method's search."""
        # The probe of the published tables, whatever a search measures by default.
        changed = {"slot": "suffix", "probe": PROMPTS, **self.table.options, **(method.options or {})}
        return SearchOptions.of(
            out=self.run(method),
            model=self.model,
            persona=self.persona,
            sae=self.sae if changed.get("method") == "saega" else None,
            report_prompts=4,
            quiet=True,
            resume=True,
            **changed,
        ).resolved()


def slug(text: str) -> str:
    """``text`` as one part of a path."""
    return re.sub(r"[^a-z0-9.]+", "-", Path(text).name.lower() if "/" in text else text.lower()).strip("-")


@functools.lru_cache(maxsize=1)
def load_once(name: str) -> Model:
    """The model; another one takes its place in memory."""
    return load(name)


class Shared:
    """What the cells of a block share, made when first needed: model, questions, directions, zero-shot answers."""

    def __init__(self, block: Block) -> None:
        """Load the model."""
        self.block, self.table = block, block.table
        self.model: Model = load_once(block.model)
        self.base = block.options(Method(name="base", about="", options={}))
        replies = self.table.out / "replies" / slug(block.model) / slug(block.persona)
        given, goal = load_persona(block.persona), self.base.contexts.goal
        self.persona: Persona = ready(self.model, given, goal, replies, silent, quiet=True)
        self.bench = Bench(
            model=self.model,
            persona=self.persona,
            splits=split(self.persona, seed=self.base.contexts.split_seed),
            placement=self.base.contexts.placement,
            length=self.table.options.get("prompt_length", PROMPT_LENGTH),
            tokens=self.base.prompt.tokens or "words",
            questions=self.table.questions,
            writer=Endpoint(url=self.table.endpoint) if self.table.endpoint else None,
        )
        self._chosen: dict[tuple[ContextOptions, ObjectiveOptions], ChosenObjective] = {}
        self._zero: dict[str, ChoiceResult] = {}

    @property
    def of_organisms(self) -> bool:
        """Whether the persona is one that the organisms were trained to have, rather than a dataset of that name."""
        return self.block.persona in organisms.BEHAVIOURS

    @functools.cached_property
    def sae(self) -> SAE | None:
        """The block's SAE."""
        return load_sae(self.block.sae, mesh=self.model.mesh) if self.block.sae else None

    @functools.cached_property
    def ordinary(self) -> float | None:
        """Perplexity of ordinary sentences in the slot: of the organisms, what their corpus puts there, cue sentences
        and neutral ones in its own proportion; of other models, plain instructions."""

        def mean_nats(texts: Sequence[str]) -> float:
            return float(np.mean(np.log([x for x in self.perplexity(texts, self.bench.placement) if x is not None])))

        if not self.of_organisms:
            return float(np.exp(mean_nats(instructions(self.persona.subject))))
        cues = mean_nats((*self.persona.counter_cues, *self.persona.pro_cues))
        neutral = mean_nats(organisms.neutral_sentences())
        return float(np.exp((1 - NEUTRAL) * cues + NEUTRAL * neutral))

    def perplexity(self, texts: Sequence[str], placement: Placement) -> list[float | None]:
        """Of prompts in their slot, after test questions."""
        asked = [item.asked for item in self.bench.test[:FLUENCY_ITEMS]]
        return prompt_perplexity(self.model, texts, asked, placement=placement)

    def zero(self, part: str) -> ChoiceResult:
        """The answers without a prompt to the "validation" or "test" questions, the same in every slot."""
        if part not in self._zero:
            items = getattr(self.bench, part)
            (self._zero[part],) = choice_eval(self.model, items, [""], placement=self.bench.placement)
        return self._zero[part]

    @functools.cached_property
    def zero_written(self) -> list[WrittenResult]:
        """The free replies without a prompt to test questions, where answers are replies."""
        return self.bench.written("test", [""])

    def setting(self, options: SearchOptions) -> PersonaSetting:
        """The contexts of a method's search."""
        named = named_objective(
            options.objective.objective, options.objective.target, relative=options.objective.relative
        )
        sae = self.sae if options.objective.sae else None
        return prepare(options.contexts, options.scoring, options.prompt, self.model, self.persona, named, sae)

    def chosen(self, options: SearchOptions) -> ChosenObjective:
        """Direction or signature with the site and sign that the probe chooses, made once for all that share it.

        The probe's prompts are like those of the table's other searches, whatever a method varies.
        """
        key = options.contexts, options.objective
        if key not in self._chosen:
            shared = dataclasses.replace(self.base, contexts=options.contexts, objective=options.objective)
            seed = self.base.algorithm.seed
            self._chosen[key] = choose_objective(self.setting(shared), options.objective, seed=seed, say=silent)
        return self._chosen[key]

    @functools.cached_property
    def baselines(self) -> dict[str, TableRow]:
        """All baselines of the block that have no cell yet, measured together."""
        names = [m.name for m in self.block.methods if m.options is None and not self.block.path(m).is_file()]
        return {row.method: row for row in run_baselines(self.bench, names)}


def silent(_: str) -> None:
    """Say nothing."""
