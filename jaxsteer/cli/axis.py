"""``jaxsteer axis``: characters on the assistant axis, conversations that drift along it, and caps that hold it."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, subcommand

from jaxsteer.axis.cap_study import CapOptions
from jaxsteer.axis.hold_contexts import HoldOptions
from jaxsteer.axis.rollouts import WritingOptions
from jaxsteer.axis.talks import DriftOptions
from jaxsteer.errors import UserError
from jaxsteer.runs.files import document

QUICK = {"questions": 8, "every": 2, "max_new_tokens": 48, "prompts": 1}
"""What --quick asks: so many questions of every second role."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(WritingOptions):
    """Ask many characters the same questions, and find the axis between them and the Assistant."""

    out: Path
    """Directory for rollouts, states, vectors, the result and its page; what was cut off goes on."""
    model: str = "organism:persona"
    """organism:NAME, a converted checkpoint, a Hugging Face directory, a .gguf file, or a hub id."""
    roles: str = "default"
    """A file of roles of your own, or the folder of the released ones (default: the set that ships)."""
    only: tuple[str, ...] = ()
    """Names of roles to ask for (default: all)."""
    questions: int | None = None
    """So many of the questions, the first ones (default: all)."""
    traits: bool = False
    """Also ask for the traits of the set, for and against."""
    transcripts: Path | None = None
    """Rollouts that exist already, as JSON Lines: nothing is written then."""
    quick: bool = False
    """A look: every second role, 8 questions, one instruction each, 48 tokens."""
    judge: str | None = None
    """Keep rollouts that are in their role: as the model behind this OpenAI-compatible address says, or "words", a rule
    of the words that the role has and the Assistant has not."""
    judge_model: str = ""
    """Name of the judge there (default: the first that it lists)."""
    keep: int = 3
    """Of judged rollouts, those with at least this score from 0 to 3."""
    least: int = 5
    """Rollouts that a role needs, or it is left out."""
    layers: tuple[int, ...] = ()
    """Blocks to look at (default: all)."""
    target: int | None = None
    """Block at which roles are placed (default: where the axes of two halves of the questions agree best)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Run and print."""
        from jaxsteer import axis
        from jaxsteer.processes import is_first
        from jaxsteer.report import write_report
        from jaxsteer.runs.bars import load, say
        from jaxsteer.writers.endpoint import Endpoint

        roles = axis.load_roles(self.roles)
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(WritingOptions)}
        names = self.only or ([role.name for role in roles.roles[:: QUICK["every"]]] if self.quick else None)
        count = self.questions or (QUICK["questions"] if self.quick else None)
        roles = roles.only(roles=names, questions=count, traits=None if self.traits else ())
        if self.quick:
            options |= {name: min(options[name], QUICK[name]) for name in ("prompts", "max_new_tokens")}
        judge = Endpoint(url=self.judge, model=self.judge_model) if self.judge not in (None, "words") else self.judge
        as_it_is = self.dtype is None and self.delta is None
        model = self.model if as_it_is else load(self.model, dtype=self.dtype, delta=self.delta)
        found = axis.run(
            model, roles, out=self.out,
            transcripts=self.transcripts, writing=WritingOptions(**options), judge=judge, keep=self.keep,
            least=self.least, layers=self.layers, target=self.target, seed=self.seed,
            say=partial(say, file=sys.stderr),
        )  # fmt: skip
        if is_first():
            page = write_report(self.out)
            print(document(found.result.to_json()) if self.json else f"{found.result.table()}\n\nReport: {page}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OnAxis:
    """An axis and the model that it was made on."""

    axis: Path
    """Vector file of the axis, or the directory of `axis run`."""
    model: str = "organism:persona"
    """organism:NAME, a converted checkpoint, a Hugging Face directory, a .gguf file, or a hub id."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights."""
    delta: Path | None = None
    """Change of the weights to load them with (delta.safetensors of `jaxsteer rewrite run`)."""
    any_weights: bool = False
    """Use the axis, and vectors, although they were made on other weights."""


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
        model = load(self.model, dtype=self.dtype, delta=self.delta)
        found = project(model, axis, passages, sites=self.sites, tokens=self.tokens, any_weights=self.any_weights)
        found.write(self.out)
        print(f"{found.table()}\n\nWrote {self.out}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift(DriftOptions, _OnAxis):
    """Lead the model through conversations, or read some, and see which drift along the axis, and after what."""

    out: Path
    """Directory for messages as they come, transcripts.jsonl, metrics.json and drift.png; what was cut off goes on."""
    scripts: str = "default"
    """JSON file of the user's messages, {"domains": {name: [[message, ...], ...]}} (default: those that ship: coding,
    writing, therapy, philosophy)."""
    transcripts: Path | None = None
    """Read these conversations (JSON Lines of messages, with a domain) in place of leading the model through any."""
    user: str | None = None
    """OpenAI-compatible address of a model that plays the user behind the first message of each script."""
    user_model: str = ""
    """Name of the user there (default: the first that it lists)."""
    calibrate: Path | None = None
    """Conversations of the model as it is, whose percentile is the threshold (default: what the axis file says)."""
    steer: Path | None = None
    """Vector file under which the model replies, e.g. caps.safetensors of `axis cap`; it reads without them."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Lead, read, draw and print."""
        from jaxsteer.axis.projection import load_axis
        from jaxsteer.axis.talks import drift
        from jaxsteer.display import write_figure
        from jaxsteer.personas.passages import read_passages
        from jaxsteer.runs.bars import load
        from jaxsteer.steer import load_vectors
        from jaxsteer.writers.endpoint import Endpoint

        if self.transcripts is not None and (self.user is not None or self.steer is not None):
            raise UserError("--transcripts are read as they are: give neither --user nor --steer with them")
        axis, options = load_axis(self.axis), {f.name: getattr(self, f.name) for f in dataclasses.fields(DriftOptions)}
        told = self.scripts if self.transcripts is None else read_passages(self.transcripts)
        model = load(self.model, dtype=self.dtype, delta=self.delta)
        steer = None if self.steer is None else load_vectors(self.steer, model=model, any_weights=self.any_weights)
        found = drift(
            model, axis, told, user=None if self.user is None else Endpoint(url=self.user, model=self.user_model),
            edits=None if steer is None else steer.edits(), calibrate_on=self.calibrate or (), out=self.out,
            any_weights=self.any_weights, options=DriftOptions(**options),
        )  # fmt: skip
        drawn = write_figure(self.out / "drift.png", found.plot())
        print(document(found.to_json()) if self.json else f"{found.table()}\n\nCurves: {drawn}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cap(CapOptions, _OnAxis):
    """Calibrate caps that hold the Assistant, and measure them beside random axes and an addition of equal size."""

    out: Path
    """Directory for caps.safetensors, replies as they come, metrics.json and caps.png; what was cut off goes on."""
    rollouts: Path | None = None
    """What caps are calibrated on: JSON Lines of messages with a role (default: transcripts.jsonl of the directory; a
    vector file needs it)."""
    pc2: Path | None = None
    """Vector file of another direction that is capped by the same rule (default: of the directory, the second
    principal component of the roles)."""
    judge: str | None = None
    """Also let the model behind this OpenAI-compatible address say whether the Assistant speaks in the replies."""
    judge_model: str = ""
    """Name of the judge there (default: the first that it lists)."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Calibrate, measure, draw and print."""
        from jaxsteer.axis.cap_study import CAPS, cap
        from jaxsteer.display import write_figure
        from jaxsteer.runs.bars import load
        from jaxsteer.steer import load_vectors
        from jaxsteer.writers.endpoint import Endpoint

        options = CapOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(CapOptions)})
        found = cap(
            load(self.model, dtype=self.dtype, delta=self.delta), self.axis, self.rollouts,
            pc2=None if self.pc2 is None else load_vectors(self.pc2),
            judge=None if self.judge is None else Endpoint(url=self.judge, model=self.judge_model), out=self.out,
            any_weights=self.any_weights, options=options,
        )  # fmt: skip
        drawn = write_figure(self.out / "caps.png", found.result.plot())
        print(document(found.result.to_json()) if self.json else f"{found.result.table()}\n\nFigure: {drawn}")
        print(f"Hold the model: jaxsteer chat --model {self.model} --steer {self.out / CAPS}", file=sys.stderr)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hold(HoldOptions):
    """Search prompts that hold the Assistant while a role stands in the system message, beside caps and vectors."""

    axis: Path
    """Directory of `axis run`."""
    out: Path
    """Directory for the searches and the result; what was cut off goes on."""
    model: str | None = None
    """The model (default: the one that the run names)."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self) -> int:
        """Search, compare and print."""
        from jaxsteer.axis.hold import hold
        from jaxsteer.display import write_figure

        options = HoldOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(HoldOptions)})
        found = hold(self.axis, self.model, out=self.out, options=options)
        drawn = write_figure(self.out / "hold.png", found.plot())
        print(document(found.to_json()) if self.json else f"{found.table()}\n\nFigure: {drawn}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """How alike two runs, of two models or of one, order the roles that both have."""

    runs: Positional[tuple[Path, Path]]
    """Directories of `axis run`."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Read and print."""
        from jaxsteer import axis

        found = axis.compare(*(axis.AxisResult.read(path) for path in self.runs))
        print(document(found.to_json()) if self.json else found.table())
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """The assistant axis: where characters lie, where conversations drift, and what holds the Assistant."""

    action: (
        Annotated[Run, subcommand("run")]
        | Annotated[Project, subcommand("project")]
        | Annotated[Drift, subcommand("drift")]
        | Annotated[Cap, subcommand("cap")]
        | Annotated[Hold, subcommand("hold")]
        | Annotated[Compare, subcommand("compare")]
    )

    def run(self) -> int:
        """Run the chosen action."""
        return self.action.run()
