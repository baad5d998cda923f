"""``jaxsteer vector``: files of steering vectors, ours and those of other tools."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg, subcommand

from jaxsteer.errors import UserError
from jaxsteer.runs.files import document
from jaxsteer.steer import (
    Vectors,
    import_vectors,
    load_vectors,
    save_vectors,
    write_by_block,
    write_capping,
    write_control_vector,
)
from jaxsteer.steer.exports import layers_name
from jaxsteer.steer.imports import Format
from jaxsteer.steer.vectors import CAPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """A file of vectors, and what has to be said where it does not say it itself."""

    file: Positional[Path]
    """A vector file of jaxsteer, or of any tool in docs/vectors.md."""
    format: Format | None = None
    """Of the file, where its keys, shapes and name do not tell."""
    site: str | None = None
    """Site of a bare vector; elsewhere chooses one vector of several."""
    name: str | None = None
    """Chooses a capping experiment, the position of mean_diffs.pt, the model in a folder, or the entry of a dict."""
    sign: str | None = None
    """What going along the vector means, in words."""

    def read(self) -> Vectors:
        """The vectors of the file."""
        return import_vectors(self.file, format=self.format, site=self.site, name=self.name, sign=self.sign)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show(_Source):
    """Print what a vector file holds, or what its import would give: sites, norms, sign, model, recipe."""

    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Read and print."""
        vectors = self.read()
        if self.json:
            print(document(facts(vectors)))
        else:
            print(vector_table(vectors))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import(_Source):
    """Turn another tool's vectors into a vector file of jaxsteer."""

    out: Positional[Path]
    """File to write (.safetensors); it must not exist."""

    def run(self) -> int:
        """Read, write and print what was written."""
        _new(self.out)
        vectors = self.read()
        if not any(array.any() for array in vectors.arrays.values()):
            raise UserError(
                f"{self.file} holds zeros only, at {', '.join(vectors.sites[:4])}: which is no direction. "
                "Nothing was written; was the right entry chosen (--name, --site)?"
            )
        save_vectors(vectors, self.out)
        print(f"{vector_table(vectors)}\n\nWrote {self.out}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write vectors for other tools: a GGUF control vector for llama.cpp, which adds at strength 1 what the file adds;
    or a file of assistant-axis, a tensor of a vector for each block, or caps as capping_config.pt."""

    file: Positional[Path]
    """A vector file of jaxsteer."""
    out: Positional[Path]
    """File to write, .gguf or .pt; it must not exist."""
    model_hint: str | None = None
    """For .gguf: llama.cpp's name of the model's architecture: llama, qwen2, qwen3, gemma2, gemma3 ..."""
    sites: Annotated[tuple[str, ...], arg(aliases=["--site"])] = ()
    """Sites to write (default: all)."""
    coefficient: float | None = None
    """For .gguf: in place of the file's own, in the file's units. A .pt file holds the vectors as they are."""
    name: str | None = None
    """For .pt: the role whose mean activation the vectors are, or the caps' experiment (default: layers_FIRST:END)."""

    def run(self) -> int:
        """Read, write and print what was written."""
        _new(self.out)
        torch = self.out.suffix.lower() == ".pt"
        if not torch and self.out.suffix.lower() != ".gguf":
            raise UserError(f"{self.out}: files for other tools end in .gguf or .pt")
        vectors = load_vectors(self.file)
        if torch and (self.model_hint or self.coefficient is not None):
            raise UserError("--model-hint and --coefficient are for .gguf: a .pt file holds the vectors as they are")
        if not torch and (self.model_hint is None or self.name is not None):
            raise UserError(
                f"{self.out} is written as GGUF: give --model-hint and no --name, or a name that ends in .pt"
            )
        vectors = vectors.at(self.sites) if self.sites else vectors
        if self.coefficient is not None:
            vectors = dataclasses.replace(vectors, coefficient=self.coefficient)
        if not torch:
            write_control_vector(vectors, self.out, model_hint=str(self.model_hint))
        elif vectors.operation in CAPS:
            write_capping({self.name or layers_name(vectors): vectors}, self.out)
        else:
            write_by_block(vectors, self.out, role=self.name)
        print(f"Wrote {self.out}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Project(_Source):
    """Project replies on vectors: how far each lies along them, in the mean over its tokens."""

    replies: Path
    """CSV, JSON Lines or JSON: rows with prompt (or question) and answer (or response), or with messages."""
    out: Path
    """CSV file to write: the rows' columns, and one for each site; it must not exist."""
    model: str = "organism:llama"
    """organism:NAME, a converted checkpoint, a Hugging Face directory, a .gguf file, or a hub id."""
    average: Literal["response_avg", "prompt_avg", "prompt_last"] = "response_avg"
    """What is read: the mean over the reply, over the prompt, or the prompt's last token."""
    any_weights: bool = False
    """Use the vectors although they were made on other weights."""

    def run(self) -> int:
        """Read, write and print the means."""
        from jaxsteer.runs.bars import load
        from jaxsteer.study.projection import project_file

        _new(self.out)
        vectors = self.read()
        model = load(self.model)
        print(project_file(model, vectors, self.replies, self.out, average=self.average, any_weights=self.any_weights))
        print(f"\nWrote {self.out}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vector:
    """Files of steering vectors: look into them, import, export for llama.cpp, project replies on them."""

    action: (
        Annotated[Show, subcommand("show")]
        | Annotated[Import, subcommand("import")]
        | Annotated[Export, subcommand("export")]
        | Annotated[Project, subcommand("project")]
    )

    def run(self) -> int:
        """Run the chosen action."""
        return self.action.run()


def facts(vectors: Vectors) -> dict[str, Any]:
    """What a file holds without the numbers of its vectors, for JSON."""
    rows = [
        {
            "site": site,
            "shape": list(array.shape),
            "norm": vectors.norm(site),
            "mean_resid_norm": vectors.mean_resid_norm.get(site),
            "value": vectors.values.get(site),
        }
        for site, array in vectors.arrays.items()
    ]
    fields = ("operation", "coefficient", "coefficient_units", "sign", "model", "fingerprint", "read_position")
    named = {name: getattr(vectors, name) for name in (*fields, "positions", "source_format")}
    named["gate"] = "" if vectors.gate is None else vectors.gate.to_json()
    return {**named, "sites": rows, "metadata": vectors.metadata}


def vector_table(vectors: Vectors) -> str:
    """Sites with shapes and norms, then what the vectors are for and where they come from."""
    from jaxsteer.display import aligned, short

    known = facts(vectors)
    rows, recipe = known.pop("sites"), known.pop("metadata")
    valued = any(row["value"] is not None for row in rows)
    table: list[tuple[str, ...]] = [("site", "shape", "norm", "of stream norm", *["value"] * valued)]
    for row in rows:
        shape, stream, value = " x ".join(map(str, row["shape"])), row["mean_resid_norm"], row["value"]
        share = f"{row['norm'] / stream:.3g}" if stream else "-"
        last = ["-" if value is None else f"{value:.4g}"] * valued
        table.append((row["site"], shape, f"{row['norm']:.4g}", share, *last))
    notes = {**{name.replace("_", " "): text for name, text in known.items()}, **recipe}
    if zero := ", ".join(row["site"] for row in rows if row["norm"] == 0):
        notes["warning"] = f"{zero}: all zeros, which is no direction; nothing is steered there"
    notes.pop("diagnostics", None)  # numbers of every site, which --json prints
    return aligned(table, note="\n".join(f"{name}: {short(text, 200)}" for name, text in notes.items() if text != ""))


def _new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already: give a new file")
    if not path.parent.is_dir():
        raise UserError(f"the directory {path.parent} does not exist")
