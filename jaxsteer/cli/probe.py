"""``jaxsteer probe``: what can be read off a model's states."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from jaxsteer.cli.texts import write_plot
from jaxsteer.errors import UserError
from jaxsteer.lens.probe_options import ProbeOptions
from jaxsteer.runs.files import document

if TYPE_CHECKING:
    from jaxsteer.lens.records import TextRecord
    from jaxsteer.models.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(ProbeOptions):
    """Fit probes of a label at every layer and test them by group, beside control tasks and shuffled labels."""

    file: Annotated[tuple[Path, ...], arg(aliases=["-f"]), UseAppendAction] = ()
    """Labelled texts: rows of CSV, JSON Lines or Parquet with text, messages or question, a label, and if wanted a
    group and a type (for the control task)."""
    persona: str | None = None
    """In their place a persona, whose two answers to every question are told apart by whether they show it; where it is
    words alone, the model writes its replies."""
    chat: bool = False
    """Each plain text is what a user says, and the model is to answer."""
    transfer: Annotated[tuple[Path, ...], UseAppendAction] = ()
    """Try the probes on the texts of these files as well."""
    model: str = "organism:llama"
    """organism:NAME (llama, qwen2, gemma3, persona), a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    out: Path | None = None
    """Write the probes' directions here as a vector file (.safetensors), to steer by."""
    plot: Path | None = None
    """Write the figure here as well, as SVG, PNG and CSV with this stem."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Probe and print."""
        from jaxsteer.lens.probes import probe
        from jaxsteer.lens.records import read_texts
        from jaxsteer.runs.bars import load, progress_bar
        from jaxsteer.steer import save_vectors

        if bool(self.file) == (self.persona is not None):
            raise UserError("give labelled texts with --file, or a --persona: one of the two")
        if self.out is not None and self.kind == "mlp":
            raise UserError("an MLP has no direction to steer by: leave out --out, or choose another --kind")
        others = {path.stem: read_texts(path, chat=self.chat) for path in self.transfer}
        given = [record for path in self.file for record in read_texts(path, chat=self.chat)]
        model = load(self.model, dtype=self.dtype, delta=self.delta, quiet=self.json)
        records = given or self._of_persona(model)
        options: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(ProbeOptions)}
        with progress_bar("probe", unit="text", quiet=self.json) as advance:
            found = probe(model, records, ProbeOptions(**options), progress=advance)
        for name, texts in others.items():
            found = found.transfer(model, texts, name)
        print(document(found.result.to_json()) if self.json else found.result.table())
        notes = [] if self.plot is None else [write_plot(found.result.plot(), self.plot)]
        if self.out is not None:
            if found.vectors is None:
                raise UserError("only directions at sites of the stream steer: leave out --out, or choose such --sites")
            notes.append(f"Wrote {save_vectors(found.vectors, self.out)}")
        if notes and not self.json:
            print("\n" + "\n".join(notes))
        return 0

    def _of_persona(self, model: Model) -> tuple[TextRecord, ...]:
        from jaxsteer.lens.records import persona_texts
        from jaxsteer.personas import load_persona, with_replies
        from jaxsteer.runs.bars import progress_bar

        persona = load_persona(str(self.persona))
        if not persona.items:
            with progress_bar("replies", unit="reply", quiet=self.json) as advance:
                persona = with_replies(model, persona, progress=advance)
        return persona_texts(persona)
