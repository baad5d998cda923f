"""Which search algorithm, on the shipped organism? Target against candidates and seconds, at one fluency weight.

python experiments/algorithms.py [--out runs/algorithms] [--algorithms epo gcg ...] [--personas ...] [--seeds 0 1 2]
                                 [--budget 7680] [--quick] [--json FILE]

Every algorithm scores ``--budget`` prompts (and takes the gradients that belong to that many) of the same objective,
in the same contexts, with the same token mask. It is judged by the value ``f - weight * x`` of the best prompt that it
has scored so far: f the objective in standard deviations over random prompts, x the cross-entropy in nats per token.
What does not re-tokenise does not count in the end. ``random`` scores random prompts. ``soft`` is no prompt at all: the
table shows the objective of its embeddings, which no prompt of the length is likely to reach.

One file per cell under ``--out``; what exists is not computed again. Seconds leave compilation out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsteer.checkpoints.loading import load
from jaxsteer.prompt_search import (
    FLUENCY,
    Fluency,
    Hooks,
    Search,
    make_problem,
    make_search,
    run_search,
    score,
    standardise,
)
from jaxsteer.prompt_search.population import random_ids
from jaxsteer.prompts import prompt_text, retokenises_many
from jaxsteer.runs import files
from jaxsteer.study import SearchOptions, choose_objective, persona_setting, task_of
from jaxsteer.study.outcome import environment
from jaxsteer.study.setting import Setting

WEIGHT = FLUENCY["medium"].low
"""Nats per token against standard deviations, the weight of slot 0 of the default preset."""
ALONE = Fluency(low=WEIGHT, high=WEIGHT, restart=WEIGHT, spread=1.0)
"""For algorithms whose slots do not compete: all of them at the weight that they are judged by."""
ALGORITHMS: dict[str, dict[str, Any]] = {
    "epo": {"population": 8, "children": 16, "top_k": 128, "restart_every": 25},
    "gcg": {"search_width": 128, "top_k": 128},
    "gcg-buffer": {"search_width": 128, "top_k": 128, "buffer": 8},
    "mutation": {"population": 8, "children": 16, "restart_every": 25},
    "pez": {"population": 8},
    "gbda": {"population": 4, "samples": 8},
    "soft": {"population": 4},
}
"""Sizes: the default preset of ``jaxsteer search`` and, for the others, as many candidates where they have a choice."""
LOOKS = 24
SHARES = (0.125, 0.25, 0.5)
"""Of the budget: where the table looks at the curves."""
THRESHOLD = 0.9
"""Share of the best value of a persona and seed, counted from that of a random prompt, that "reached" means."""


def setting_of(args: argparse.Namespace, persona: str) -> tuple[Setting, Any, Any]:
    """Contexts, task and standardised objective of one persona: those of ``jaxsteer search --persona``."""
    options = SearchOptions.of(out="unused", model=args.model, persona=persona, probe=240).resolved()
    setting = persona_setting(options)
    raw = choose_objective(setting, options.objective, seed=options.algorithm.seed).objective
    task = task_of(setting, raw)
    return setting, task, standardise(setting.model.params, task, raw)[0]


def search_of(name: str) -> Search:
    """The algorithm with the sizes of this experiment."""
    return make_search(name.partition("-")[0], ALGORITHMS[name])


def run(setting: Setting, task: Any, objective: Any, name: str, seeds: list[int], budget: int) -> dict[str, Any]:
    """What one algorithm reached after so many candidates and seconds, seed by seed; the seeds run in one program."""
    search, together = search_of(name), name in ("epo", "mutation")
    slots = {"pez": 8, "gbda": 4, "soft": 4, "gcg": 1}.get(name, 8)
    fluency = FLUENCY["medium"] if together else ALONE
    problems = [make_problem(objective, slots, fluency=fluency, seed=seed) for seed in seeds]
    steps = max(1, budget // search.candidates)
    curves: list[list[dict[str, float]]] = [[] for _ in seeds]

    def look(progress: Any) -> None:
        for i, curve in enumerate(curves):
            here = 0 if together else int(np.argmin(progress.loss[i]))
            value, x = -float(progress.loss[i, here]), float(progress.cross_entropy[i, here])
            if name == "soft":
                value, x = float(progress.best_target[i]), 0.0
            row = {"value": value, "target": value + WEIGHT * x, "cross_entropy": x}
            spent = {"candidates": progress.candidates / len(seeds), "seconds": progress.seconds / len(seeds)}
            curve.append(spent | row)

    tokenizer = setting.model.tokenizer
    result = run_search(
        setting.model.params,
        task,
        problems,
        search,
        steps=steps,
        hooks=Hooks(
            valid=lambda ids: retokenises_many(tokenizer, setting.slots, ids),
            callback=look,
            steps_per_call=max(1, steps // LOOKS),
        ),
    )
    for i, curve in enumerate(curves):
        good = [entry for entry in result.frontier([i]) if entry.retokenises]
        if name != "soft" and good:
            best = max(good, key=lambda entry: entry.target - WEIGHT * entry.cross_entropy)
            end = {"target": best.target, "cross_entropy": best.cross_entropy}
            end["value"] = best.target - WEIGHT * best.cross_entropy
            end["text"] = prompt_text(tokenizer, best.ids)
            curve[:] = [row if row["value"] < end["value"] else row | end for row in curve]
            curve[-1] |= end
    return {"curves": curves, "compile_s": result.compile_s, "gradients": steps * gradients(name)}


def gradients(name: str) -> int:
    """Prompts whose gradient one step takes."""
    return {"gcg": 1, "gcg-buffer": 1, "mutation": 0, "gbda": 32, "soft": 4}.get(name, 8)


def run_random(setting: Setting, task: Any, objective: Any, name: str, seeds: list[int], budget: int) -> dict[str, Any]:
    """Random prompts, as many as the others score."""
    curves = [random_curve(setting, task, objective, seed, budget) for seed in seeds]
    return {"curves": curves, "compile_s": 0.0, "gradients": 0}


def random_curve(setting: Setting, task: Any, objective: Any, seed: int, budget: int) -> list[dict[str, float]]:
    """The best of random prompts."""
    key, rows = jax.random.key(seed), max(1, budget // LOOKS)
    scored = jax.jit(score)
    jax.block_until_ready(scored(setting.model.params, task, objective, random_ids(key, task, rows)))
    curve, started, best = [], time.perf_counter(), {"value": -np.inf, "target": 0.0, "cross_entropy": 0.0}
    for look in range(LOOKS):
        ids = random_ids(jax.random.fold_in(key, look), task, rows)
        f, x = map(np.asarray, scored(setting.model.params, task, objective, ids))
        good = retokenises_many(setting.model.tokenizer, setting.slots, np.asarray(ids))
        value = np.where(good, f - WEIGHT * x, -np.inf)
        at = int(np.argmax(value))
        if value[at] > best["value"]:
            best = {"value": float(value[at]), "target": float(f[at]), "cross_entropy": float(x[at])}
        curve.append({"candidates": (look + 1) * rows, "seconds": time.perf_counter() - started, **best})
    return curve


def best_so_far(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    """The curve with every look replaced by the best of it and all before."""
    out: list[dict[str, float]] = []
    for row in curve:
        best = row if not out or row["value"] > out[-1]["value"] else out[-1]
        out.append({**best, "candidates": row["candidates"], "seconds": row["seconds"]})
    return out


def value_at(curve: list[dict[str, float]], share: float) -> float:
    """The value once that share of the budget was spent: that of the last look before."""
    spent = [row for row in curve if row["candidates"] <= 1.001 * share * curve[-1]["candidates"]]
    return (spent or curve)[-1 if spent else 0]["value"]


def mean(values: Iterable[float]) -> float | None:
    """Of no values: none."""
    kept = list(values)
    return float(np.mean(kept)) if kept else None


def table(cells: dict[tuple[str, str], dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Per algorithm, means over personas and seeds."""
    out = []
    curves = {
        (persona, name, seed): best_so_far(curve)
        for (persona, name), cell in cells.items()
        for seed, curve in enumerate(cell["curves"])
    }
    groups = sorted({(persona, seed) for persona, _, seed in curves})
    goal = {}
    for persona, seed in groups:
        ends = [c[-1]["value"] for (p, name, s), c in curves.items() if (p, s) == (persona, seed) and name != "soft"]
        base = curves[persona, "random", seed][0]["value"] if (persona, "random", seed) in curves else min(ends)
        goal[persona, seed] = base + THRESHOLD * (max(ends) - base)
    for name in names:
        mine = [(group, curves[group[0], name, group[1]]) for group in groups if (group[0], name, group[1]) in curves]
        if not mine:
            continue
        reached = [next((row for row in curve if row["value"] >= goal[group]), None) for group, curve in mine]
        hits = [row for row in reached if row is not None]
        early = {share: [value_at(curve, share) for _, curve in mine] for share in SHARES}
        ends = [curve[-1] for _, curve in mine]
        of = [cells[group[0], name] for group, _ in mine]
        out.append(
            {
                "algorithm": name,
                "runs": len(mine),
                "value": mean(row["value"] for row in ends),
                "target": mean(row["target"] for row in ends),
                "cross_entropy": mean(row["cross_entropy"] for row in ends),
                **{f"value at {share:.3g}": mean(values) for share, values in early.items()},
                "reached": len(hits),
                "candidates_to_reach": mean(row["candidates"] for row in hits),
                "seconds_to_reach": mean(row["seconds"] for row in hits),
                "candidates": mean(row["candidates"] for row in ends),
                "gradients": mean(cell["gradients"] for cell in of),
                "seconds": mean(row["seconds"] for row in ends),
                "compile_s": mean(cell["compile_s"] for cell in of),
            }
        )
    return out


