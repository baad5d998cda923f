"""What predicts that a steering vector works? Many contrasts on one model, and the rank correlation of each predictor.

python -m experiments.steerability --model FILE.gguf [--out runs/steerability] [--contrasts 24]

A contrast is a role that the model plays: it answers 40 questions with the role as its system message and without it.
24 of them make a difference of means, read where the reply begins; 8 held-out ones its predictors (agreement of the
pairs' differences, d', AUROC, cosine of two halves, length in mean norms of the stream), and 8 more its steerability:
the slope of the role's log-odds over strength, at strengths where neutral text diverges by at most --kl. A random
vector at the same divergence stands beside every contrast. On organism:persona the roles are those of its world. What
is there already under --out is not computed again. Writes contrasts.jsonl, results.json, table.md and predictors.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jaxsteer
from jaxsteer.cli import keep_programs
from jaxsteer.display import write_figure
from jaxsteer.errors import UserError
from jaxsteer.evals.calibration import calibrate
from jaxsteer.evals.persona_gates import is_persona_organism
from jaxsteer.evals.steerability import steer_each, steerability
from jaxsteer.files import append_text, make_directory, read_log, write_text
from jaxsteer.models.model import Model
from jaxsteer.models.sites import resid_site
from jaxsteer.organisms import persona_world
from jaxsteer.personas import Persona, load_persona
from jaxsteer.runs.bars import progress_bar
from jaxsteer.runs.files import document
from jaxsteer.statistics import spearman, spearman_interval
from jaxsteer.study.outcome import environment
from jaxsteer.study.vector_methods import Method, VectorOptions, diagnosed, make_vectors

TRAIN, HELD_OUT, TEST = 24, 8, 8
"""Questions of each part."""
STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)
PREDICTORS = ("agreement", "separability", "auroc", "split_half_cosine", "length")
OUTCOMES = {"slope": "slope towards the role, nats", "anti": "share of questions that move against it"}
ROLES = (
    "a pirate", "a court jester", "a ghost who haunts an old house", "an accountant", "a poet", "a robot", "a wizard",
    "a lawyer", "a five-year-old child", "a grandmother", "a chef", "a sports coach", "a scientist", "a detective",
    "a medieval knight", "a vampire", "a politician", "a farmer", "a philosopher", "a comedian", "a soldier",
    "a school teacher", "a doctor", "a travel guide", "a news reporter", "an angry customer",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="a chat model: organism:persona, a directory, .gguf file or hub id"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/steerability"))
    parser.add_argument("--contrasts", type=int, default=24, help="how many roles")
    parser.add_argument("--site", help="where vectors are read and added (default: the stream in the middle)")
    parser.add_argument("--kl", type=float, default=0.1, help="divergence at strength 1, nats per neutral token")
    args = parser.parse_args(argv)
    keep_programs()
    try:
        model = jaxsteer.load(args.model)
        args.site = args.site or resid_site(model.config.n_layers // 2)
        rows = measured(model, args)
        write(model, rows, args)
    except KeyboardInterrupt:
        print(f"Interrupted. What is done stands in {args.out}; the same command goes on.", file=sys.stderr)
        return 130
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print((args.out / "table.md").read_text(encoding="utf-8"))
    return 0


def contrasts_of(model: Model, n: int) -> list[tuple[str, str, tuple[str, ...]]]:
    """(name, system message, questions) of every contrast."""
    if is_persona_organism(model):
        asked = [q.format(topic) for topic in persona_world.CALM_TOPICS for q in persona_world.TOPIC_QUESTIONS]
        roles = [(role, persona_world.role_sentence(role)) for role in persona_world.ASSISTANTNESS]
    else:
        asked = list(load_persona("characters/pirate").ask)
        roles = [(role, f"You are {role}. Stay in character in every answer.") for role in ROLES]
    if n > len(roles):
        raise UserError(f"--contrasts {n}: there are {len(roles)} roles for {model.name}")
    chosen = np.random.default_rng(0).permutation(len(asked))[: TRAIN + HELD_OUT + TEST]
    return [(name, message, tuple(asked[i] for i in chosen)) for name, message in roles[:n]]


def measured(model: Model, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each contrast, kept as they come."""
    make_directory(args.out)
    file = args.out / "contrasts.jsonl"
    asked = {"model": model.fingerprint, "site": args.site, "kl": args.kl}
    rows, cut = read_log(file) if file.is_file() else ([], False)
    if any({name: row.get(name) for name in asked} != asked for row in rows):
        raise UserError(f"{file} is of another model, site or divergence: give another --out")
    if cut:
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    done = {row["contrast"] for row in rows}
    wanted = contrasts_of(model, args.contrasts)
    with progress_bar("contrasts", len(wanted), unit="contrast") as advance:
        for number, (name, message, questions) in enumerate(wanted):
            if name not in done:
                row = asked | one(model, name, message, questions, args)
                append_text(file, json.dumps(row) + "\n")
                rows.append(row)
            advance(number + 1, contrast=name)
    return rows


