"""``jaxsteer features``: what neurons, heads and vectors respond to; ``jaxsteer dream``: a text that one likes best."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional

import jaxsteer
from jaxsteer.ranges import MOST, CountFrom0, Large, Range, Seed
from jaxsteer.runs.files import REPORT, document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """Neurons, heads and vectors: their strongest moments in text and the tokens that they promote."""

    features: Positional[tuple[str, ...]]
    """m3.n17: a neuron; "a3.h5: Paris": what a head adds to the logit of " Paris"; FILE or FILE:SITE: a vector file."""
    model: str = "organism:llama"
    """organism:NAME (llama, qwen2, gemma3, persona), a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    data: tuple[Path, ...] = ()
    """Text files, one document per line, or JSON Lines with the key "text" (an organism brings its own corpus)."""
    tokens: Large = 50_000
    """Tokens to look at, at least."""
    context: Annotated[int, Range(2, MOST)] = 128
    """Tokens of a row of text."""
    rows: int = 32
    """Rows of text that are run through the model at once."""
    examples: CountFrom0 = 8
    """Pieces of text per feature."""
    around: CountFrom0 = 12
    """Tokens shown on either side of the strongest one."""
    top: CountFrom0 = 10
    """Tokens that a feature promotes, and suppresses."""
    lowest: bool = False
    """Look at the most negative values instead."""
    controls: CountFrom0 = 8
    """Random features of the same site and length beside each."""
    seed: Seed = 0
    """Of the random features and of the order of texts."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> int:
        """Look and print."""
        from jaxsteer.lens.features import FeatureOptions, feature_examples, find_feature
        from jaxsteer.runs.bars import load, progress_bar
        from jaxsteer.sae.texts import Sample, documents_of

        model = load(self.model, dtype=self.dtype, delta=self.delta, quiet=self.json)
        options = FeatureOptions(
            examples=self.examples, around=self.around, top=self.top, lowest=self.lowest, controls=self.controls,
            seed=self.seed,
        )  # fmt: skip
        with progress_bar("features", self.tokens, unit="tok", quiet=self.json) as advance:
            found = feature_examples(
                model, documents_of(model, self.data, seed=self.seed),
                [find_feature(model, name) for name in self.features], options,
                sample=Sample(tokens=self.tokens, context=self.context, rows=self.rows), progress=advance,
            )  # fmt: skip
        print(document(found.to_json()) if self.json else found.table())
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dream:
    """Search a fluent text at whose last token a neuron, a head, a vector or a latent is as large as can be."""

    feature: Positional[str]
    """As in `features`; or latent:SAE[17], a latent of an SAE."""
    out: str
    """Directory for the run's files."""
    model: str = "organism:llama"
    """organism:NAME (llama, qwen2, gemma3, persona), a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    length: int = 8
    """Tokens of the text."""
    steps: int = 100
    """Of the search."""
    population: int = 8
    """Texts that are kept, from the most fluent to the strongest."""
    children: int = 64
    """New texts in a step."""
    conversations: Path | None = None
    """Dream inside of texts or conversations of your own, with {prompt} where the text goes (default: nothing else)."""
    resume: bool = False
    """Go on with a search that was cut off."""
    seed: Seed = 0
    """Of the search."""

    def run(self) -> int:
        """Search, write the page and print the frontier: what is gained, at which cross-entropy."""
        from jaxsteer.processes import is_first
        from jaxsteer.report import write_report

        own = Path(jaxsteer.__file__).parent / "lens" / "dream.json"
        objective = self.feature if self.feature.startswith("latent:") else f"feature:{self.feature}"
        options: dict[str, Any] = {
            "conversations": self.conversations or own, "objective": objective, "prompt_length": self.length,
            "steps": self.steps, "population": self.population, "children": self.children, "seed": self.seed,
            "resume": self.resume, "read_position": "published",
        }  # fmt: skip
        found = jaxsteer.search(out=self.out, model=self.model, **options)
        if is_first():
            write_report(Path(self.out))
            print(f"\n{found.table()}\n\nReport: {self.out}/{REPORT}")
        return 0
