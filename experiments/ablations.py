"""What RESGA's prompt depends on: one thing varied at a time, on the organisms or any model.

python -m experiments.ablations [--out runs/ablations] [--jobs 4] [--quick] [--only layer "prompt length" ...]

``base`` is RESGA at the token that decides, as in the main table; every other row differs from it in one thing. Cells,
files, selection on validation questions and resuming are those of ``experiments.main_table``.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from experiments.main_table import EPO
from experiments.running import add_arguments, finish, sae_of, table_of
from experiments.tables import COLUMNS
from jaxsteer import organisms
from jaxsteer.checkpoints.loading import load
from jaxsteer.models.sites import resid_site
from jaxsteer.personas import load_persona, seed_phrase
from jaxsteer.study.cells import PROMPT_LENGTH, Block, Method, Table
from jaxsteer.study.table_row import TableRow

BASE: dict[str, Any] = {"read_position": "decision", **EPO}
NEVER = 1_000_000

Values = dict[Any, dict[str, Any]]
"""What a factor may be: its name in the table -> how the method differs from ``base``."""
TOGETHER = (
    ("base", "direction", "updates", "fluency"),
    ("initialisation", "restarts", "restart period"),
    ("layer", "prompt length"),
    ("contexts", "slot"),
    ("SAE latents",),
)
"""Factors whose cells share directions or programs, and so a process."""
COLUMNS_HERE = {name: COLUMNS[name] for name in ("rate %", "95 % interval", "range", "A-rate", "ranked first %")} | {
    "perplexity": COLUMNS["perplexity"],
    "of the one shown": COLUMNS["of the one shown"],
    "readability": lambda row: "-" if row.readability is None else f"{row.readability:.0f}",
    "probe": lambda row: "-" if row.probe_correlation is None else f"{row.probe_correlation:.2f}",
}


def factors(table: Table, layers: int, phrase: str) -> dict[str, Values]:
    """Everything that is varied."""

    def search(**changed: Any) -> dict[str, Any]:
        return {"options": changed}

    steps = table.options["steps"]
    return {
        "base": {None: {}},
        "layer": {layer: search(site=resid_site(layer)) for layer in range(layers)},
        "prompt length": {n: search(prompt_length=n) for n in (2, 4, 8, 12, 16, 24, 32)},
        "SAE latents": {k: search(method="saega", latents=k) for k in (1, 4, 16, 64, 256)},
        "direction": {"own": {}, "random": {"random": True}},
        "updates": {"gradient": {}, "random": search(algorithm="mutation", top_k=None)},
        "fluency": {name: search(fluency=name) for name in ("strict", "medium", "loose")},
        "initialisation": {
            "random": {},
            "seed phrase": search(init=phrase, prompt_length=None),
            "seed phrase, ultra_strict": search(init=phrase, prompt_length=None, fluency="ultra_strict"),
        },
        "contexts": {n: search(contexts=n) for n in (1, 2, 4, 8, 16)},
        "slot": {place: search(slot=place) for place in ("suffix", "prefix", "system")},
        "restarts": {n: {"populations": n, **search(steps=max(1, steps // n))} for n in (1, 2, 4)},
        "restart period": {n or "never": search(restart_every=n or NEVER) for n in (5, 25, 0)},
    }


AS_BASE = {
    "prompt length": PROMPT_LENGTH,
    "direction": "own",
    "updates": "gradient",
    "fluency": "medium",
    "initialisation": "random",
    "slot": "suffix",
    "restarts": 1,
    "restart period": 25,
}
"""Of every factor, the value that ``base`` has; its row is that of ``base``."""
QUICK = {
    "layer": (0, 2),
    "prompt length": (2, 8, 32),
    "SAE latents": (4, 64),
    "contexts": (1, 2, 8),
    "restarts": (1, 4),
    "restart period": (5, 25),
}
"""Of ``--quick``; all values of other factors."""


def methods_of(table: Table, factor: str, values: Values) -> list[Method]:
    """The cells of a factor that are not the base's."""
    base = base_of(table, factor)
    return [
        Method(
            name=factor,
            about="RESGA at the token that decides." if factor == "base" else f"As base, but for its {factor}.",
            value=value,
            options=BASE | change.get("options", {}),
            keep=factor in ("base", "layer", "SAE latents"),
            **{name: given for name, given in change.items() if name != "options"},
        )
        for value, change in values.items()
        if factor == "base" or value != base
    ]


def base_of(table: Table, factor: str) -> Any:
    """The value of a factor that ``base`` has, if it has one."""
    return table.options["contexts"] if factor == "contexts" else AS_BASE.get(factor)


def with_base(rows: Sequence[TableRow], table: Table, order: Sequence[tuple[str, Any]]) -> list[TableRow]:
    """The rows, and for every factor the row of ``base`` under the value that it has there."""
    known = {(row.method, row.value) for row in rows}
    added = [
        dataclasses.replace(row, method=factor, value=value, same_as="base")
        for row in rows
        if row.method == "base"
        for factor, value in order
        if factor != "base" and value == base_of(table, factor) and any(name == factor for name, _ in known)
    ]
    return [*rows, *added]


def main(argv: Sequence[str] | None = None) -> int:
    """Compute the missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "runs/ablations")
    parser.add_argument("--model", default="organism:llama")
    parser.add_argument("--sae", nargs=1, default=[], help="its SAE, or none (default: an organism's own)")
    parser.add_argument("--personas", nargs="+", help="names or data sets (default: the organisms'; quick: the first)")
    parser.add_argument("--only", nargs="+", metavar="FACTOR", help="default: all")
    args = parser.parse_args(argv)
    personas = args.personas or list(organisms.BEHAVIOURS[: 1 if args.quick else None])
    table, sae = table_of(args), sae_of(args.model, args.sae, 0)
    layers = load(args.model).config.n_layers
    blocks, order = [], []
    for persona in personas:
        phrase = seed_phrase(load_persona(persona).subject)
        varied = factors(table, layers, phrase)
        if unknown := set(args.only or ()) - set(varied):
            parser.error(f"there is no factor {min(unknown)}: there are {', '.join(varied)}")
        if args.quick:
            varied = {
                name: {v: change for v, change in values.items() if v in QUICK.get(name, values)}
                for name, values in varied.items()
            }
        if sae is None:
            del varied["SAE latents"]
        order = [(name, value) for name, values in varied.items() for value in values]
        for group in TOGETHER:
            names = [n for n in group if n in varied and (not args.only or n == "base" or n in args.only)]
            methods = tuple(m for name in names for m in methods_of(table, name, varied[name]))
            if methods:
                blocks.append(Block(table=table, model=args.model, sae=sae, persona=persona, methods=methods))
    command = "python -m experiments.ablations " + shlex.join(sys.argv[1:] if argv is None else argv)
    return finish(
        "ablations", "Ablations", table, blocks, order, args, lambda rows, missing: [], command.strip(),
        complete=lambda rows: with_base(rows, table, order), columns=COLUMNS_HERE,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