def show(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    names = list(rows[0])

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
        return "-" if value is None else str(value)

    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(cell(row[n]) for n in names) + " |" for row in rows)])


def main() -> None:
    """Run the missing cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--model", default="organism:llama")
    parser.add_argument("--algorithms", nargs="+", default=[*ALGORITHMS, "random"])
    parser.add_argument("--personas", nargs="+", default=["sycophancy", "hallucination", "myopic"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=7680)
    parser.add_argument("--quick", action="store_true", help="one persona, one seed, an eighth of the budget")
    parser.add_argument("--json", type=Path, help="write table, cells and environment here")
    args = parser.parse_args()
    if args.quick:
        args.personas, args.seeds, args.budget = args.personas[:1], args.seeds[:1], args.budget // 8
    args.out.mkdir(parents=True, exist_ok=True)
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    model = None
    for persona in args.personas:
        made = None
        for name in args.algorithms:
            path = args.out / f"{persona}_{name}_b{args.budget}_s{'-'.join(map(str, args.seeds))}.json"
            if not path.is_file():
                made = made or setting_of(args, persona)
                one = run_random if name == "random" else run
                files.write_json(path, one(*made, name, args.seeds, args.budget))
            cells[persona, name] = json.loads(path.read_text())
            ends = [best_so_far(curve)[-1] for curve in cells[persona, name]["curves"]]
            for seed, end in zip(args.seeds, ends, strict=True):
                text = end.get("text", "")
                print(
                    f"{persona} {name} seed {seed}: {end['value']:.3f} in {end['seconds']:.1f} s {text}",
                    file=sys.stderr,
                )
        if made:
            model = made[0].model
    rows = table(cells, args.algorithms)
    print(show(rows))
    if args.json:
        files.write_json(
            args.json,
            {
                "weight": WEIGHT,
                "budget": args.budget,
                "sizes": {name: ALGORITHMS.get(name, {}) for name in args.algorithms},
                "table": rows,
                "environment": environment(model or load(args.model)),
            },
        )


if __name__ == "__main__":
    main()
