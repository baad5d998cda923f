"""``jaxsteer refusal``: which requests a model refuses, as it is, under attacks and under steering."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from jaxsteer.cli.steering import Controlled
from jaxsteer.errors import UserError
from jaxsteer.ranges import Seed
from jaxsteer.runs.files import document

if TYPE_CHECKING:
    from jaxsteer.models.model import Model
    from jaxsteer.steer import Edits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal(Controlled):
    """Measure which requests a model refuses: by its first token, by phrases, by a judge; under attacks, steered."""

    requests: Positional[tuple[str, ...]]
    """Sets of requests: NAME or NAME:PATH (`jaxsteer data list`), or FILE=harmful, FILE=harmless, FILE=border."""
    model: str = "organism:persona"
    """organism:NAME, a converted checkpoint, a Hugging Face directory, a .gguf file, or a hub id."""
    prompts: Annotated[tuple[str, ...], arg(aliases=["-p"])] = ()
    """Attacks: prompt texts beside the request."""
    templates: str | None = None
    """Attacks: a file of templates around the request, {"name": "... {request} ..."} or rows with "template"; or
    "organism" for those of organism:persona."""
    strengths: tuple[float, ...] = ()
    """Steer at each of these coefficients, side by side (default: --coefficient, or that of the file)."""
    limit: int | None = None
    """At most this many requests of each kind, drawn by --seed."""
    seed: Seed = 0
    """Seed of what is drawn: requests, and the random controls of --steer."""
    openings: tuple[str, ...] = ()
    """How refusals begin; the first token of each counts (default: I, As)."""
    style: Literal["chat", "plain"] = "chat"
    """Chat template of the model, or plain text."""
    slot: Literal["suffix", "prefix", "system", "system-suffix"] = "suffix"
    """Where prompts stand."""
    generate: bool = False
    """Also let the model reply freely, and look for phrases of refusals."""
    judge: str | None = None
    """Also let the model behind this OpenAI-compatible address judge the free replies, e.g. http://127.0.0.1:8000/v1."""
    judge_model: str = ""
    """Name of the judge there (default: the first that it lists)."""
    max_new_tokens: int = 64
    """Longest free reply."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    out: Path | None = None
    """Directory for the result and, as they come, for replies and what the judge says; what was cut off goes on."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Measure and print."""
        from jaxsteer.evals.refusal import OPENINGS
        from jaxsteer.personas import read_templates
        from jaxsteer.personas.requests import limited
        from jaxsteer.prompts import Placement
        from jaxsteer.runs.bars import load
        from jaxsteer.runs.result import Unfinished
        from jaxsteer.study.refusal import RefusalOptions, RefusalResult, loaded, measure_refusal
        from jaxsteer.writers.endpoint import Endpoint

        if self.strengths and (self.steer is None or self.coefficient is not None):
            raise UserError("--strengths are coefficients of --steer FILE: give that, and no --coefficient")
        options = RefusalOptions(
            templates={} if self.templates is None else read_templates(self.templates),
            openings=self.openings or OPENINGS,
            placement=Placement(style=self.style, slot=self.slot),
            judge=None if self.judge is None else Endpoint(url=self.judge, model=self.judge_model),
            generate=self.generate,
            max_new_tokens=self.max_new_tokens,
        )
        requests = limited(loaded(self.requests), self.limit, self.seed)  # refused before a model is loaded
        model = load(self.model, dtype=self.dtype, delta=self.delta)
        steered = self.steered(model)

        def show(found: RefusalResult) -> None:
            print(document(found.to_json()) if self.json else found.table())

        try:
            show(measure_refusal(model, requests, self.prompts, edits=steered, options=options, out=self.out))
        except Unfinished as error:
            assert isinstance(error.result, RefusalResult)
            show(error.result)
            raise
        return 0

    def steered(self, model: Model) -> dict[str, Edits]:
        """Edits by name: the file's at every strength, each with its random controls."""
        vectors = self.vectors(model)
        found: dict[str, Edits] = {}
        if vectors is None:
            return found
        for amount in self.strengths or (self.coefficient,):
            one = vectors if amount is None else dataclasses.replace(vectors, coefficient=amount)
            at = "" if amount is None else f" at {amount:g}"
            found["steered" if amount is None else f"coefficient {amount:g}"] = one.edits(positions=self.positions)
            found |= {f"{name}{at}": edit for name, edit in self.beside(one, self.seed, amount).items()}
        return found
