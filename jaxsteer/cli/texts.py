"""The options of every command that looks into a model while it reads texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from jaxsteer.cli.steering import Steering
from jaxsteer.errors import UserError

if TYPE_CHECKING:
    from jaxsteer.display import Plot
    from jaxsteer.lens.records import TextRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading(Steering):
    """Texts, and a model that reads them; steered by a vector file on request."""

    texts: Positional[tuple[str, ...]] = ()
    """Texts, read as they stand."""
    file: Annotated[tuple[Path, ...], arg(aliases=["-f"]), UseAppendAction] = ()
    """More texts: lines of a .txt file, or rows of CSV, JSON Lines or Parquet with text, messages or question."""
    chat: bool = False
    """Each plain text is what a user says, and the model is to answer."""
    model: str = "organism:llama"
    """organism:NAME (llama, qwen2, gemma3, persona), a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    plot: Path | None = None
    """Write the figure here as well, as SVG, PNG and CSV with this stem."""
    json: bool = False
    """Print JSON instead of tables."""

    def records(self) -> tuple[TextRecord, ...]:
        """All texts. Raises ``UserError`` where there is none."""
        from jaxsteer.lens.records import TextRecord, asked, read_texts

        given = [TextRecord(text=text) for text in self.texts]
        found = [asked(record) if self.chat else record for record in given]
        found += [record for path in self.file for record in read_texts(path, chat=self.chat)]
        if not found:
            raise UserError("no text was given: write one after the command, or use --file")
        return tuple(found)


def write_plot(plot: Plot, path: Path) -> str:
    """Write a figure under the stem of ``path``; what was written, in words. Raises ``UserError`` for no folder."""
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: the folder {path.parent} does not exist")
    written = dataclasses.replace(plot, name=path.stem).write(path.parent)
    return f"Wrote {', '.join(map(str, written))}"
