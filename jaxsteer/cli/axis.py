"""``jaxsteer axis``: characters on the assistant axis, conversations that drift along it, and caps that hold it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, subcommand

from jaxsteer.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OnAxis:
    """An axis and the model that it was made on."""

    axis: Path
    """Vector file of the axis, or the directory of `axis run`."""
    model: str = "organism:persona"
    """organism:NAME, a converted checkpoint, a Hugging Face directory, a .gguf file, or a hub id."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    any_weights: bool = False
    """Use the axis although it was made on other weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Project(_OnAxis):
    """Where conversations, replies and texts lie on the axis: by turn, as a whole, by token."""

    file: Positional[Path]
    """CSV, JSON Lines, JSON or Parquet: rows with messages, with prompt (or question) and answer, or with text."""
    out: Path
    """Directory to write, which must not exist: projections.jsonl, turns.csv, conversations.csv."""
    sites: Annotated[tuple[str, ...], arg(aliases=["--site"])] = ()
    """Where to read (default: the site of the axis file, else the block at half depth)."""
    tokens: bool = False
    """Also write the projection of every token."""

    def run(self) -> int:
        """Read, write and print."""
        from jaxsteer.axis.projection import load_axis, project
        from jaxsteer.personas.passages import read_passages
        from jaxsteer.runs.bars import load

        if self.out.exists():
            raise UserError(f"{self.out} exists already: give a new directory")
        axis, passages = load_axis(self.axis), read_passages(self.file)
        model = load(self.model, dtype=self.dtype)
        found = project(model, axis, passages, sites=self.sites, tokens=self.tokens, any_weights=self.any_weights)
        found.write(self.out)
        print(f"{found.table()}\n\nWrote {self.out}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """The assistant axis: where characters lie, where conversations drift, and what holds the Assistant."""

    action: Annotated[Project, subcommand("project")]

    def run(self) -> int:
        """Run the chosen action."""
        return self.action.run()
