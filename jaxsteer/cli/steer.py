"""``jaxsteer steer``: what steering along a direction does, and what it costs."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import subcommand

from jaxsteer.cli.steering import Steering
from jaxsteer.errors import UserError
from jaxsteer.ranges import Positive
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
class Steer:
    """Steering: what changing activations along a direction does, which vectors do most, and their units."""

    action: (
        Annotated[Sweep, subcommand("sweep")]
        | Annotated[Compare, subcommand("compare")]
        | Annotated[Calibrate, subcommand("calibrate")]
        | Annotated[Norms, subcommand("norms")]
    )

    def run(self) -> int:
        """Run the chosen action."""
        return self.action.run()
