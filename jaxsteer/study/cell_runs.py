"""Computing tables: cells as files, by as many processes as wanted, and the document that collects them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import jax

from jaxsteer.errors import UserError
from jaxsteer.files import read_json
from jaxsteer.personas import load_persona
from jaxsteer.runs import files
from jaxsteer.study.cell_rows import BY_REPLIES, SELECTED_BY, compute_row
from jaxsteer.study.cells import Block, Shared, Table, load_once
from jaxsteer.study.outcome import environment
from jaxsteer.study.table_row import TableRow

FORMAT = "jaxsteer.study/1"
CELL = ("model", "persona", "method", "value")
"""What tells cells apart."""


def compute(block: Block, say: Callable[[str], None] = print) -> Iterator[TableRow]:
    """The rows of a block's cells, one by one: those that have a file are read, the others computed and written."""
    shared = None
    for method in block.methods:
        path = block.path(method)
        if path.is_file():
            yield TableRow.from_json(read_json(path), str(path))
            continue
        shared = shared or Shared(block)
        row = compute_row(shared, method)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, row.to_json())
        label = method.name if method.value is None else f"{method.name} {method.value}"
        text = "" if row.prompt is None else f" {row.prompt!r}"
        say(f"{block.model} {block.persona}, {label}: {100 * row.rate:.1f} % in {row.seconds:.0f} s{text}")
        yield row
    if shared is not None:
        jax.clear_caches()  # programs of one block are of no use to the next, and a process gathers gigabytes of them


def _whole(block: Block) -> list[TableRow]:
    return list(compute(block, _say))


def compute_all(
    blocks: Sequence[Block], *, jobs: int = 1, setup: Callable[[], None] | None = None
) -> Iterator[list[TableRow]]:
    """Rows as they are done: one by one, or block by block with several ``jobs``, each with its share of the CPU cores.

    Every process begins with ``setup``, a function of some module: the place for settings of JAX.
    """
    if setup is not None:
        setup()
    if jobs == 1 or len(blocks) == 1:
        yield from ([row] for block in blocks for row in compute(block, _say))
        return
    context = multiprocessing.get_context("spawn")
    shares: Any = context.Queue()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for job in range(jobs):
        shares.put(cores[job::jobs] or cores)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(shares, setup))
    with pool:
        try:
            for done in as_completed([pool.submit(_whole, block) for block in blocks]):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(shares: Any, setup: Callable[[], None] | None) -> None:
    cores = shares.get()
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    if setup is not None:
        setup()


def _say(line: str) -> None:
    print(line, flush=True)


def open_table(table: Table) -> None:
    """Make the directory, or refuse one whose cells were computed with other settings (``UserError``)."""
    path, wanted = table.out / "settings.json", files.plain(table.settings())
    if path.is_file() and (known := read_json(path)) != wanted:
        differing = [k for k in {**known, **wanted} if known.get(k) != wanted.get(k)]
        changes = "; ".join(f"{k}: {known.get(k)!r} there, {wanted.get(k)!r} now" for k in differing)
        raise UserError(f"{table.out} holds cells of other settings ({changes}): give another --out, or delete it")
    table.out.mkdir(parents=True, exist_ok=True)
    files.write_json(path, wanted)


def missing_cells(rows: Sequence[TableRow], blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """What tells the cells of ``blocks`` apart that have no row yet."""
    done = {(row.model, row.persona, row.method, row.value) for row in rows}
    names = {block.persona: load_persona(block.persona).name for block in blocks}
    cells = [(block.model, names[block.persona], m.name, m.value) for block in blocks for m in block.methods]
    return [dict(zip(CELL, cell, strict=True)) for cell in cells if cell not in done]


def in_order(rows: Sequence[TableRow], blocks: Sequence[Block], order: Sequence[tuple[str, Any]]) -> list[TableRow]:
    """The rows by model and persona, which come as in ``blocks``, and method with its value, as in ``order``."""
    columns = [[block.model for block in blocks], [load_persona(block.persona).name for block in blocks], order]
    models, personas, methods = ({x: i for i, x in enumerate(dict.fromkeys(column))} for column in columns)
    return sorted(rows, key=lambda r: (models[r.model], personas[r.persona], methods[r.method, r.value]))


def document(
    experiment: str, title: str, table: Table, rows: Sequence[TableRow], verdicts: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """What results.json holds, which ``jaxsteer report`` reads."""
    return {
        "format": FORMAT,
        "experiment": experiment,
        "title": title,
        "settings": table.settings(),
        "models": list(dict.fromkeys(row.model for row in rows)),
        "personas": list(dict.fromkeys(row.persona for row in rows)),
        "methods": list(dict.fromkeys(row.method for row in rows)),
        "selected_by": BY_REPLIES if any(row.goal for row in rows) else SELECTED_BY,
        "rows": [row.to_json() for row in rows],
        "verdicts": verdicts,
        "environment": environment(load_once(rows[-1].model)) if rows else {},
        **more,
    }
