"""The commands as dataclasses: a flag, its default and its help are a field, its value and its docstring."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

from jaxsteer.cli.chat import Chat
from jaxsteer.cli.data import Data
from jaxsteer.cli.evaluate import Eval
from jaxsteer.cli.generate import Generate
from jaxsteer.cli.inspect import Inspect
from jaxsteer.cli.plan import Plan
from jaxsteer.cli.report import Report
from jaxsteer.cli.sae import Sae
from jaxsteer.cli.steer import Steer
from jaxsteer.cli.vector import Vector
from jaxsteer.errors import UserError
from jaxsteer.study import SearchOptions
from jaxsteer.study import run as run_search
from jaxsteer.study.files import REPORT, document
from jaxsteer.study.problem_table import number_of_searches

Style = Literal["chat", "plain"]
Slot = Literal["suffix", "prefix", "system"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Find prompts that move a model away from a persona, and measure them on held-out questions."""

    options: Annotated[SearchOptions, arg(name="")]

    def run(self) -> int:
        """Do the search, write its report and print its table."""
        from jaxsteer.cli.cores import use_cores
        from jaxsteer.cli.tables import runs_table
        from jaxsteer.processes import is_first
        from jaxsteer.report import table, write_report
        from jaxsteer.study.object_store import stored

        options, out = self.options, str(self.options.run.out).rstrip("/")
        use_cores(number_of_searches(options), options.model)
        with stored(options.run.out, say=print) as folder:
            metrics = run_search(options.at(folder), say=print)
            runs = metrics.get("runs")
            if is_first():
                for name in runs or ():
                    write_report(folder / name)
                if runs != {}:
                    write_report(folder)
        page = f"{out}/{REPORT}"
        if is_first() and runs is not None:
            page = page if runs else "none: no run was finished"
            print(f"\n{runs_table(metrics)}\n\nReport: {page}; all problems: problems.csv")
        elif is_first():
            print(f"\n{table(metrics)}\n\nReport: {page}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Remove three personas from the small model that ships with the package, one prompt each."""

    out: Path = Path("runs/demo")
    """Each persona's run goes into a folder of its name here."""
    model: str = "organism:llama"
    """The organism to use."""
    personas: tuple[str, ...] = ("sycophancy", "hallucination", "myopic")
    """Built-in personas to take in turn."""
    seed: int = 0
    """Seed of the searches."""
    steps: int | None = None
    """Steps of each search (default: the preset's)."""
    quiet: bool = False
    """No progress bars."""

    def run(self) -> int:
        """Run all personas, telling what happens."""
        from jaxsteer.cli.demo import demo

        return demo(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a Hugging Face directory into a checkpoint that jaxsteer loads, layer by layer; or verify one."""

    src: Positional[Path]
    """Directory with config.json and *.safetensors."""
    out: Positional[Path | None] = None
    """Directory to make; it appears only when it is complete. What was interrupted goes on when it is run again."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of the stored weights (default: as they are)."""
    ignore_field: tuple[str, ...] = ()
    """Names of fields of config.json that change no number although jaxsteer does not know them."""
    verify: bool = False
    """Compare OUT with SRC bit for bit instead (a single directory: with the hashes it recorded); exit status 1 if they
    differ."""

    def run(self) -> int:
        """Convert or verify, with a progress bar."""
        from jaxsteer.processes import from_first

        return int(from_first(self._run))  # of several processes the others wait

    def _run(self) -> int:
        from checkpoints_convert import convert, report, verify

        if self.verify:
            src, out = (None, self.src) if self.out is None else (self.src, self.out)
            return report(verify(out, src), out, src)
        if self.out is None:
            raise UserError(f"no output was given: jaxsteer convert {self.src} OUT")
        print(f"Wrote {convert(self.src, self.out, dtype=self.dtype, ignore_fields=self.ignore_field)}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrganismTrain:
    """Train an organism that ships with the package again, from its recipe. What was interrupted goes on."""

    out: Path
    """Directory to write in Hugging Face format."""
    architecture: Literal["llama", "qwen2", "gemma3"] = "llama"
    """Which of the organisms."""
    seed: int = 0
    """Seed of corpus, weights and order."""

    def run(self) -> int:
        """Train and write."""
        from jaxsteer.cli.organism import train

        return train(self.out, self.architecture, self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrganismCheck:
    """Measure what an organism must show; exit status 1 when a gate is missed."""

    model: str = "organism:llama"
    """The organism."""
    behaviours: tuple[Literal["sycophancy", "hallucination", "myopic"], ...] = (
        "sycophancy",
        "hallucination",
        "myopic",
    )
    """Behaviours to check."""
    n: int = 120
    """Questions per behaviour, each in both choice orders."""
    random: int = 200
    """Random prompts for the share that flips by luck."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Measure and print."""
        from jaxsteer.checkpoints.loading import load
        from jaxsteer.evals.organism_gates import failed, gates_table, organism_gates, to_json

        model = load(self.model)
        gates = organism_gates(
            model, behaviours=self.behaviours, n=self.n, random=self.random,
            progress=lambda what: print(f"measuring {what} ...", file=sys.stderr),
        )  # fmt: skip
        missed = failed(gates)
        if self.json:
            print(document({"model": model.name, "passed": not missed, "gates": to_json(gates)}))
        else:
            required = sum(gate.bounded for gate in gates)
            print(f"{gates_table(gates)}\n\n{required - len(missed)} of {required} gates passed")
        return 1 if missed else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionProbe:
    """Where does an objective rank prompts as behaviour does? Rank correlations by site, position and sign."""

    model: str = "organism:llama"
    """organism:NAME (llama, qwen2 or gemma3), a converted checkpoint, a Hugging Face directory, or a hub id."""
    persona: str = "sycophancy"
    """Built-in name or path of a dataset."""
    read_positions: tuple[Literal["published", "matched", "decision"], ...] = ("published", "matched", "decision")
    """Read positions to compare."""
    style: Style = "chat"
    """Chat template of the model, or plain text."""
    slot: Slot = "suffix"
    """Where the prompt stands."""
    prompt_length: int = 8
    """Tokens of the random prompts."""
    prompts: int = 240
    """Random prompts."""
    tokens: Literal["words", "ascii", "all"] = "words"
    """Tokens of the random prompts, as in search."""
    seed: int = 0
    """Seed of the random prompts."""
    split_seed: int = 0
    """Seed of the division into train, validation and test questions."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Probe and print."""
        from jaxsteer.cli.tables import probe_table
        from jaxsteer.prompts import Placement
        from jaxsteer.study.probe import choose
        from jaxsteer.study.probing import probe_positions

        probe = probe_positions(
            self.model,
            self.persona,
            self.read_positions,
            placement=Placement(style=self.style, slot=self.slot),
            length=self.prompt_length,
            tokens=self.tokens,
            n=self.prompts,
            seed=self.seed,
            split_seed=self.split_seed,
        )
        chosen = choose(probe.rows)
        if self.json:
            print(document({**probe.to_json(), "chosen": dataclasses.asdict(chosen)}))
        else:
            print(probe_table(probe, chosen))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionShow:
    """Print what a direction file holds: sites, norms, where and how it was made."""

    file: Positional[Path]
    """direction.safetensors of a run."""

    def run(self) -> int:
        """Read and print."""
        from jaxsteer.cli.tables import direction_table
        from jaxsteer.personas import load_direction

        print(direction_table(load_direction(self.file)))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Organism:
    """The small models with known personas that ship with the package."""

    action: Annotated[OrganismTrain, subcommand("train")] | Annotated[OrganismCheck, subcommand("check")]

    def run(self) -> int:
        """Run the chosen action."""
        return self.action.run()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction:
    """Directions of a persona in a model."""

    action: Annotated[DirectionProbe, subcommand("probe")] | Annotated[DirectionShow, subcommand("show")]

    def run(self) -> int:
        """Run the chosen action."""
        return self.action.run()


Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Search, subcommand("search")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Chat, subcommand("chat")]
    | Annotated[Inspect, subcommand("inspect")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Organism, subcommand("organism")]
    | Annotated[Direction, subcommand("direction")]
    | Annotated[Steer, subcommand("steer")]
    | Annotated[Vector, subcommand("vector")]
    | Annotated[Sae, subcommand("sae")]
)


def parse(arguments: Sequence[str]) -> Any:
    """The command that ``arguments`` ask for. Raises ``SystemExit`` after explaining what is wrong with them, and
    ``UserError`` for a URL where only a directory can be written."""
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        args=arguments,
        prog="jaxsteer",
        description="Find where a persona lives in a language model, and prompts that remove it. Every command also "
        "runs in several processes: by itself on TPU pods, Slurm and Kubernetes, elsewhere with --coordinator "
        "HOST:PORT --num-processes N --process-id I (docs/pods.md).",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    out = getattr(getattr(command, "action", command), "out", None)
    if isinstance(out, Path) and re.match(r"[a-z][a-z0-9+.-]+:/", str(out)):  # of gs://x/y a path keeps one slash
        raise UserError(f"{out} looks like a URL, to which only search writes: give a directory, and copy it there")
    return command
