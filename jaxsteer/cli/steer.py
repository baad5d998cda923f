"""``jaxsteer steer``: what steering along a direction does, and what it costs."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, subcommand

from jaxsteer.cli.steering import Steering
from jaxsteer.errors import UserError
from jaxsteer.ranges import CountFrom0, Positive, Seed, Share
from jaxsteer.runs.files import document
from jaxsteer.study.steer_compare import CompareOptions
from jaxsteer.study.sweep import SweepOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(SweepOptions):
    """Steer along a persona's direction at every layer and strength; measure rate, KL and perplexity."""

    def run(self) -> int:
        """Do the sweep, draw it and print its table."""
        from jaxsteer.display import write_figure
        from jaxsteer.runs.bars import progress_bar, say
        from jaxsteer.study.sweep import STEERING, TABLE_FILE, sweep

        options = SweepOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SweepOptions)})
        found = sweep(options, say=say)
        with progress_bar("heat maps", quiet=self.quiet):
            drawn = write_figure(self.out / "heatmap.png", found.plot())
        print(f"\n{found.table()}\n\nHeat maps: {drawn}\nTable: {self.out / TABLE_FILE}")
        if (steering := self.out / STEERING).is_file():
            command = [
                "jaxsteer",
                "generate",
                "--model",
                self.model,
                "--steer",
                str(steering),
                *["--plain"] * (self.style == "plain"),
            ]
            print(f"Steer by the chosen setting: {shlex.join(command)} 'Your question'")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(CompareOptions):
    """Make a persona's vectors by every method and measure them at equal disturbance, with controls."""

    def run(self) -> int:
        """Compare, draw and print the tables."""
        from jaxsteer.display import write_figure
        from jaxsteer.runs.bars import say
        from jaxsteer.study.steer_compare import FIGURE, VECTORS, compare

        options = CompareOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(CompareOptions)})
        found = compare(options, say=say)
        drawn = write_figure(self.out / FIGURE, found.plot())
        print(f"\n{found.table()}\n\nEffect against disturbance: {drawn}\nVector files: {self.out / VECTORS}")
        print(f"Page: {shlex.join(['jaxsteer', 'report', str(self.out)])}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norms:
    """Print the mean norm of the residual stream after every block: the unit of steering coefficients."""

    model: str = "organism:llama"
    """organism:NAME (llama, qwen2, gemma3, persona), a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    texts: Path | None = None
    """Text file, one request per line (default: 32 everyday requests; on an organism, sentences of its world)."""
    style: Literal["chat", "plain"] = "chat"
    """Chat template of the model, or plain text."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Measure and print."""
        from jaxsteer.display import aligned
        from jaxsteer.prompts import Placement
        from jaxsteer.runs.bars import load
        from jaxsteer.study.sweep import stream_norms

        norms = stream_norms(
            load(self.model, dtype=self.dtype, delta=self.delta), self.texts, placement=Placement(style=self.style)
        )
        if self.json:
            print(document(norms))
        else:
            print(aligned([("site", "mean norm"), *((site, f"{norm:.4g}") for site, norm in norms.items())]))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrate(Steering):
    """Find the strength at which a vector file changes neutral text by so many nats per token; both signs."""

    model: str = "organism:llama"
    """organism:NAME (llama, qwen2, gemma3, persona), a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    kl: Positive = 0.1
    """Mean over neutral tokens of the divergence from the unedited model, nats."""
    texts: Path | None = None
    """Text file, one request per line (default: 32 everyday requests; on an organism, sentences of its world)."""
    style: Literal["chat", "plain"] = "chat"
    """Chat template of the model, or plain text."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    out: Path | None = None
    """Write the vectors with the strength that was found, of the sign of their own."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Measure and print."""
        from jaxsteer.display import aligned
        from jaxsteer.evals.calibration import calibrate
        from jaxsteer.prompts import Placement
        from jaxsteer.runs.bars import load, progress_bar
        from jaxsteer.steer import save_vectors
        from jaxsteer.study.sweep import read_requests

        if self.out is not None and self.out.exists():
            raise UserError(f"--out {self.out} exists already: give a new file")
        if self.steer is None or self.coefficient is not None:
            raise UserError("give --steer FILE, and no --coefficient: the strength is what is looked for")
        model = load(self.model, dtype=self.dtype, delta=self.delta)
        vectors = self.vectors(model)
        assert vectors is not None
        if self.positions is not None:
            vectors = dataclasses.replace(vectors, positions=self.positions)
        own = -1 if vectors.coefficient < 0 else 1
        with progress_bar("strengths", 2) as advance:
            found = calibrate(
                model, vectors, self.kl, signs=(own, -own), texts=read_requests(self.texts) if self.texts else (),
                placement=Placement(style=self.style), progress=advance, any_weights=self.any_weights,
            )  # fmt: skip
        if self.json:
            print(document([one.to_json() for one in found]))
        else:
            rows = [(f"{o.coefficient:.4g}", f"{o.kl:.4g}", f"{o.perplexity:.4g}") for o in found]
            note = (
                f"units: {vectors.coefficient_units}; perplexity without the vector: {found[0].baseline_perplexity:.4g}"
            )
            print(aligned([("coefficient", "KL", "perplexity"), *rows], note=note))
        if self.out is not None:
            save_vectors(dataclasses.replace(vectors, coefficient=found[0].coefficient), self.out)
            print(f"Wrote {self.out}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defend:
    """Make a model refuse attacks by an SAE's latents (erased, raised, behind a gate), beside controls."""

    requests: Positional[tuple[str, ...]]
    """Sets of requests: NAME or NAME:PATH (`jaxsteer data list`), or FILE=harmful, FILE=harmless, FILE=border."""
    sae: str
    """An SAE: PATH, hub id, or organism:persona."""
    model: str = "organism:persona"
    """organism:NAME, a converted checkpoint, a Hugging Face directory, a .gguf file, or a hub id."""
    choose: tuple[str, ...] = ("contrast",)
    """Latents that are raised: words that explain them, label:TEXT or class:NAME (with --explanations), numbers, or
    "contrast": those that harmful requests activate more than others."""
    erase: tuple[str, ...] = ("contrast",)
    """Latents that are erased: as for --choose; "contrast" takes those that attacks add to harmful requests."""
    explanations: Path | None = None
    """Directory of `sae explain`, or its explanations.safetensors (words alone)."""
    latents: int = 16
    """Latents of each choice, at most."""
    templates: str | None = None
    """Attacks: a file of templates around the request, {"name": "... {request} ..."} or rows with "template"; or
    "organism" for those of organism:persona. Without, harmful requests are attacks as they are."""
    prompts: Annotated[tuple[str, ...], arg(aliases=["-p"])] = ()
    """Prompts that defend, to compare with (default: one of ours, as a system message)."""
    slot: Literal["suffix", "prefix", "system", "system-suffix"] = "system"
    """Where they stand."""
    openings: tuple[str, ...] = ()
    """How refusals begin; the first token of each counts (default: I, As)."""
    generate: bool = False
    """Also let the model reply freely to test requests, and look for phrases of refusals."""
    judge: str | None = None
    """Also let the model behind this OpenAI-compatible address judge the free replies."""
    judge_model: str = ""
    """Name of the judge there (default: the first that it lists)."""
    max_new_tokens: int = 64
    """Longest free reply."""
    max_kl: Positive = 0.1
    """Disturbance at most, nats per token of the model's own replies to ordinary requests."""
    over: Share = 0.05
    """Share of requests to be answered that may come to be refused, at most."""
    train: int = 60
    """Requests of each kind that choose latents."""
    validation: int = 40
    """Requests of each kind that choose strengths."""
    test: int = 100
    """Requests of each kind that are reported."""
    random: CountFrom0 = 2
    """Random choices of latents as controls."""
    seed: Seed = 0
    """Seed of the division, and of random latents."""
    site: str | None = None
    """Where the SAE reads (default: as its files say)."""
    k: int | None = None
    """Active latents of a TopK SAE whose files do not say it."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    out: Path | None = None
    """Directory for the result and, as they come, for free replies; what was cut off goes on."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Measure and print."""
        from jaxsteer.evals.refusal import OPENINGS
        from jaxsteer.explain.pipeline import load_findable
        from jaxsteer.personas import read_templates
        from jaxsteer.prompts import Placement
        from jaxsteer.runs.bars import load
        from jaxsteer.sae import load_sae
        from jaxsteer.study.defence import SYSTEM, DefendOptions, defend
        from jaxsteer.study.refusal import loaded
        from jaxsteer.writers.endpoint import Endpoint

        same = ("choose", "erase", "latents", "generate", "max_new_tokens", "max_kl", "over", "train", "validation")
        options = DefendOptions(
            **{name: getattr(self, name) for name in (*same, "test", "random", "seed")},
            templates={} if self.templates is None else read_templates(self.templates),
            prompts=self.prompts or (SYSTEM,),
            placement=Placement(slot=self.slot),
            openings=self.openings or OPENINGS,
            judge=None if self.judge is None else Endpoint(url=self.judge, model=self.judge_model),
        )
        requests, words = loaded(self.requests), self.explanations  # refused before a model is loaded
        table = None if words is None else load_findable(words)
        sae = load_sae(self.sae, site=self.site, k=self.k)
        found = defend(load(self.model, dtype=self.dtype), sae, requests, table, out=self.out, options=options)
        print(document(found.to_json()) if self.json else found.table())
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steer:
    """Steering: what changing activations along a direction does, which vectors do most, and their units."""

    action: (
        Annotated[Sweep, subcommand("sweep")]
        | Annotated[Compare, subcommand("compare")]
        | Annotated[Calibrate, subcommand("calibrate")]
        | Annotated[Defend, subcommand("defend")]
        | Annotated[Norms, subcommand("norms")]
    )

    def run(self) -> int:
        """Run the chosen action."""
        return self.action.run()
