"""The main table of the study (arXiv 2601.02896): models x personas x methods, with intervals.

python -m experiments.main_table [--out runs/main_table] [--jobs 4] [--quick]
python -m experiments.main_table --model ID_OR_PATH --sae ID_OR_PATH --personas sycophancy --out runs/mine

Every search scores as many candidates per seed, in the same contexts and slot, with the same tokens. Its prompt is
chosen on validation questions among the frontier's; what the objective alone ranks first stands beside it. Nothing
looks at test questions before the end. One file per cell under ``--out``; what exists is not computed again, so that an
interrupted run goes on. Writes results.json, table.md, table.csv, table.tex, and runs/ for ``jaxsteer report``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from experiments.running import add_arguments, finish, sae_of, table_of
from experiments.tables import percent
from jaxsteer import organisms
from jaxsteer.study.baselines import BASELINES
from jaxsteer.study.cells import PROMPT_LENGTH, Block, Method, Table
from jaxsteer.study.table_row import TableRow

RESGA, SAEGA = "RESGA, decision", "SAEGA, decision"
CONTROLS = ("zero-shot", "random prompt", "random direction", "random search, random direction")
"""What RESGA and SAEGA have to beat."""
MARGIN, RATIO, MOST = 0.10, 3.0, 7 / 9
"""Within so much of the oracle's rate, at so many times the perplexity of ordinary sentences, in so many cells."""
EPO = {"top_k": 16}
"""Tokens per position that gradients propose: about the share of the vocabulary that is published for large models."""
TRAINED = {"contexts": 8, "steps": 200}
"""Of prefix tuning, whose steps are gradients and not candidates."""


def methods_of(sae: str | None, endpoint: str | None, known_cue: bool) -> list[Method]:
    """The rows of the table for one model."""
    decision: dict[str, Any] = {"read_position": "decision"}
    resga = decision | EPO
    random = {**decision, "algorithm": "mutation", "replace": PROMPT_LENGTH}
    skipped = {name for name, there in {"oracle cue": known_cue, "ProTeGi": bool(endpoint)}.items() if not there}
    rows = [
        Method(name=name, about=(find.__doc__ or "").strip()) for name, find in BASELINES.items() if name not in skipped
    ]
    rows += [
        Method(name=RESGA, about="Direction and objective at the token that decides.", options=resga, keep=True),
        Method(
            name="RESGA, matched",
            about="Direction and objective at the end of the answer.",
            options={"read_position": "matched", **EPO},
            keep=True,
        ),
        Method(
            name="RESGA, published",
            about="Direction at the end of the answer, objective at the end of the prompt.",
            options={"read_position": "published", **EPO},
            keep=True,
        ),
    ]
    if sae is not None:
        rows += [
            Method(
                name=f"SAEGA, {position}",
                about=about,
                options={"method": "saega", "read_position": position, **EPO},
                keep=True,
            )
            for position, about in (
                ("decision", "Latents and objective at the token that decides."),
                ("published", "Latents of the end of the answer, objective at the end of the prompt."),
            )
        ]
    return [
        *rows,
        Method(
            name="random direction",
            about="RESGA along a random direction of the same norm at the same site, another one per seed.",
            options=resga,
            random=True,
        ),
        Method(
            name="random updates",
            about="RESGA's objective and evolution with random tokens instead of the gradient's.",
            options={**decision, "algorithm": "mutation"},
        ),
        Method(name="random search", about="As many random prompts, ranked by RESGA's objective.", options=random),
        Method(
            name="random search, random direction",
            about="As many random prompts, ranked along a random direction.",
            options=random,
            random=True,
        ),
        Method(
            name="prefix tuning",
            about=f"{PROMPT_LENGTH} soft embeddings trained on the other answer: no text, but a bound.",
            options={"algorithm": "soft", "objective": "answer", **TRAINED},
        ),
        Method(
            name="GCG",
            about="Greedy coordinate gradient on the other answer's log-probability.",
            options={"algorithm": "gcg", "objective": "answer", "fluency": "loose", **EPO},
        ),
    ]


def blocks_of(table: Table, model: str, sae: str | None, persona: str) -> list[Block]:
    """All cells of one model and persona, in parts that share no direction."""
    first: list[Method] = []
    rest: list[Method] = []
    for method in methods_of(sae, table.endpoint, persona in organisms.BEHAVIOURS):
        options = method.options or {}
        decides = options.get("read_position") == "decision" and options.get("method") != "saega"
        (first if decides else rest).append(method)
    parts = (first, rest)
    return [Block(table=table, model=model, sae=sae, persona=persona, methods=tuple(part)) for part in parts]


Cells = dict[tuple[str, str], dict[str, TableRow | None]]
"""By model and persona the row of each method; None for one that is missing."""


