"""Options of a search: one dataclass for every stage, with the fields that this stage reads.

A flag, a key of config.json or of a configuration file, and a keyword argument of ``jaxsteer.search`` are the name of a
field alone: ``from_flat`` and ``SearchOptions.flat`` lead from there to the stages and back.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jaxsteer.errors import UserError, refuse_unknown
from jaxsteer.prompt_search import Combination
from jaxsteer.prompts import Placement
from jaxsteer.ranges import Positive, Seed, Weight, check_ranges
from jaxsteer.runs.files import RunDir
from jaxsteer.study.algorithm import SIZES, AlgorithmOptions, flag
from jaxsteer.study.initial_prompts import listed_texts, texts_of
from jaxsteer.study.option_values import convert_value
from jaxsteer.writers.endpoint import Endpoint

PRESETS: dict[str, dict[str, Any]] = {
    "default": {"prompt_length": 8, "steps": 60, "contexts": 4, "raw_units": False, "tokens": "words"},
    "paper": {"prompt_length": 8, "steps": 300, "contexts": 16, "raw_units": True, "tokens": "all"},
}
"""``default``: minutes on a small model. ``paper``: the hyperparameters of RESGA as published (arXiv 2601.02896).
Those of the algorithm are in ``algorithm.SIZES``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model that is searched against, and how it lies on the devices."""

    model: str = "organism:llama"
    """organism:NAME (llama, qwen2, gemma3, persona), a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights; by default float32 on CPU and the checkpoint's own elsewhere."""
    mesh_model: int = 1
    """Devices that the weights are split over; the others, if there are several, divide the problems. Part of the
    result: sums over devices round otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """The conversations in which prompts are scored and measured."""

    persona: str = "sycophancy"
    """Built-in name (sycophancy, hallucination, myopic, refusal; in words: characters/pirate, ghost, jester or
    accountant), a public dataset (`jaxsteer data list`), or path of a .jsonl, .json, .csv or .parquet dataset."""
    conversations: Path | None = None
    """Search in conversations of your own instead of a persona's questions: a .json or .jsonl file with a text or a
    list of messages each, in which {prompt} marks the slot (docs/prompt-search.md). With --objective, --target, or
    --direction FILE and --site."""
    style: Literal["chat", "plain"] = "chat"
    """Chat template of the model, or plain text."""
    slot: Literal["suffix", "prefix", "system", "system-suffix"] = "suffix"
    """Where the prompt stands: after the question, before it, as system message, or behind the system message that the
    questions have."""
    read_position: Literal["published", "matched", "decision"] = "decision"
    """The token at which direction and objective are read: published (end of answer, end of prompt), matched (end of
    answer for both), decision (where the answer is decided; needs cue sentences)."""
    split_seed: Seed = 0
    """Seed of the division into train, validation and test questions."""
    goal: Literal["reduce", "elicit"] | None = None
    """What is wanted: less of the persona or more (default: what the persona says; reduce for datasets). Characters are
    reduced while their role stands in the system message."""

    @property
    def placement(self) -> Placement:
        """How questions are asked, and where the prompt stands."""
        return Placement(style=self.style, slot=self.slot)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What a search raises."""

    method: Literal["resga", "saega"] = "resga"
    """resga: ascend along the direction away from the persona. saega: raise and lower the latents of a sparse
    autoencoder that tell the persona apart; needs --sae (both: arXiv 2601.02896)."""
    direction: str | None = None
    """Of resga: a direction file (direction.safetensors of a run) instead of the persona's own difference of means, or
    random:N, a random direction of the same length, as a control (with --site)."""
    site: str = "auto"
    """Where direction and objective are read, e.g. blocks.2.hook_resid_post. auto: the earliest site at which the
    probe's rank correlation reaches 0.8, else the best one. saega always reads the SAE's own site."""
    sae: str | None = None
    """Of saega: folder, file or hub_id:subfolder of a sparse autoencoder, in any known layout, or organism:NAME."""
    latents: int | None = None
    """Of saega: how many latents make the signature (default: 1 % of the dictionary)."""
    objective: str | None = None
    """Raised instead of the direction's projection: file.py:function (a function from reads to one score per row; the
    file is run as Python code), target, target-mean, answer, answer-diff, "logit-diff:yes|no",
    neuron:blocks.2.mlp.hook_post[17] or attention:blocks.1.attn.hook_pattern[3]:prompt (docs/objectives.md)."""
    target: str | None = None
    """Text of an answer whose log-probability is the objective, or is read by the objective of a file."""
    relative: bool = False
    """With --objective answer and replies in words: raise what the wanted reply has per token beyond a neutral reply in
    its place, so that a prompt which makes everything unlikely wins nothing. Every context counts twice."""
    objective_norm: Literal["raw", "cosine", "zscore"] = "raw"
    """Of resga: the projection in stream units, as a cosine, or of the stream standardised over its width."""
    probe: int | Literal["auto", "off"] = "auto"
    """Random prompts on which the objective is compared with behaviour before the search. auto: 31, 63, 127 or 240, as
    few as tell whether the site serves. off: none; site and sign are then as given, with --site, --objective or
    --method saega."""
    surrogate: Literal["none", "preact"] = "none"
    """Of saega: preact lets gradients reach latents that are off, through their pre-activations. Scores are exact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How a candidate is scored."""

    contexts: int | None = None
    """Train questions that every candidate is scored on, each in both choice orders (default 4, paper 16)."""
    combine: Literal["mean", "worst", "soft-min"] = "mean"
    """What a search raises of the objective's values in its contexts: their mean, the worst of them, or their soft
    minimum, which lies between the two."""
    combine_temperature: Positive = 1.0
    """Of soft-min: contexts that differ by much less count alike, by much more the worst counts; in the objective's
    units."""
    batch: int | None = None
    """Candidates scored at once (default: about 512 rows; fewer where memory is short). Part of the result: other
    products round otherwise."""

    @property
    def combination(self) -> Combination:
        """How contexts are combined."""
        return Combination(self.combine, self.combine_temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What a prompt may be, and where a search begins."""

    prompt_length: int | str | None = None
    """Tokens of the prompt (default 8, or as many as what --init and --init-from begin with). 4:12 searches prompts of
    4 to 12 tokens, by inserting and deleting tokens too (epo and mutation)."""
    tokens: Literal["words", "ascii", "all"] | None = None
    """Tokens a prompt may use: whole words after a space (where none fits first, also without), printable
    ASCII, or every printable token (default words, paper all)."""
    allow: tuple[str, ...] = ()
    """Texts of the only tokens that a prompt may use, with or without a space before them, or files of one text per
    line. They take the place of --tokens."""
    ban: tuple[str, ...] = ()
    """Texts that no prompt may hold, in any case and however they are spelt in tokens."""
    init: str | None = None
    """A phrase to begin with, instead of random tokens: "Let's think critically". It sets the prompt's length.
    --fluency ultra_strict keeps close to it."""
    init_from: Path | None = None
    """Begin with the prompts of this earlier run's Pareto frontier."""

    @property
    def lengths(self) -> tuple[int, int] | None:
        """The fewest and the most tokens of a prompt, if they are known. Raises ``UserError`` for what is no range."""
        if self.prompt_length is None:
            return None
        least, colon, most = str(self.prompt_length).partition(":")
        try:
            found = int(least), int(most if colon else least)
        except ValueError:
            found = (0, 0)
        if not 1 <= found[0] <= found[1]:
            raise UserError(f"--prompt-length must be at least 1, or a range such as 4:12, got {self.prompt_length}")
        return found

    @property
    def varies(self) -> bool:
        """Whether prompts of several lengths are searched."""
        return self.lengths is not None and self.lengths[0] < self.lengths[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemOptions:
    """Many searches in one run."""

    vary: tuple[str, ...] = ()
    """Many searches at once, the product of values: persona=sycophancy,myopic site=layers.1,layers.2 seed=0:32.
    Any of persona, goal, method, direction, site, fluency, seed, restart; A:B counts from A to B - 1."""
    problems: Path | None = None
    """Many searches at once, one per line of a table with columns as in --vary (.csv or .jsonl)."""

    @property
    def several(self) -> bool:
        """Whether there are many searches rather than one."""
        return bool(self.vary) or self.problems is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Which prompts are measured, and which of them is reported first."""

    select: Literal["objective", "validation"] | None = None
    """What ranks the reported prompt first: the objective, or the rate on validation questions, where answers are
    replies that of free replies (default: validation where answers are replies, else the objective)."""
    report_prompts: int = 12
    """Prompts of the Pareto frontier to evaluate, best objective first."""
    test: bool = True
    """Measure on test questions as well. Leave it out while you try settings: test questions are for the end."""
    judge: str | None = None
    """Of a persona in words: also let the model behind this OpenAI-compatible address score the free replies to test
    questions, e.g. http://127.0.0.1:8000/v1."""
    judge_model: str | None = None
    """Name of the judge there (default: the first that it lists)."""

    @property
    def judge_writer(self) -> Endpoint | None:
        """Whoever judges. Raises ``UserError`` for what is no address."""
        return None if self.judge is None else Endpoint(url=self.judge, model=self.judge_model or "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the files go and how the work is done: nothing here decides the result."""

    out: RunDir
    """Directory of the run's files, or its URL in an object store: gs://BUCKET/run, s3://BUCKET/run (docs/pods.md).
    Must not hold another run's; a finished run of the same options is kept."""
    memory_gib: Positive | None = None
    """Memory that the search may use per device (default: nine tenths of an accelerator's, half of what is free on
    CPU)."""
    save_every: Weight = 60.0
    """Seconds between two checkpoints of the search."""
    resume: bool = False
    """Go on where an earlier search in this directory was cut off, if there is one."""
    quiet: bool = False
    """No progress bars."""


LEAST_PROBED = 8
"""Fewer random prompts tell nothing."""
RANDOM = "random:"
"""What ``--direction`` begins with for a random one."""
OF_A_PERSONA = ("persona", "style", "slot", "goal", "contexts", "select", "draft", "method", "probe", "judge")
"""Options that mean nothing for conversations of the user's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Options of ``jaxsteer search``, by the stage that reads them.

    Those that are ``None`` take the preset's value (``resolved``). ``SearchOptions.of(out=..., seed=1)`` takes them by
    their names alone.
    """

    model: ModelOptions = ModelOptions()
    contexts: ContextOptions = ContextOptions()
    objective: ObjectiveOptions = ObjectiveOptions()
    scoring: ScoringOptions = ScoringOptions()
    prompt: PromptOptions = PromptOptions()
    algorithm: AlgorithmOptions = AlgorithmOptions()
    problems: ProblemOptions = ProblemOptions()
    report: ReportOptions = ReportOptions()
    run: RunOptions

    @classmethod
    def of(cls, **values: Any) -> SearchOptions:
        """Options by name, whatever their stage. Raises ``UserError`` for unknown names and impossible values."""
        return from_flat(convert_values(values))

    def at(self, out: RunDir) -> SearchOptions:
        """The same, with its files elsewhere."""
        return dataclasses.replace(self, run=dataclasses.replace(self.run, out=out))

    def flat(self) -> dict[str, Any]:
        """All options by name."""
        return {name: getattr(getattr(self, stage), name) for name, (stage, _) in OPTIONS.items()}

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        return {name: value for name, value in self.flat().items() if value != OPTIONS[name][1].default}

    def resolved(self) -> SearchOptions:
        """These options with the preset's values filled in. Raises ``UserError`` for options that contradict others."""
        preset = PRESETS[self.algorithm.preset] | SIZES[self.algorithm.preset][self.algorithm.algorithm]
        own = {"prompt_length"} if self.prompt.init is not None or self.prompt.init_from is not None else set()
        own |= {"contexts"} if self.contexts.conversations is not None else set()  # all of them are contexts
        given = self.flat()
        filled = {name: value for name, value in preset.items() if given[name] is None and name not in own}
        options = from_flat(given | filled)
        _check(options)
        return options

    def record(self) -> dict[str, Any]:
        """What config.json keeps: everything that decides the result, and no place of this machine."""
        fields = {name: value for name, value in self.resolved().flat().items() if OPTIONS[name][0] != "run"}
        if self.prompt.init_from is not None:
            fields["init_from"] = texts_of(self.prompt.init_from)
        fields["allow"] = listed_texts(self.prompt.allow)
        conversations = self.contexts.conversations
        fields["conversations"] = conversations and conversations.name  # its content is in the data's hash
        return fields


STAGES: dict[str, type] = get_type_hints(SearchOptions)
"""Field of ``SearchOptions`` -> its dataclass."""
OPTIONS: dict[str, tuple[str, dataclasses.Field[Any]]] = {
    field.name: (stage, field) for stage, options in STAGES.items() for field in dataclasses.fields(options)
}
"""Name of an option -> the stage that reads it, and its field there."""
KINDS: dict[str, Any] = {name: kind for options in STAGES.values() for name, kind in get_type_hints(options).items()}
"""Name of an option -> its type."""


def _check(options: SearchOptions) -> None:
    """Raise ``UserError`` for values that make no search, and for options that contradict each other."""
    check_ranges(options)
    flat, algorithm, objective, prompt = options.flat(), options.algorithm, options.objective, options.prompt
    if prompt.varies and (algorithm.algorithm not in ("epo", "mutation") or (algorithm.replace or 1) > 1):
        raise UserError(
            f"--prompt-length {prompt.prompt_length} inserts and deletes single tokens, which --algorithm epo and "
            "mutation do (without --replace): give one length, or one of these"
        )
    algorithm.make_search()
    several, report = options.problems.several, options.report
    if report.judge_writer is None and report.judge_model is not None:
        raise UserError("--judge-model names a model of --judge URL: give both, or neither")
    if "" in prompt.ban:
        raise UserError("--ban names an empty text, which every prompt holds: give the texts that none may hold")
    direction = objective.direction or ""
    if direction.startswith(RANDOM) and not re.fullmatch(r"\d{1,18}", direction.removeprefix(RANDOM)):
        raise UserError(f"--direction random:N takes a whole number N, got {direction!r}")
    saega, named = objective.method == "saega", bool(objective.objective or objective.target)
    if objective.direction is not None and saega:
        raise UserError("--direction is an option of --method resga")
    if saega and (named or objective.site != "auto"):
        raise UserError("--method saega brings its own objective and site: leave out --objective, --target, --site")
    if objective.objective_norm != "raw" and (named or saega):
        raise UserError("--objective-norm is an option of --method resga without --objective and --target")
    for name, usual in (("surrogate", "none"), ("latents", None)):
        if flat[name] != usual and not saega:
            raise UserError(f"{flag(name)} is an option of --method saega")
    probe = objective.probe
    if probe == "off" and not (saega or named or several or objective.site != "auto"):
        raise UserError("--probe off leaves nobody to choose the site: give it with --site, or let --probe auto choose")
    if isinstance(probe, int) and probe < LEAST_PROBED:
        raise UserError(f"--probe must be auto, off, or at least {LEAST_PROBED} prompts, got {probe}")
    combine, temperature = options.scoring.combine, options.scoring.combine_temperature
    if objective.relative and combine != "mean":
        raise UserError("--relative is a difference of means over contexts: leave out --combine")
    if not temperature > 0 or (combine != "soft-min" and temperature != 1):
        raise UserError(
            f"--combine-temperature must be above 0 and belongs to --combine soft-min, got {temperature} with "
            f"--combine {combine}"
        )
    own = options.contexts.conversations is not None
    if several and (algorithm.draft is not None or own):
        name = "--draft serves" if algorithm.draft is not None else "--conversations serve"
        raise UserError(f"{name} one search: leave out --vary and --problems")
    if not several and saega != (objective.sae is not None):
        raise UserError("--method saega and --sae PATH belong together: give both or neither")
    if own and (other := [name for name in OF_A_PERSONA if name in options.changed()]):
        raise UserError(f"{flag(other[0])} is an option of a persona's questions: leave it out, or --conversations")
    if own and algorithm.algorithm == "soft":
        raise UserError("--algorithm soft measures its embeddings on a persona's questions: leave out --conversations")


def from_flat(values: Mapping[str, Any]) -> SearchOptions:
    """The options of these names; the others have their defaults."""
    stages: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
    for name, value in values.items():
        stages[OPTIONS[name][0]][name] = value
    return SearchOptions(**{stage: STAGES[stage](**given) for stage, given in stages.items()})


def convert_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` by name as the types of their options. Raises ``UserError`` for unknown names, with the nearest known
    one, and for values that an option cannot have."""
    refuse_unknown(values, OPTIONS, "option")
    return {name: convert_value(name, KINDS[name], value) for name, value in values.items()}
