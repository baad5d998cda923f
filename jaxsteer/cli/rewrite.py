"""``jaxsteer rewrite``: facts rewritten in a model's weights, covariances of keys, and how good a delta is."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import subcommand

from jaxsteer.files import read_text
from jaxsteer.ranges import CountFrom0
from jaxsteer.rewrite.covariance import CovarianceOptions
from jaxsteer.rewrite.evaluation import MeasureOptions
from jaxsteer.rewrite.pipeline import RewriteOptions
from jaxsteer.runs.files import document

if TYPE_CHECKING:
    from jaxsteer.models.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfModel:
    """A model."""

    model: str = "organism:persona"
    """organism:NAME, a converted checkpoint, a Hugging Face directory, a .gguf file, or a hub id."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    json: bool = False
    """Print JSON instead of tables."""

    def load(self) -> Model:
        """With a bar, over all devices if there are several."""
        import jax

        from jaxsteer.models.sharding import make_mesh
        from jaxsteer.runs.bars import load

        return load(self.model, dtype=self.dtype, mesh=make_mesh() if jax.device_count() > 1 else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OnFacts(_OfModel):
    """Facts, and text that has nothing to do with them."""

    facts: str
    """JSON Lines, JSON, CSV or Parquet of facts (prompt with {}, subject, target_true, target_new, paraphrases,
    neighbourhood), a file of CounterFact or zsRE, owner/name:file on the hub, or organism:persona, what it knows."""
    neutral: Path | None = None
    """Texts that drift is measured on, one per line (default: 16 plain sentences)."""

    def texts(self) -> tuple[str, ...]:
        """The neutral texts."""
        from jaxsteer.rewrite.evaluation import NEUTRAL

        if self.neutral is None:
            return NEUTRAL
        return tuple(line for line in read_text(self.neutral).split("\n") if line.strip())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(RewriteOptions, _OnFacts):
    """Rewrite facts by ROME or MEMIT into a delta of the weights, and measure it beside its controls."""

    out: Path
    """Directory for the delta, the facts, the values that were sought and the result; what was cut off goes on."""
    data: tuple[Path, ...] = ()
    """Text files for the covariance of keys, one document per line, or JSON Lines with the key "text" (an organism
    brings its own corpus)."""

    def run(self) -> int:
        """Run and print."""
        from jaxsteer import rewrite
        from jaxsteer.rewrite.pipeline import DELTA
        from jaxsteer.runs.bars import say

        options = RewriteOptions(**self.part(RewriteOptions))
        found = rewrite.run(
            self.load(), self.facts, self.data, options=options, neutral=self.texts(), out=self.out,
            say=partial(say, file=sys.stderr),
        )  # fmt: skip
        print(document(found.to_json()) if self.json else found.table())
        print(f"\nUse it: jaxsteer generate --model {self.model} --delta {self.out / DELTA} ...", file=sys.stderr)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CovarianceOf(CovarianceOptions, _OfModel):
    """Measure covariances of keys ahead, and see how much text they need; kept in the cache for `rewrite run`."""

    layers: tuple[CountFrom0, ...]
    """Blocks."""
    data: tuple[Path, ...] = ()
    """Text files, one document per line, or JSON Lines with the key "text" (an organism brings its own corpus)."""

    def run(self) -> int:
        """Measure and print the curves."""
        from jaxsteer import rewrite
        from jaxsteer.runs.bars import progress_bar

        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(CovarianceOptions)}
        model = self.load()
        with progress_bar("covariance", self.tokens, unit="tok", quiet=self.json) as advance:
            found = rewrite.covariances(
                model, self.layers, self.data, options=CovarianceOptions(**options), progress=advance
            )
        curves = {str(layer): [one.to_json() for one in each.curve] for layer, each in found.items()}
        print(document(curves) if self.json else "\n\n".join(each.table() for each in found.values()))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalDelta(MeasureOptions, _OnFacts):
    """Measure a delta on facts, beside the model as it is and the facts in the context."""

    delta: Path
    """Delta of the model (delta.safetensors of `rewrite run`)."""

    def run(self) -> int:
        """Measure and print."""
        from jaxsteer import rewrite

        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(MeasureOptions)}
        delta = rewrite.load_delta(self.delta)
        found = rewrite.evaluate(
            self.load(), self.facts, delta, neutral=self.texts(), options=MeasureOptions(**options)
        )
        print(document(found.to_json()) if self.json else found.table())
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewrite:
    """Rewrite facts in a model's weights (ROME, MEMIT), and measure what else that changes."""

    action: (
        Annotated[Run, subcommand("run")]
        | Annotated[CovarianceOf, subcommand("covariance")]
        | Annotated[EvalDelta, subcommand("eval")]
    )

    def run(self) -> int:
        """Run the chosen action."""
        return self.action.run()