def verdicts(rows: Sequence[TableRow], missing: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """What the table has to show, cell by cell and in sum; of ``missing`` cells, and of what needs them, nothing."""
    cells: Cells = {}
    for row in rows:
        cells.setdefault((row.model, row.persona), {})[row.method] = row
    for cell in missing:
        cells.setdefault((cell["model"], cell["persona"]), {})[cell["method"]] = None
    found = []
    for method in (RESGA, SAEGA):
        mine = [verdict(*key, method, of) for key, of in cells.items() if method in of]
        if not mine:
            continue
        found.append(_sum(method, mine, "beats", f"beats {'; '.join(CONTROLS)} with disjoint 95 % intervals"))
        known = [v for v in mine if "oracle cue" in cells[v["model"], v["persona"]]]
        if known:
            found.append(_sum(method, known, "near", f"comes within {100 * MARGIN:.0f} points of the oracle cue"))
        found.append(_sum(method, mine, "fluent", f"has a prompt of at most {RATIO:g} times ordinary perplexity"))
        found += mine
    return found


def verdict(model: str, persona: str, method: str, of: dict[str, TableRow | None]) -> dict[str, Any]:
    """One cell against its controls, its oracle and its own text; no verdict where one of these is missing."""
    row, oracle = of[method], of.get("oracle cue")
    rows = {name: of.get(name) for name in CONTROLS}
    absent = [name for name, other in {method: row, **rows}.items() if other is None]
    absent += ["oracle cue"] * ("oracle cue" in of and oracle is None)
    found: dict[str, Any] = {"claim": "cell", "model": model, "persona": persona, "method": method, "missing": absent}
    if row is None or absent:
        text = f"{model} {persona}, {method}: no verdict, because {'; '.join(absent)} is missing"
        return found | dict.fromkeys(("holds", "beats", "near", "fluent")) | {"text": text}
    lost = [name for name, other in rows.items() if other is not None and not row.ci95[1] < other.ci95[0]]
    near = None if oracle is None else row.rate <= oracle.rate + MARGIN
    ratio = row.selected and row.selected.perplexity_ratio
    fluent = ratio is not None and ratio <= RATIO
    beats = not lost
    text = f"{model} {persona}, {method}: {percent(row.rate)} %, "
    text += "beats all controls" if beats else f"does not beat {'; '.join(lost)}"
    if oracle is not None:
        text += f"; {'within' if near else 'NOT within'} {100 * MARGIN:.0f} points of the oracle's "
        text += f"{percent(oracle.rate)} %"
    text += f"; perplexity ratio {'-' if ratio is None else f'{ratio:.1f}'}"
    return found | {
        "holds": beats and near is not False and fluent,
        "beats": beats,
        "near": near,
        "fluent": fluent,
        "text": text,
    }


def _sum(method: str, cells: Sequence[dict[str, Any]], name: str, claim: str) -> dict[str, Any]:
    count, absent = sum(bool(cell[name]) for cell in cells), sum(bool(cell["missing"]) for cell in cells)
    holds = None if absent else count >= MOST * len(cells)
    text = f"**{method} {claim} in {count} of {len(cells)} cells** (wanted: {-(-7 * len(cells) // 9)})"
    text += f"; no verdict, because {absent} of them cannot be judged yet" * bool(absent)
    return {"claim": name, "model": None, "persona": None, "method": method, "holds": holds, "text": text}


def main(argv: Sequence[str] | None = None) -> int:
    """Compute the missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "runs/main_table")
    parser.add_argument("--model", nargs="+", default=["organism:llama", "organism:qwen2", "organism:gemma3"])
    parser.add_argument("--sae", nargs="+", default=[], help="one per model, or none (default: an organism's own)")
    parser.add_argument("--personas", nargs="+", default=list(organisms.BEHAVIOURS), help="names or data sets")
    parser.add_argument("--endpoint", help="URL of an OpenAI-compatible endpoint: adds ProTeGi")
    args = parser.parse_args(argv)
    if args.sae and len(args.sae) != len(args.model):
        parser.error(f"--sae names {len(args.sae)} SAEs for {len(args.model)} models: give one per model, or none")
    table = table_of(args, endpoint=args.endpoint)
    blocks = [
        block
        for number, model in enumerate(args.model)
        for persona in args.personas
        for block in blocks_of(table, model, sae_of(model, args.sae, number), persona)
    ]
    command = "python -m experiments.main_table " + shlex.join(sys.argv[1:] if argv is None else argv)
    order = [(method.name, None) for method in methods_of("any", args.endpoint, True)]
    return finish("main_table", "Main table", table, blocks, order, args, verdicts, command.strip())


if __name__ == "__main__":
    sys.exit(main())
