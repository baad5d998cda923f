"""Running a study: its arguments, its processes, and its files as they grow."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax

from experiments.cells import PROMPT_LENGTH, Lab, Study, Work, load_once
from experiments.tables import COLUMNS, Columns, Row, write_study
from jaxsteer.checkpoints.loading import cache_dir
from jaxsteer.errors import UserError
from jaxsteer.personas import load_persona
from jaxsteer.study import files
from jaxsteer.study.outcome import environment

FORMAT = "jaxsteer.study/1"


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """What this and the ablations have in common."""
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seeds", type=int, help="seeds per search, from 0 (default 5, quick 2)")
    parser.add_argument("--steps", type=int, help="steps of 128 candidates (default 40, quick 10)")
    parser.add_argument("--contexts", type=int, default=2, help="train questions per candidate, in both orders (2)")
    parser.add_argument("--questions", type=int, help="at most so many validation and test questions (quick: 40)")
    parser.add_argument("--tokens", choices=("words", "ascii", "all"), default="ascii")
    parser.add_argument("--style", choices=("chat", "plain"), default="chat")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its share of the CPU cores (1)")
    parser.add_argument("--quick", action="store_true", help="two seeds and few steps: does it run?")


def study_of(args: argparse.Namespace, **more: Any) -> Study:
    """The study that the arguments ask for."""
    steps = args.steps or (10 if args.quick else 40)
    search = {"steps": steps, "contexts": args.contexts, "tokens": args.tokens, "style": args.style}
    return Study(
        out=args.out,
        seeds=tuple(range(args.seeds or (2 if args.quick else 5))),
        search={**search, "prompt_length": PROMPT_LENGTH, "fluency": "medium"},
        questions=args.questions or (40 if args.quick else None),
        candidates=4 if args.quick else 8,
        **more,
    )


def sae_of(model: str, saes: Sequence[str], number: int) -> str | None:
    """The SAE of a model: the one given, or an organism's own."""
    if saes:
        return None if saes[number] == "none" else saes[number]
    return model if model.startswith("organism:") else None


def compute(work: Work, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """The rows of all cells of ``work``; those that have a file are read, the others are computed and written."""
    lab, rows = None, []
    for method in work.methods:
        path = work.path(method)
        if path.is_file():
            rows.append(json.loads(path.read_text()))
            continue
        lab = lab or Lab(work)
        row = lab.row(method)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, row)
        rows.append(row)
        label = method.name if method.value is None else f"{method.name} {method.value}"
        text = "" if row["prompt"] is None else f" {row['prompt']!r}"
        say(f"{work.model} {work.persona}, {label}: {100 * row['rate']:.1f} % in {row['seconds']:.0f} s{text}")
    if lab is not None:
        jax.clear_caches()  # programs of one work are of no use to the next, and a process gathers gigabytes of them
    return rows


def compute_all(works: Sequence[Work], *, jobs: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of every work as it is done. With several ``jobs`` each process has its own share of the CPU cores.

    Programs compiled once are kept on disk, for the other processes and the next time.
    """
    keep_programs()
    if jobs == 1 or len(works) == 1:
        yield from (compute(work, _say) for work in works)
        return
    context = multiprocessing.get_context("spawn")
    shares: Any = context.Queue()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for job in range(jobs):
        shares.put(cores[job::jobs] or cores)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(shares,))
    with pool:
        try:
            for done in as_completed([pool.submit(compute, work, _say) for work in works]):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(shares: Any) -> None:
    cores = shares.get()
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    keep_programs()


def _say(line: str) -> None:
    print(line, flush=True)


def keep_programs() -> None:
    """Compiled programs are kept on disk, as the commands of ``jaxsteer`` keep them."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def open_study(study: Study) -> None:
    """Make the directory, or refuse one whose cells were computed with other settings (``UserError``)."""
    path, wanted = study.out / "settings.json", files.plain(study.settings())
    if path.is_file() and (known := json.loads(path.read_text())) != wanted:
        differing = [k for k in {**known, **wanted} if known.get(k) != wanted.get(k)]
        changes = "; ".join(f"{k}: {known.get(k)!r} there, {wanted.get(k)!r} now" for k in differing)
        raise UserError(f"{study.out} holds cells of other settings ({changes}): give another --out, or delete it")
    study.out.mkdir(parents=True, exist_ok=True)
    files.write_json(path, wanted)


def in_order(
    rows: Sequence[dict[str, Any]], works: Sequence[Work], order: Sequence[tuple[str, Any]]
) -> list[dict[str, Any]]:
    """The rows by model and persona, which come as in ``works``, and method with its value, as in ``order``."""
    columns = [[work.model for work in works], [load_persona(work.persona).name for work in works], order]
    models, personas, methods = ({x: i for i, x in enumerate(dict.fromkeys(column))} for column in columns)
    return sorted(rows, key=lambda r: (models[r["model"]], personas[r["persona"]], methods[r["method"], r["value"]]))


def document(
    experiment: str, title: str, study: Study, rows: list[dict[str, Any]], verdicts: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """What results.json holds."""
    return {
        "format": FORMAT,
        "experiment": experiment,
        "title": title,
        "settings": study.settings(),
        "models": list(dict.fromkeys(row["model"] for row in rows)),
        "personas": list(dict.fromkeys(row["persona"] for row in rows)),
        "methods": list(dict.fromkeys(row["method"] for row in rows)),
        "rows": rows,
        "verdicts": verdicts,
        "environment": environment(load_once(rows[-1]["model"])) if rows else {},
        **more,
    }


def finish(
    experiment: str,
    title: str,
    study: Study,
    works: Sequence[Work],
    order: Sequence[tuple[str, Any]],
    args: argparse.Namespace,
    judge: Callable[[Sequence[Row]], list[dict[str, Any]]],
    command: str,
    complete: Callable[[list[Row]], list[Row]] = list,
    columns: Columns = COLUMNS,
) -> int:
    """Compute all works, write tables as they grow, and print the last."""
    try:
        open_study(study)
        started, rows, text = time.perf_counter(), [], ""
        title += f" ({len(study.seeds)} seeds, {study.search['steps']} steps{', quick' if args.quick else ''})"
        missing = sum(not work.path(method).is_file() for work in works for method in work.methods)
        print(f"{sum(len(work.methods) for work in works)} cells, {missing} of them to compute", flush=True)
        for done in compute_all(works, jobs=args.jobs):
            rows += done
            ordered = in_order(complete(rows), works, order)
            found = document(experiment, title, study, ordered, judge(ordered), quick=args.quick, command=command)
            text = write_study(study.out, found, columns)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{text}\n{time.perf_counter() - started:.0f} s; {study.out}/results.json, table.md, table.csv, table.tex")
    return 0
