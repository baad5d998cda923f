"""What the commands that make a table have in common: their arguments, and their files as they grow."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.tables import COLUMNS, Columns, write_study
from jaxsteer.cli import keep_programs
from jaxsteer.errors import UserError
from jaxsteer.study.cell_runs import compute_all, document, in_order, missing_cells, open_table
from jaxsteer.study.cells import PROMPT_LENGTH, Block, Table
from jaxsteer.study.table_row import TableRow


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Arguments of every table."""
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seeds", type=int, help="seeds per search, from 0 (default 5, quick 2)")
    parser.add_argument("--steps", type=int, help="steps of 128 candidates (default 40, quick 10)")
    parser.add_argument("--contexts", type=int, default=2, help="train questions per candidate, in both orders (2)")
    parser.add_argument("--questions", type=int, help="at most so many validation and test questions (quick: 40)")
    parser.add_argument("--tokens", choices=("words", "ascii", "all"), default="ascii")
    parser.add_argument("--style", choices=("chat", "plain"), default="chat")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its share of the CPU cores (1)")
    parser.add_argument("--quick", action="store_true", help="two seeds and few steps: does it run?")


def table_of(args: argparse.Namespace, **more: Any) -> Table:
    """The table that the arguments ask for."""
    steps = args.steps or (10 if args.quick else 40)
    options = {"steps": steps, "contexts": args.contexts, "tokens": args.tokens, "style": args.style}
    return Table(
        out=args.out,
        seeds=tuple(range(args.seeds or (2 if args.quick else 5))),
        options={**options, "prompt_length": PROMPT_LENGTH, "fluency": "medium"},
        questions=args.questions or (40 if args.quick else None),
        candidates=4 if args.quick else 8,
        **more,
    )


def sae_of(model: str, saes: Sequence[str], number: int) -> str | None:
    """The SAE of a model: the one given, or an organism's own."""
    if saes:
        return None if saes[number] == "none" else saes[number]
    return model if model.startswith("organism:") else None


def finish(
    experiment: str,
    title: str,
    table: Table,
    blocks: Sequence[Block],
    order: Sequence[tuple[str, Any]],
    args: argparse.Namespace,
    judge: Callable[[Sequence[TableRow], Sequence[dict[str, Any]]], list[dict[str, Any]]],
    command: str,
    complete: Callable[[list[TableRow]], list[TableRow]] = list,
    columns: Columns = COLUMNS,
) -> int:
    """Compute all blocks, write tables as they grow, and print the last.

    Every table says which cells are missing, and ``judge`` gets rows and missing cells. Many parameters: what tables
    do not share.
    """
    try:
        open_table(table)
        started, rows, text = time.perf_counter(), [], ""
        title += f" ({len(table.seeds)} seeds, {table.options['steps']} steps{', quick' if args.quick else ''})"
        missing = sum(not block.path(method).is_file() for block in blocks for method in block.methods)
        print(f"{sum(len(block.methods) for block in blocks)} cells, {missing} of them to compute", flush=True)
        for done in compute_all(blocks, jobs=args.jobs, setup=keep_programs):
            rows += done
            ordered, absent = in_order(complete(rows), blocks, order), missing_cells(rows, blocks)
            more = {"missing": absent, "quick": args.quick, "command": command}
            found = document(experiment, title, table, ordered, judge(ordered, absent), **more)
            text = write_study(table.out, found, ordered, columns)
    except KeyboardInterrupt:
        print(
            f"Interrupted. What is done stands in {table.out}; the same command goes on with the rest.", file=sys.stderr
        )
        return 130
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{text}\n{time.perf_counter() - started:.0f} s; {table.out}/results.json, table.md, table.csv, table.tex")
    return 0
