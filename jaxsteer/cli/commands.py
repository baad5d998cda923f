"""The commands: a flag, its default and its help are a field of a dataclass, its value and its docstring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from tyro.conf import subcommand

from jaxsteer.cli.attribute import Attribute
from jaxsteer.cli.axis import Axis
from jaxsteer.cli.chat import Chat
from jaxsteer.cli.circuits import Circuits
from jaxsteer.cli.convert import Convert
from jaxsteer.cli.data import Data
from jaxsteer.cli.demo import Demo
from jaxsteer.cli.direction import Direction
from jaxsteer.cli.evaluate import Eval
from jaxsteer.cli.generate import Generate
from jaxsteer.cli.inspect import Inspect
from jaxsteer.cli.organism import Organism
from jaxsteer.cli.parsing import parse_as
from jaxsteer.cli.plan import Plan
from jaxsteer.cli.refusal import Refusal
from jaxsteer.cli.report import Report
from jaxsteer.cli.sae import Sae
from jaxsteer.cli.search import Config, Search, parse_search
from jaxsteer.cli.steer import Steer
from jaxsteer.cli.vector import Vector

Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Search, subcommand("search")]
    | Annotated[Config, subcommand("config")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Refusal, subcommand("refusal")]
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
    | Annotated[Axis, subcommand("axis")]
    | Annotated[Circuits, subcommand("circuits")]
    | Annotated[Attribute, subcommand("attribute")]
)


def parse(arguments: Sequence[str]) -> Any:
    """The command that ``arguments`` ask for. Raises ``SystemExit`` after explaining what is wrong with them, and
    ``UserError`` for a URL where only a path can stand."""
    if arguments[:1] == ["search"]:
        return parse_search(arguments[1:])
    return parse_as(
        Command,
        arguments,
        prog="jaxsteer",
        description="Find where a persona lives in a language model, and prompts that remove it. Every command also "
        "runs in several processes: by itself on TPU pods, Slurm and Kubernetes, elsewhere with --coordinator "
        "HOST:PORT --num-processes N --process-id I (docs/pods.md). With --debug a failure shows where it happened.",
    )