def one(model: Model, name: str, message: str, questions: tuple[str, ...], args: argparse.Namespace) -> dict[str, Any]:
    """Predictors and steerability of a role."""
    persona = Persona.from_replies(model, message, questions, name=name, behaviour=name)
    items = persona.items
    if len(items) < TRAIN + HELD_OUT + 4:
        raise UserError(f"{name}: only {len(items)} of {len(questions)} questions have two different replies")
    train, held_out, test = items[:TRAIN], items[TRAIN : TRAIN + HELD_OUT], items[TRAIN + HELD_OUT :]
    options = VectorOptions(read_position="role")
    found: dict[str, Any] = {"contrast": name, "questions": len(test)}
    methods: tuple[Method, ...] = ("mean difference", "random")
    for method in methods:
        made = make_vectors(model, persona, train, method, [args.site], options=options)
        (vector,) = diagnosed(model, persona, held_out, made, options)
        facts = json.loads(vector.metadata["diagnostics"])[args.site]
        away, towards = (c.coefficient for c in calibrate(model, vector, args.kl, signs=(1, -1)))
        edits = [vector.edits(coefficient=s * (away if s > 0 else -towards)) for s in STRENGTHS]
        (margins,) = steer_each(model, test, edits)
        moved = steerability(margins, STRENGTHS)
        told = {key: facts.get(key) for key in PREDICTORS}
        told |= {"length": vector.norm(args.site) / vector.stream_norm(args.site), "coefficient": away}
        told |= {"slope": -moved.slope.value, "anti": moved.anti, "spread": moved.spread, "monotone": moved.monotone}
        found[method] = told
    return found


def write(model: Model, rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """results.json, table.md and the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(PREDICTORS), 3), layout="constrained")
    axes = figure.subplots(1, len(PREDICTORS), sharey=True)
    table, correlations = [], {}
    for axis, predictor in zip(axes, PREDICTORS, strict=True):
        x = np.asarray([row["mean difference"][predictor] for row in rows], float)
        cells = [predictor]
        for outcome in OUTCOMES:
            y = np.asarray([row["mean difference"][outcome] for row in rows], float)
            some = np.isfinite(x) & np.isfinite(y)
            r = spearman(x[some], y[some])
            low, high = spearman_interval(r, int(some.sum()))
            correlations[f"{predictor}, {outcome}"] = {"spearman": r, "ci95": [low, high], "n": int(some.sum())}
            cells.append(f"{r:.2f} ({low:.2f} to {high:.2f})")
            if outcome == "slope":
                axis.plot(x, y, "o", markersize=4)
                axis.set(xlabel=predictor, title=f"rank correlation {r:.2f}")
        table.append(cells)
    axes[0].set_ylabel(OUTCOMES["slope"])
    write_figure(args.out / "predictors.png", figure)
    head = ["predictor", *OUTCOMES.values()]
    slopes = {m: [row[m]["slope"] for row in rows] for m in ("mean difference", "random")}
    lines = [f"# Predictors of steerability on {model.name}: {len(rows)} contrasts at {args.site}", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in table]
    lines += [
        "",
        f"Rank correlations over contrasts, with 95 % intervals. At {args.kl:g} nats of divergence on neutral text.",
    ]
    lines += [
        f"Slopes towards the role: median {np.median(slopes['mean difference']):.2f} nats per strength "
        f"({min(slopes['mean difference']):.2f} to {max(slopes['mean difference']):.2f}); of random vectors "
        f"{np.median(slopes['random']):.2f} ({min(slopes['random']):.2f} to {max(slopes['random']):.2f})."
    ]
    write_text(args.out / "table.md", "\n".join(lines) + "\n")
    told = {"model": model.name, "site": args.site, "kl": args.kl, "correlations": correlations, "rows": list(rows)}
    write_text(args.out / "results.json", document({**told, "environment": environment(model)}))


if __name__ == "__main__":
    sys.exit(main())
