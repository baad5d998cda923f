"""Options of one run, and their presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxsteer.errors import UserError
from jaxsteer.prompt_search import Combination
from jaxsteer.study.algorithm import AlgorithmOptions
from jaxsteer.study.initial_prompts import listed_texts, texts_of

PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "prompt_length": 8,
        "steps": 60,
        "contexts": 4,
        "raw_units": False,
        "tokens": "words",
    },
    "paper": {
        "prompt_length": 8,
        "steps": 300,
        "contexts": 16,
        "raw_units": True,
        "tokens": "all",
    },
}
"""``default``: minutes on a small model. ``paper``: the hyperparameters of RESGA as published (arXiv 2601.02896).
Those of the algorithm are in ``algorithm.SIZES``."""


NOT_RECORDED = ("out", "quiet", "memory_gib", "save_every", "resume")
"""Options that decide nothing about the result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions(AlgorithmOptions):
    """One search: a model, a persona, where to look, and how hard. ``None`` takes the preset's value."""

    out: Path
    """Directory of the run's files. Must not hold another run's; a finished run of the same options is kept."""
    model: str = "organism:llama"
    """organism:NAME (llama, qwen2 or gemma3), a converted checkpoint, a Hugging Face directory, or a hub id."""
    persona: str = "sycophancy"
    """Built-in name (sycophancy, hallucination, myopic) or path of a .jsonl, .json or .csv dataset."""
    method: Literal["resga", "saega"] = "resga"
    """resga: ascend along the direction away from the persona. saega: raise and lower the latents of a sparse
    autoencoder that tell the persona apart; needs --sae (both: arXiv 2601.02896)."""
    sae: str | None = None
    """Of saega: folder, file or hub_id:subfolder of a sparse autoencoder, in any known layout, or organism:NAME."""
    latents: int | None = None
    """Of saega: how many latents make the signature (default: 1 % of the dictionary)."""
    site: str = "auto"
    """Where direction and objective are read, e.g. blocks.2.hook_resid_post. auto: the earliest site at which the
    probe's rank correlation reaches 0.8, else the best one. saega always reads the SAE's own site."""
    read_position: Literal["published", "matched", "decision"] = "decision"
    """The token at which direction and objective are read: published (end of answer, end of prompt), matched (end of
    answer for both), decision (where the answer is decided; needs cue sentences)."""
    conversations: Path | None = None
    """Search in conversations of your own instead of a persona's questions: a .json or .jsonl file with a text or a
    list of messages each, in which {prompt} marks the slot (docs/search.md). With --objective, --target, or --direction
    FILE and --site."""
    style: Literal["chat", "plain"] = "chat"
    """Chat template of the model, or plain text."""
    slot: Literal["suffix", "prefix", "system"] = "suffix"
    """Where the prompt stands: after the question, before it, or as system message."""
    fluency: Literal["ultra_strict", "strict", "medium", "loose"] = "medium"
    """Weight of cross-entropy against the objective: 100 to 1000 (for --init), 2 to 12, 0.5 to 4, or 0.05 to 0.5 nats
    per unit."""
    preset: Literal["default", "paper"] = "default"
    """Values of all options below that are not given. paper: as published, in raw units, many more candidates."""
    prompt_length: int | str | None = None
    """Tokens of the prompt (default 8, or as many as what --init and --init-from begin with). 4:12 searches prompts of
    4 to 12 tokens, by inserting and deleting tokens too (epo and mutation)."""
    steps: int | None = None
    """Steps of the search (default 60, paper 300; pez, gbda and soft, whose steps are small: 500, 200, 200)."""
    contexts: int | None = None
    """Train questions that every candidate is scored on, each in both choice orders (default 4, paper 16)."""
    raw_units: bool | None = None
    """Objective in the stream's own units, not in standard deviations over random prompts (default no, paper yes)."""
    tokens: Literal["words", "ascii", "all"] | None = None
    """Tokens a prompt may use: whole words after a space, printable ASCII, or every printable token
    (default words, paper all)."""
    restarts: int = 1
    """Independent populations, searched side by side."""
    seed: int = 0
    """Seed of the search."""
    split_seed: int = 0
    """Seed of the division into train, validation and test questions."""
    objective: str | None = None
    """Raised instead of the direction's projection: file.py:function (a function from reads to one score per row; the
    file is run as Python code), target, target-mean, answer, answer-diff, "logit-diff:yes|no",
    neuron:blocks.2.mlp.hook_post[17] or attention:blocks.1.attn.hook_pattern[3]:prompt (docs/objectives.md)."""
    target: str | None = None
    """Text of an answer whose log-probability is the objective, or is read by the objective of a file."""
    objective_norm: Literal["raw", "cosine", "zscore"] = "raw"
    """Of resga: the projection in stream units, as a cosine, or of the stream standardised over its width."""
    surrogate: Literal["none", "preact"] = "none"
    """Of saega: preact lets gradients reach latents that are off, through their pre-activations. Scores are exact."""
    combine: Literal["mean", "worst", "soft-min"] = "mean"
    """What a search raises of the objective's values in its contexts: their mean, the worst of them, or their soft
    minimum, which lies between the two."""
    combine_temperature: float = 1.0
    """Of soft-min: contexts that differ by much less count alike, by much more the worst counts; in the objective's
    units."""
    select: Literal["objective", "validation"] = "objective"
    """What ranks the reported prompt first: the objective, or the lowest persona rate on validation questions."""
    report_prompts: int = 12
    """Prompts of the Pareto frontier to evaluate, best objective first."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights; by default float32 on CPU and the checkpoint's own elsewhere."""
    batch: int | None = None
    """Candidates scored at once (default: about 512 rows; fewer where memory is short). Part of the result: other
    products round otherwise."""
    direction: str | None = None
    """Of resga: a direction file (direction.safetensors of a run) instead of the persona's own difference of means, or
    random:N, a random direction of the same length, as a control (with --site)."""
    vary: tuple[str, ...] = ()
    """Many searches at once, the product of values: persona=sycophancy,myopic site=layers.1,layers.2 seed=0:32.
    Any of persona, method, direction, site, fluency, seed, restart; A:B counts from A to B - 1."""
    problems: Path | None = None
    """Many searches at once, one per line of a table with columns as in --vary (.csv or .jsonl)."""
    mesh_model: int = 1
    """Devices that the weights are split over; the others, if there are several, divide the problems. Part of the
    result: sums over devices round otherwise."""
    memory_gib: float | None = None
    """Memory that the search may use per device (default: nine tenths of an accelerator's, half of what is free on
    CPU)."""
    save_every: float = 60.0
    """Seconds between two checkpoints of the search."""
    resume: bool = False
    """Go on where an earlier search in this directory was cut off, if there is one."""
    quiet: bool = False
    """No progress bars."""

    @property
    def combination(self) -> Combination:
        """How contexts are combined."""
        return Combination(self.combine, self.combine_temperature)

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

    def resolved(self) -> SearchOptions:
        """These options with the preset's values filled in. Raises ``UserError`` for numbers that make no search."""
        preset = PRESETS[self.preset] | self.sizes(self.preset)
        if self.init is not None or self.init_from is not None:
            preset = {name: value for name, value in preset.items() if name != "prompt_length"}
        if self.conversations is not None:  # all of them are contexts
            preset = {name: value for name, value in preset.items() if name != "contexts"}
        filled = dataclasses.replace(self, **{k: v for k, v in preset.items() if getattr(self, k) is None})
        if (filled.lengths or (1, 1))[0] < (filled.lengths or (1, 1))[1]:
            if filled.algorithm not in ("epo", "mutation") or (filled.replace or 1) > 1:
                raise UserError(
                    f"--prompt-length {filled.prompt_length} inserts and deletes single tokens, which --algorithm epo "
                    "and mutation do (without --replace): give one length, or one of these"
                )
        for name in ("population", "children", "steps", "top_k", "restart_every", "contexts"):
            if getattr(filled, name) is not None:
                _positive(name, getattr(filled, name))
        for name in ("restarts", "report_prompts"):
            _positive(name, getattr(filled, name))
        filled.make_search()
        for name in ("batch", "latents"):
            if getattr(filled, name) is not None:
                _positive(name, getattr(filled, name))
        if filled.direction is not None and filled.method != "resga":
            raise UserError("--direction is an option of --method resga")
        if not filled.combine_temperature > 0 or (filled.combine != "soft-min" and filled.combine_temperature != 1):
            raise UserError(
                f"--combine-temperature must be above 0 and belongs to --combine soft-min, got "
                f"{filled.combine_temperature} with --combine {filled.combine}"
            )
        if filled.memory_gib is not None and not filled.memory_gib > 0:
            raise UserError(f"--memory-gib must be above 0, got {filled.memory_gib}")
        several = bool(filled.vary) or filled.problems is not None
        if several and (filled.draft is not None or filled.conversations is not None):
            name = "--draft serves" if filled.draft is not None else "--conversations serve"
            raise UserError(f"{name} one search: leave out --vary and --problems")
        if not several and (filled.method == "saega") != (filled.sae is not None):
            raise UserError("--method saega and --sae PATH belong together: give both or neither")
        if filled.method == "saega" and (self.objective or self.target or filled.site != "auto"):
            raise UserError("--method saega brings its own objective and site: leave out --objective, --target, --site")
        named = self.objective is not None or self.target is not None
        if filled.objective_norm != "raw" and (named or filled.method != "resga"):
            raise UserError("--objective-norm is an option of --method resga without --objective and --target")
        if filled.surrogate != "none" and filled.method != "saega":
            raise UserError("--surrogate is an option of --method saega")
        if filled.latents is not None and filled.method != "saega":
            raise UserError("--latents is an option of --method saega")
        return filled

    def record(self) -> dict[str, Any]:
        """What config.json keeps: everything that decides the result, and no place of this machine."""
        fields = dataclasses.asdict(self.resolved())
        if self.init_from is not None:
            fields["init_from"] = texts_of(self.init_from)
        fields["allow"] = listed_texts(self.allow)
        fields["conversations"] = self.conversations and self.conversations.name  # its content is in the data's hash
        return {name: value for name, value in fields.items() if name not in NOT_RECORDED}


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
