"""``jaxsteer sae``: train, evaluate and explore sparse autoencoders."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg, subcommand

from jaxsteer.display import aligned, listed
from jaxsteer.errors import UserError
from jaxsteer.explain.options import ExplainOptions
from jaxsteer.files import read_text
from jaxsteer.processes import is_first
from jaxsteer.ranges import MOST, CountFrom0, Large, Positive, Range
from jaxsteer.runs.files import document
from jaxsteer.sae.recipe import Recipe

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxsteer.models.model import Model
    from jaxsteer.sae import SAE
    from jaxsteer.sae.evaluation import Evaluation
    from jaxsteer.sae.texts import Documents, Sample

_HELD_OUT = 1 << 20
"""Seed of the documents that an organism is measured on; training takes its own seed, which is small."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reading:
    """A model and the text that it reads."""

    model: str = "organism:llama"
    """organism:NAME (llama, qwen2, gemma3, persona), a checkpoint, a Hugging Face directory, .gguf file or hub id."""
    data: tuple[Path, ...] = ()
    """Text files, one document per line, or JSON Lines with the key "text" (an organism brings its own corpus)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the model's weights (default: float32 on CPU, as stored elsewhere)."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    mesh_model: int = 1
    """Devices that latents and weights are split over; the others, if there are several, divide the rows."""

    def mesh(self) -> Mesh | None:
        """All devices, if there are several."""
        import jax

        from jaxsteer.models.sharding import make_mesh

        return make_mesh(model=self.mesh_model) if jax.device_count() > 1 or self.mesh_model > 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(_Reading):
    """Train a sparse autoencoder on a model's activations. What was interrupted goes on when it is run again."""

    recipe: Annotated[Recipe, arg(name="")]
    out: Path
    """Folder for the SAE, in SAELens' layout, and its metrics.jsonl."""
    sae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the SAE's matrices in the file."""
    save_minutes: Positive = 10.0
    """Minutes between checkpoints."""
    evaluate: Annotated[int, Range(0, 1 << 50)] = 50_000
    """Activations to measure the finished SAE on, with the whole model and text of another seed (organism) or in
    another order (files); 0 for none."""

    def run(self) -> int:
        """Train with a progress bar, evaluate and print."""
        from jaxsteer.checkpoints.inspect import describe
        from jaxsteer.models.sites import parse_site
        from jaxsteer.runs.bars import load, progress_bar
        from jaxsteer.sae.texts import documents_of
        from jaxsteer.sae.training import train_sae

        recipe = self.recipe
        recipe.check()
        config = describe(self.model).config
        layers = max(1, parse_site(recipe.site, config.n_layers).depth(config.n_layers))
        model = load(self.model, dtype=self.dtype, delta=self.delta, mesh=self.mesh(), layers=layers)
        documents = documents_of(model, self.data, seed=recipe.seed)
        data = [[path.name, path.stat().st_size] for path in self.data]
        with progress_bar("train", recipe.steps * recipe.batch, unit="tok") as advance:

            def report(line: dict[str, Any]) -> None:
                shown = {"fvu": f"{line['fvu']:.4f}", "l0": f"{line['l0']:.1f}", "dead": f"{line['dead']:.1%}"}
                advance(line["tokens"], **shown)

            sae = train_sae(
                model, documents, recipe, self.out,
                data=data, dtype=self.sae_dtype, save_minutes=self.save_minutes, progress=report,
            )  # fmt: skip
        print(f"Wrote {self.out}")
        if self.evaluate:
            from jaxsteer.files import write_text
            from jaxsteer.sae.evaluation import evaluate_sae
            from jaxsteer.sae.texts import Sample

            whole = (
                model
                if layers == config.n_layers
                else load(self.model, dtype=self.dtype, delta=self.delta, mesh=model.mesh)
            )
            held_out = _held_out(whole, self.data)
            sample = Sample(tokens=self.evaluate, context=recipe.context)
            with progress_bar("evaluate", self.evaluate, unit="tok") as advance:
                found = evaluate_sae(sae, whole, held_out, sample=sample, progress=advance)
            if is_first():
                write_text(self.out / "evaluation.json", document(dataclasses.asdict(found)))
            print(f"\n{evaluation_table(found)}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OnSae(_Reading):
    """An SAE, its model and text."""

    sae: str
    """Folder, file or hub_id:folder of any layout that is known, or organism:NAME."""
    site: str | None = None
    """Where it reads, if that is not its own site, or if its files do not say."""
    k: int | None = None
    """Active latents of top-k, if its files do not say."""
    norm_scaling_factor: Positive | None = None
    """Of SAELens releases with inputs scaled to a fixed average norm, which do not say it."""
    tokens: Large = 50_000
    """Activations to look at, at least."""
    context: Annotated[int, Range(2, MOST)] = 128
    """Tokens of a row of text."""
    rows: int = 32
    """Rows of text that are run through the model at once."""
    json: bool = False
    """Print JSON instead of text."""

    def sample(self) -> Sample:
        """How much text."""
        from jaxsteer.sae.texts import Sample

        return Sample(tokens=self.tokens, context=self.context, rows=self.rows)

    def load(self) -> tuple[SAE, Model, Documents]:
        """All three."""
        from jaxsteer.runs.bars import load
        from jaxsteer.sae import load_sae

        mesh = self.mesh()
        sae = load_sae(self.sae, mesh=mesh, site=self.site, k=self.k, norm_scaling_factor=self.norm_scaling_factor)
        model = load(self.model, dtype=self.dtype, delta=self.delta, mesh=mesh)
        return sae, model, _held_out(model, self.data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(_OnSae):
    """Measure an SAE: variance unexplained, L0, dead share, and cross-entropy recovered against mean-ablation."""

    def run(self) -> int:
        """Measure and print."""
        from jaxsteer.runs.bars import progress_bar
        from jaxsteer.sae.evaluation import evaluate_sae

        sae, model, documents = self.load()
        with progress_bar("evaluate", self.tokens, unit="tok", quiet=self.json) as advance:
            found = evaluate_sae(
                sae, model, documents, sample=self.sample(),
                progress=advance,
            )  # fmt: skip
        print(document(dataclasses.asdict(found)) if self.json else evaluation_table(found))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explore(_OnSae):
    """Show latents: their strongest moments in text, token by token, and the tokens that they promote."""

    latents: Annotated[tuple[Annotated[int, Range(0)], ...], arg(aliases=["--latent"])]
    """Numbers of latents."""
    snippets: CountFrom0 = 8
    """Pieces of text per latent."""
    around: CountFrom0 = 12
    """Tokens shown on either side of the strongest one."""
    top: CountFrom0 = 10
    """Promoted tokens per latent."""
    sampled: CountFrom0 = 5
    """Pieces of text per latent from strong to weak, over all quantiles of the rows in which it is active."""
    near: CountFrom0 = 8
    """Neighbours per latent, by decoder row."""
    explanations: Path | None = None
    """Directory of `sae explain` of this SAE: words, labels and scores are told as well."""
    html: Path | None = None
    """Write one self-contained page here as well."""

    def run(self) -> int:
        """Look and print."""
        from jaxsteer.explain import load_explained
        from jaxsteer.report.latents import latents_text, write_latents
        from jaxsteer.runs.bars import progress_bar
        from jaxsteer.sae.exploration import Detail, explore

        if self.html is not None and not self.html.parent.is_dir():
            raise UserError(f"--html {self.html}: the folder {self.html.parent} does not exist")
        known = None if self.explanations is None else load_explained(self.explanations)
        sae, model, documents = self.load()
        if known is not None:
            known.table.check_sae(sae)
        with progress_bar("explore", self.tokens, unit="tok", quiet=self.json) as advance:
            found = explore(
                sae, model, documents, self.latents, sample=self.sample(),
                detail=Detail(
                    snippets=self.snippets, around=self.around, top=self.top, sampled=self.sampled, near=self.near
                ),
                progress=advance,
            )  # fmt: skip
        found = dataclasses.replace(found, sae=self.sae)
        meanings = {} if known is None else {latent: known.described(latent) for latent in self.latents}
        told = dataclasses.asdict(found) | {"meanings": [one.to_json() for one in meanings.values()]}
        print(document(told) if self.json else latents_text(found, meanings))
        if self.html is not None and is_first():
            write_latents(found, self.html, meanings)
            if not self.json:
                print(f"\nWrote {self.html}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explain(ExplainOptions):
    """Explain all latents by words; where there is text or a writer, say how good the explanations are."""

    sae: str
    """Folder, file or hub_id:folder of any layout that is known, or organism:NAME."""
    out: Path
    """Directory for the table of words and the result; what was cut off goes on."""
    model: str = "organism:persona"
    """organism:NAME, a converted checkpoint, a Hugging Face directory, a .gguf file, or a hub id."""
    data: tuple[Path, ...] = ()
    """Text to test explanations on: one document per line, or JSON Lines with the key "text" (an organism brings its
    own corpus; of any other model without text only the words are found)."""
    vocabulary: Path | None = None
    """A file of words of your own, one per line."""
    writer: str | None = None
    """Let the model behind this OpenAI-compatible address label latents, e.g. http://127.0.0.1:8000/v1."""
    writer_model: str = ""
    """Name of the writer there (default: the first that it lists)."""
    given: Path | None = None
    """Labels of another tool in place of the writer's: a Neuronpedia export (.jsonl, .jsonl.gz, .csv or a folder of
    batches), or delphi's folder. A writer then judges them."""
    source: str | None = None
    """Which SAE of --given is meant, if it has several (Neuronpedia's source id, delphi's hookpoint)."""
    site: str | None = None
    """Where the SAE reads, if its files do not say."""
    k: int | None = None
    """Active latents of top-k, if its files do not say."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the model's weights."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    any_weights: bool = False
    """Also explain an SAE whose files name another model."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Explain and print."""
        from jaxsteer import explain
        from jaxsteer.explain.other_tools import read_labels
        from jaxsteer.runs.bars import load, say
        from jaxsteer.sae import load_sae
        from jaxsteer.writers.endpoint import Endpoint

        words = None if self.vocabulary is None else read_text(self.vocabulary).split("\n")
        given = None if self.given is None else read_labels(self.given, source=self.source)
        sae = load_sae(self.sae, site=self.site, k=self.k)
        model = load(self.model, dtype=self.dtype, delta=self.delta, quiet=self.json)
        found = explain.run(
            model, sae, _held_out(model, self.data) if self.data or self.model.startswith("organism:") else None,
            name=self.sae, vocabulary=None if words is None else [word for word in words if word.strip()],
            writer=None if self.writer is None else Endpoint(url=self.writer, model=self.writer_model), given=given,
            any_weights=self.any_weights,
            options=ExplainOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ExplainOptions)}),
            out=self.out, say=partial(say, file=sys.stderr),
        )  # fmt: skip
        print(document(found.result.to_json()) if self.json else f"{found.result.table()}\n\nWrote {self.out}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Find:
    """Find latents by words, by labels or by classes, in what `sae explain` wrote."""

    query: Positional[tuple[str, ...]]
    """Words that latents should speak of; label:TEXT: words that a writer's label holds; class:NAME: its class."""
    explanations: Path
    """Directory of `sae explain`, or its explanations.safetensors."""
    top: CountFrom0 = 20
    """Latents."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Look up and print."""
        from jaxsteer.explain.explanations import BY_WRITER
        from jaxsteer.explain.pipeline import load_findable

        hits = load_findable(self.explanations).find(self.query, top=self.top)
        if self.json:
            print(document([hit._asdict() for hit in hits]))
            return 0
        rows = [(str(hit.latent), f"{hit.score:.3f}", " ".join(hit.words)) for hit in hits]
        labels = all(one.startswith(BY_WRITER) for one in self.query)
        head = ("latent", "support" if labels else "nats", "words")
        print(aligned([head, *rows], left=(0, 2)) if rows else "No latent is explained so.")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write explanations in the form of another tool: Neuronpedia's export, or delphi's folder."""

    explanations: Path
    """Directory of `sae explain`."""
    to: Literal["neuronpedia", "delphi"]
    """neuronpedia: one record for each latent's words and for each label; delphi: a text file for each latent."""
    out: Path
    """A file (.jsonl, .jsonl.gz, .csv) for Neuronpedia, a new folder for delphi."""
    model_id: str = ""
    """Neuronpedia's name of the model (default: the model's own)."""
    source: str = ""
    """Neuronpedia's source id, or delphi's hookpoint (default: made of the SAE's site)."""

    def run(self) -> int:
        """Write and say how many."""
        from jaxsteer.explain import load_explained
        from jaxsteer.explain.other_tools import write_delphi, write_neuronpedia

        found = load_explained(self.explanations)
        table, labels = found.table, found.result.labels
        if self.to == "delphi":
            count = write_delphi(table, labels, self.out, hookpoint=self.source)
        else:
            count = write_neuronpedia(table, labels, self.out, model=self.model_id, source=self.source)
        print(f"Wrote {count:,} explanations to {self.out}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sae:
    """Sparse autoencoders: train one, measure any, look at latents, explain, find and export them."""

    action: (
        Annotated[Train, subcommand("train")]
        | Annotated[Eval, subcommand("eval")]
        | Annotated[Explore, subcommand("explore")]
        | Annotated[Explain, subcommand("explain")]
        | Annotated[Find, subcommand("find")]
        | Annotated[Export, subcommand("export")]
    )

    def run(self) -> int:
        """Run the chosen action."""
        return self.action.run()


def evaluation_table(found: Evaluation) -> str:
    """One line per number, with what it means."""
    rows = (
        ("variance unexplained", f"{found.fvu:.4f}"),
        ("active latents (L0)", f"{found.l0:.1f}"),
        ("dead latents", f"{found.dead:.1%} fired at none of {found.tokens:,} tokens"),
        ("cross-entropy recovered", f"{found.recovered:.4f} (1: as the model; 0: as with the mean in its place)"),
        ("  of the model", f"{found.cross_entropy:.4f} nats per token"),
        ("  with reconstructions", f"{found.cross_entropy_patched:.4f}"),
        ("  with the mean", f"{found.cross_entropy_ablated:.4f}"),
        ("left out as outliers", f"{found.outliers:,} tokens"),
    )
    return "\n".join(listed(rows, indent=0))


def _held_out(model: Model, data: tuple[Path, ...]) -> Documents:
    from jaxsteer.sae.texts import documents_of

    return documents_of(model, data, seed=_HELD_OUT)
