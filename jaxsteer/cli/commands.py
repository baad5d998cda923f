"""The commands: a flag, its default and its help are a field of a dataclass, its value and its docstring.

A command's module is imported when the command is asked for; ``jaxsteer --help`` imports none.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import operator
import textwrap
from collections.abc import Sequence
from shutil import get_terminal_size
from typing import Annotated, Any, NamedTuple

from jaxsteer.errors import UserError


class Command(NamedTuple):
    """Where a command is, and what the list of commands says of it."""

    place: str
    """Module of ``jaxsteer.cli`` and class."""
    summary: str


COMMANDS: dict[str, dict[str, Command]] = {
    "Find prompts": {
        "demo": Command("demo:Demo", "search prompts against three personas of the small model that ships"),
        "search": Command("search:Search", "find prompts that move a model away from a persona, and measure them"),
        "config": Command("search:Config", "print all options of a search as a file for search --config"),
        "eval": Command("evaluate:Eval", "measure prompts and vectors that you bring, with their controls"),
        "report": Command("report:Report", "tables and the HTML page of a run's files"),
        "plan": Command("plan:Plan", "what work takes on devices that need not be here: memory, time, collectives"),
    },
    "Steer": {
        "steer": Command("steer:Steer", "compare, sweep and calibrate steering vectors; norms of the stream"),
        "vector": Command("vector:Vector", "show, import, export and project on vectors of any tool"),
        "direction": Command("direction:Direction", "where a persona lies: probe, show, vectors from rollouts"),
        "generate": Command("generate:Generate", "answers to texts, plain or steered"),
        "chat": Command("chat:Chat", "talk with a model, plain or steered"),
        "serve": Command("serve:Serve", "an OpenAI-compatible server with steering by request, and its page"),
        "refusal": Command("refusal:Refusal", "which requests a model refuses, under prompts, vectors and attacks"),
    },
    "Look inside": {
        "axis": Command("axis:Axis", "the assistant axis: where characters lie, what drifts, what holds"),
        "circuits": Command("circuits:Circuits", "how a push, by a vector or a prompt, travels through a model"),
        "sae": Command("sae:Sae", "train, measure, explore, explain and find latents of sparse autoencoders"),
        "lens": Command("lens:Lens", "what the stream says at every depth: logit lens, tuned lens, differences"),
        "rewrite": Command("rewrite:Rewrite", "facts rewritten in weights by ROME or MEMIT, and side effects"),
        "attribute": Command("attribute:Attribute", "what the parts of a model add to the logit of a token"),
        "attention": Command("attention:Attention", "what every head attends to: sinks, roles, induction"),
        "features": Command(
            "features:Features", "what neurons, heads and vectors respond to, and the tokens they promote"
        ),
        "dream": Command("features:Dream", "a fluent text that a neuron, a head, a vector or a latent likes best"),
        "probe": Command("probe:Probe", "what can be read off a model's states, layer by layer, beside random labels"),
    },
    "Models and data": {
        "doctor": Command("doctor:Doctor", "what this machine has, what a model would need on it, what to mend"),
        "inspect": Command("inspect:Inspect", "a model's sizes, sites and memory, from its configuration alone"),
        "convert": Command("convert:Convert", "a checkpoint that loads straight into shards, from published files"),
        "data": Command("data:Data", "public datasets of personas: list and show"),
        "organism": Command("organism:Organism", "the small models that ship: check them, train them again"),
    },
}
"""By the name that is typed, in the groups in which help shows them."""

_DESCRIPTION = (
    "Find where a persona lives in a language model, steer by it, and find prompts that move the model along it or "
    "against it."
)
_ENDING = (
    "jaxsteer COMMAND --help explains one. Every command also runs in several processes: by itself on TPU pods, Slurm "
    "and Kubernetes, elsewhere with --coordinator HOST:PORT --num-processes N --process-id I (docs/pods.md). With "
    "--debug a failure shows where it happened. --version prints the version."
)


def help_text() -> str:
    """All commands, in the width of the terminal."""
    width = max(40, min(get_terminal_size().columns, 120))
    column = 2 + max(len(name) for group in COMMANDS.values() for name in group) + 2
    lines = ["usage: jaxsteer COMMAND ...", "", *textwrap.wrap(_DESCRIPTION, width), ""]
    for title, group in COMMANDS.items():
        lines.append(f"{title}:")
        for name, command in group.items():
            lines += textwrap.wrap(
                command.summary, width, initial_indent=f"  {name}".ljust(column), subsequent_indent=" " * column
            )
        lines.append("")
    return "\n".join([*lines, *textwrap.wrap(_ENDING, width)])


def needs_command(arguments: Sequence[str]) -> bool:
    """Whether ``arguments`` ask for more than the list of commands."""
    return bool(arguments) and arguments[0] not in ("-h", "--help", "--help-all")


def parse(arguments: Sequence[str]) -> Any:
    """The command that ``arguments`` ask for. Raises ``SystemExit`` after explaining what is wrong with them, and
    ``UserError`` for an unknown command and for a URL where only a path can stand."""
    name = arguments[0] if arguments else ""
    if name.startswith("--tyro-"):  # completion for a shell: of all commands
        return _parse_as(_every_command(), arguments, prog="jaxsteer", description=_DESCRIPTION)
    known = {name: command for group in COMMANDS.values() for name, command in group.items()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"there is no command {name!r}: {meant}There are {', '.join(known)}; jaxsteer --help lists them"
        )
    if name == "search":
        from jaxsteer.cli.search import parse_search

        return parse_search(arguments[1:])
    kind = _load(known[name])
    return _parse_as(kind, arguments[1:], prog=f"jaxsteer {name}", description=kind.__doc__)


def _load(command: Command) -> Any:
    module, _, name = command.place.partition(":")
    return getattr(importlib.import_module(f"jaxsteer.cli.{module}"), name)


def _parse_as(*arguments: Any, **options: Any) -> Any:
    from jaxsteer.cli.parsing import parse_as

    return parse_as(*arguments, **options)


def _every_command() -> Any:
    from tyro.conf import subcommand

    kinds = [
        Annotated[_load(command), subcommand(name)]  # type: ignore[valid-type]
        for group in COMMANDS.values()
        for name, command in group.items()
    ]
    return functools.reduce(operator.or_, kinds)
