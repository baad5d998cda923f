"""``jaxsteer circuits``: how a vector's push, or a prompt's, travels through the model."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from jaxsteer.circuits.study_options import CircuitOptions
from jaxsteer.runs.files import document

QUICK = {
    "questions": 6, "steps": 4, "random": 20, "controls": 1, "draws": 2, "layer_questions": 0, "max_new_tokens": 16,
}  # fmt: skip
"""What --quick sets."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circuits(CircuitOptions):
    """How a push travels: patch maps, edges, circuits, freezing, value vectors and sparse vectors, of vector files or
    of a prompt, beside random ones; one page."""

    out: Path
    """Directory for the stages, the result and its page; what was cut off goes on."""
    model: str = "organism:persona"
    """organism:NAME, a converted checkpoint, a Hugging Face directory, a .gguf file, or a hub id."""
    persona: str = "refusal"
    """A choice persona, a character in words, a persona file, or refusal."""
    steer: Annotated[tuple[Path, ...], arg(aliases=["-s"])] = ()
    """Vector files, each of one vector that is added to the stream."""
    steer_site: str | None = None
    """Site of files that hold several (default: the one that the file names)."""
    quick: bool = False
    """A look: 6 questions, 4 steps, 20 random circuits, no single layers."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Run and print."""
        from jaxsteer.circuits import study
        from jaxsteer.processes import is_first
        from jaxsteer.report import write_report
        from jaxsteer.runs.bars import load, say

        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(CircuitOptions)} | (
            QUICK if self.quick else {}
        )
        as_it_is = self.dtype is None and self.delta is None
        model = self.model if as_it_is else load(self.model, dtype=self.dtype, delta=self.delta)
        found = study.run(
            model,
            study.load_each(self.steer, self.steer_site), self.persona, out=self.out,
            options=CircuitOptions(**options), say=partial(say, file=sys.stderr),
        )  # fmt: skip
        if is_first():
            page = write_report(self.out)
            print(document(found.to_json()) if self.json else f"{found.table()}\n\nReport: {page}")
        return 0
