"""``jaxsteer lens``: what the stream says at every depth, and lenses that are trained for it."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import subcommand

from jaxsteer.cli.texts import Reading, write_plot
from jaxsteer.lens.pushes import LensOptions
from jaxsteer.lens.tuning import Tuning
from jaxsteer.ranges import CountFrom0
from jaxsteer.runs.files import document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read(Reading, LensOptions):
    """Read texts at every depth: the likeliest tokens, KL to the output, entropy, ranks; steered or prompted runs
    beside plain ones and random pushes."""

    persona: str | None = None
    """Read the questions of a persona, a name or a file, as what a user asks."""
    questions: int = 32
    """Of the persona."""
    against: Path | None = None
    """A second vector file: compare with the run that it steers."""
    lens: Path | None = None
    """Directory of a tuned lens (config.json, params.pt); without it, the logit lens."""
    out: Path | None = None
    """Directory for the result, all arrays (lens.npz) and the page (report.html)."""

    def run(self) -> int:
        """Read and print."""
        from jaxsteer.lens.pushes import persona_questions, read_pushed
        from jaxsteer.lens.tuned_lens_files import load_lens
        from jaxsteer.personas import load_persona
        from jaxsteer.runs.bars import load, progress_bar
        from jaxsteer.steer import load_vectors

        texts = [] if self.persona is None else persona_questions(load_persona(self.persona), self.questions)
        if self.texts or self.file or not texts:
            texts += [record.said for record in self.records()]
        model = load(self.model, dtype=self.dtype, delta=self.delta, quiet=self.json)
        lens = None if self.lens is None else load_lens(self.lens, model, any_weights=self.any_weights)
        steer = self.vectors(model)
        other = None if self.against is None else load_vectors(self.against, model=model, any_weights=self.any_weights)
        options = LensOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LensOptions)})
        with progress_bar("lens", len(texts), unit="text", quiet=self.json) as advance:
            found = read_pushed(
                model, texts, steer=steer, against=other,
                edits_of=lambda one: one.edits(coefficient=self.coefficient, positions=self.positions),
                lens=lens, options=options, out=self.out, progress=advance,
            )  # fmt: skip
        print(document(found.to_json()) if self.json else found.table())
        written = [] if self.plot is None else [write_plot(found.plot(), self.plot)]
        if self.out is not None:
            from jaxsteer.report import write_report

            written.append(f"Report: {write_report(self.out)}")
        if written and not self.json:
            print("\n" + "\n".join(written))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Tuning):
    """Train a tuned lens on text, and measure it beside the logit lens on texts that are held out."""

    out: Path
    """Directory for the lens and its measurement; what was cut off goes on."""
    model: str = "organism:llama"
    """organism:NAME, a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    data: tuple[Path, ...] = ()
    """Texts, a document per line, or JSON Lines with the key "text" (default: an organism's own corpus)."""
    written: CountFrom0 = 0
    """Train on so many replies of the model itself, to the questions of --persona."""
    persona: str | None = None
    """Whose questions the model answers."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Train and print."""
        from jaxsteer.lens.tuning import tune
        from jaxsteer.lens.tuning_texts import texts_to_train
        from jaxsteer.runs.bars import load, say

        tell = partial(say, file=sys.stderr)
        model = load(self.model, dtype=self.dtype, delta=self.delta)
        texts = texts_to_train(model, self.data, self.persona, self.written, self.out, seed=self.seed, say=tell)
        tuning = Tuning(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Tuning)})
        _, found = tune(model, texts.documents, self.out, tuning, count=texts.count, data=texts.told, say=tell)
        print(document(found.to_json()) if self.json else found.table())
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lens:
    """What the stream says at every depth, by the logit lens or a tuned one."""

    action: Annotated[Read, subcommand("read")] | Annotated[Train, subcommand("train")]

    def run(self) -> int:
        """Run the chosen action."""
        return self.action.run()
