"""``jaxsteer eval``: what prompts and steering do to a persona's questions, and to everything else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from jaxsteer.cli.steering import Controlled
from jaxsteer.errors import UserError
from jaxsteer.ranges import Seed
from jaxsteer.runs.files import document

if TYPE_CHECKING:
    from jaxsteer.runs.result import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Controlled):
    """Measure prompts, steering or both on a persona's questions: rate with interval, controls and flips."""

    prompts: Annotated[tuple[str, ...], arg(aliases=["-p"])] = ()
    """Prompt texts; the zero-shot baseline is always measured too."""
    soft: Path | None = None
    """Also measure this soft prompt (soft.safetensors of a run)."""
    from_run: Path | None = None
    """Measure the prompts of this run instead, with its model, persona, style and slot."""
    model: str = "organism:llama"
    """organism:llama, a converted checkpoint, a Hugging Face directory, a .gguf file, or a hub id."""
    transfer: tuple[str, ...] = ()
    """Further models on which the same prompt texts are measured."""
    persona: str = "sycophancy"
    """Built-in name, a public dataset (NAME or NAME:PATH, see `jaxsteer data list`) or the path of a dataset."""
    split: Literal["train", "validation", "test", "all"] = "test"
    """Which questions."""
    questions: int | None = None
    """At most this many of them (default: all)."""
    style: Literal["chat", "plain"] = "chat"
    """Chat template of the model, or plain text."""
    slot: Literal["suffix", "prefix", "system", "system-suffix"] = "suffix"
    """Where the prompt stands."""
    per_token: bool = False
    """Compare answers by their log-probability per token, as replies of several words always are."""
    generate: bool = False
    """Also let the model answer freely, and read by rules what it chooses and argues for."""
    judge: str | None = None
    """Also let the model behind this OpenAI-compatible address score its free answers, e.g. http://127.0.0.1:8000/v1."""
    judge_model: str = ""
    """Name of the judge there (default: the first that it lists)."""
    side_effects: bool = False
    """Also measure what becomes of replies to neutral requests and, on an organism, of look-ups."""
    split_seed: Seed = 0
    """Seed of the division into train, validation and test questions."""
    seed: Seed = 0
    """Of the random controls of --steer."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    out: Path | None = None
    """Directory for the result and, as they come, for rates and judged answers; what was cut off there goes on."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Evaluate and print."""
        from jaxsteer.prompts import Placement
        from jaxsteer.prompts.soft import load_soft, with_soft
        from jaxsteer.runs.bars import load
        from jaxsteer.runs.result import Unfinished
        from jaxsteer.study.measure import measure
        from jaxsteer.study.questions import MeasureOptions, questions_of
        from jaxsteer.writers.endpoint import Endpoint

        asked = self._from_run() if self.from_run is not None else self
        if not (asked.prompts or asked.steer or asked.soft or asked.generate or asked.judge):
            raise UserError("nothing to measure: use --prompts TEXT ..., --from-run DIR, --soft FILE, or --steer FILE")
        if asked.transfer and (asked.steer is not None or asked.soft is not None):
            raise UserError("--transfer measures prompt texts on other models; vectors and soft prompts belong to one")
        options = MeasureOptions(
            placement=Placement(style=asked.style, slot=asked.slot),
            judge=None if asked.judge is None else Endpoint(url=asked.judge, model=asked.judge_model),
            per_token=asked.per_token or None,
            **{name: getattr(asked, name) for name in SHARED},
        )
        questions = questions_of(asked.persona, options)  # refused before a model is loaded
        model = load(asked.model, dtype=asked.dtype, delta=asked.delta)
        vectors, prompts = asked.vectors(model), asked.prompts
        controls = {} if vectors is None else asked.beside(vectors, asked.seed)
        if asked.soft is not None:
            model, text = with_soft(model, load_soft(asked.soft), any_weights=asked.any_weights)
            prompts = (*prompts, text)
        try:
            found = measure(
                model,
                questions,
                prompts,
                edits=asked.edits_of(vectors),
                controls=controls,
                transfer=asked.transfer,
                options=options,
                out=asked.out,
            )
        except Unfinished as error:
            print(_shown(error.result, asked.json))
            raise
        print(_shown(found, asked.json))
        return 0

    def _from_run(self) -> Eval:
        from jaxsteer.report import read_run

        assert self.from_run is not None
        found = read_run(self.from_run)
        names = ("model", "persona", "style", "slot", "split_seed", "dtype")
        missing = [name for name in names if name not in found.config]
        if missing:
            raise UserError(f"{self.from_run}/config.json lacks {', '.join(missing)}: is it a run of jaxsteer search?")
        texts = tuple(prompt.text for prompt in found.result.prompts)
        settings = {name: found.config[name] for name in names}
        return dataclasses.replace(self, prompts=(*self.prompts, *texts), **settings)


def _shown(found: Result, as_json: bool) -> str:
    return document(found.to_json()) if as_json else found.table()


SHARED = ("split", "questions", "split_seed", "generate", "side_effects", "dtype")
"""Options that ``measure`` has under the same name."""
