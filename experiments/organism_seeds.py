"""Do RESGA and SAEGA work on the shipped organism, and against which controls? Three personas, five seeds, one table.

python experiments/organism_seeds.py [--method resga|saega] [--out runs/seeds] [--seeds 0 1 2 3 4] [--personas ...]
                                     [--variants ...]

Variants, all judged by the prompt that their own objective ranks first:

* ``decision``, ``matched``, ``published``: direction (or SAE signature) and objective read at that position.
* ``random_direction``, ``random_latents``: ``decision`` with a random direction of the same norm, or with as many other
  latents of the same weights.
* ``latents_K`` (saega): ``decision`` with the K latents of the largest contrast.
* ``random_search``: as many random prompts as ``decision`` scores candidates, the best by its objective.
* ``random_by_behaviour``: the same prompts, the best by behaviour on validation questions: a solver of its own.

Beside them the oracle cue (the generator's strongest sentence) and, for ``decision``, the validation-selected prompt.
Results on this 1M-parameter organism say nothing about large models (docs/organism.md). Every cell is one file under
``--out``; what exists is not computed again. Writes results.json, table.md and table.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsteer import organisms
from jaxsteer.checkpoints.loading import load
from jaxsteer.evals.choice import choice_eval, distinct, rate
from jaxsteer.evals.organism_recovery import trigger_words
from jaxsteer.evals.rates import Rate
from jaxsteer.models.model import Model
from jaxsteer.objectives import Objective, Projection, as_pytree, needs
from jaxsteer.personas import (
    load_direction,
    load_signature,
    random_direction,
    random_signature,
    search_conversations,
)
from jaxsteer.prompt_search import make_task, score, standardise
from jaxsteer.prompt_search.population import random_ids
from jaxsteer.prompts import build_slots, prompt_text, retokenises_many
from jaxsteer.report import read_run
from jaxsteer.runs import files
from jaxsteer.sae import latents_objective
from jaxsteer.study import Ascent, SearchOptions, named_objective, persona_setting, restarts, run, search
from jaxsteer.study.outcome import finals, select
from jaxsteer.study.results import SearchRun
from jaxsteer.study.setting import PersonaSetting, context_items

POSITIONS = ("decision", "matched", "published")
LATENTS = (1, 4, 16, 64)
"""Sizes of signatures for the ablation."""
VARIANTS = {
    "resga": (*POSITIONS, "random_direction", "random_search", "random_by_behaviour"),
    "saega": (*POSITIONS, *(f"latents_{k}" for k in LATENTS), "random_latents", "random_search"),
}
DECISION_RATE, MATCHED_RATE, ORACLE_MARGIN = 0.15, 0.30, 0.05
"""Targets of RESGA: decision at most 15 % and within 5 points of the oracle, matched at most 30 %."""
A_RATE = (0.35, 0.65)
SAEGA_RATE, SAEGA_A_RATE = 0.30, (0.30, 0.70)
"""Targets of SAEGA: decision at most 30 %."""


STEPS = 40
"""Steps of every search: fewer than the default of ``jaxsteer search``, because 45 of them make the table."""


def options_of(args: argparse.Namespace, persona: str, variant: str, seed: int) -> SearchOptions:
    """The options of one search: the defaults of ``jaxsteer search`` but for ``STEPS``."""
    position = variant if variant in POSITIONS else "decision"
    sized = variant.startswith("latents_")
    return SearchOptions.of(
        out=args.out / f"{persona}_{variant if sized else position}_s{seed}",
        model=args.model,
        method=args.method,
        sae=args.sae if args.method == "saega" else None,
        latents=int(variant.removeprefix("latents_")) if sized else None,
        persona=persona,
        read_position=position,
        seed=seed,
        steps=STEPS,
        probe=240,
        report_prompts=4,
        quiet=True,
    )


def from_run(run: SearchRun) -> dict[str, Any]:
    """The rows of a finished search: first by objective, first by validation, oracle, baseline."""
    first, by_validation = (run.prompts[select(run.prompts, by)].to_json() for by in ("objective", "validation"))
    return {
        **{name: first[name] for name in ("text", "test", "target", "cross_entropy")},
        "validation_selected": {name: by_validation[name] for name in ("text", "test")},
        "site": run.site,
        "probe_correlation": run.probe_correlation,
        "baseline": run.baseline.test.to_json(),
        "oracle": run.controls["oracle"].test.to_json(),
        "timing": run.timing.to_json(),
    }


def judged(setting: PersonaSetting, text: str) -> dict[str, Any]:
    """The test rate of one prompt text against the baseline."""
    baseline, result = choice_eval(
        setting.model, distinct(setting.splits.test), ["", text], placement=setting.placement
    )
    return rate(result, baseline).to_json()


def with_random(options: SearchOptions, setting: PersonaSetting, run_dir: Path, seed: int) -> dict[str, Any]:
    """The search of a finished decision run once more, at the same site: along a random direction of equal norm, or on
    as many random latents with the same weights.
    """
    raw, site = objective_of(setting, run_dir, random=seed)
    ascent = Ascent(objective=raw, populations=restarts(options.algorithm))
    (found,) = search(setting, [ascent], options.algorithm, options.run)
    best = next(prompt for prompt in finals(setting, found.objective, found.result) if prompt.retokenises)
    return {"text": best.text, "test": judged(setting, best.text), "target": best.target, "site": site}


def objective_of(setting: PersonaSetting, run_dir: Path, random: int | None = None) -> tuple[Objective, str]:
    """The objective of a finished decision run and its site; with ``random``, the control of that seed."""
    found = read_run(run_dir).result
    if setting.sae is not None:
        signature = load_signature(run_dir / files.SIGNATURE)
        if random is not None:
            signature = random_signature(signature, random)
        return latents_objective(setting.sae, signature.indices, signature.weights, signature.site), signature.site
    direction, site = load_direction(run_dir / files.DIRECTION, model=setting.model), found.site
    delta = found.sign * direction.delta[site]
    if random is not None:
        delta = random_direction(direction, random).delta[site]
    return Projection(delta=jnp.asarray(delta), site=site), site


def draw(setting: PersonaSetting, task: Any, count: int, seed: int) -> np.ndarray:
    """Random allowed prompts that re-tokenise in place."""
    ids = np.asarray(random_ids(jax.random.key(seed + 1000), task, count))
    return ids[retokenises_many(setting.model.tokenizer, setting.slots, ids)]


def by_objective(setting: PersonaSetting, run_dir: Path, count: int, seed: int) -> dict[str, Any]:
    """The best of ``count`` random prompts by the decision objective of a finished run."""
    model = setting.model
    objective, site = objective_of(setting, run_dir)
    task = make_task(
        model.params, model.config, setting.slots, needs=needs(objective, model.config), allowed=setting.allowed
    )
    standard, _ = standardise(model.params, task, objective, seed=seed)
    ids = draw(setting, task, count, seed)
    f, _ = jax.jit(score)(model.params, task, standard, jnp.asarray(ids))
    best = int(np.argmax(f))
    text = prompt_text(model.tokenizer, ids[best])
    return {"text": text, "test": judged(setting, text), "target": float(f[best]), "site": site}


def by_behaviour(setting: PersonaSetting, count: int, seed: int) -> dict[str, Any]:
    """The best of ``count`` random prompts by the persona's log-odds on validation questions."""
    model, tokenizer = setting.model, setting.model.tokenizer
    items = context_items(setting.splits.validation, setting.scoring.contexts or 1)
    contexts = search_conversations(items, "decision", placement=setting.placement)
    asked, read = [conversation for conversation, _ in contexts], [where for _, where in contexts]
    slots = build_slots(tokenizer, asked, setting.slots.length, read=read)  # type: ignore[arg-type]
    behaviour = named_objective("answer-diff")
    assert behaviour is not None
    objective, slots = behaviour.in_contexts(model, setting.persona, slots, placement=setting.placement)
    task = make_task(model.params, model.config, slots, needs=needs(objective, model.config), allowed=setting.allowed)
    objective = as_pytree(objective)
    ids = draw(setting, task, count, seed)
    f, _ = jax.jit(score)(model.params, task, objective, jnp.asarray(ids))
    best = int(np.argmax(f))
    text = prompt_text(tokenizer, ids[best])
    return {"text": text, "test": judged(setting, text), "target": float(f[best])}


def cell(args: argparse.Namespace, model: Model, persona: str, variant: str, seed: int) -> Any:
    """One cell of the table, from its file if it exists."""
    path = args.out / "cells" / f"{persona}_{variant}_s{seed}.json"
    if path.exists():
        row = json.loads(path.read_text())
        return {**row, "test": Rate.from_json(row["test"]).to_json()}
    options = options_of(args, persona, variant, seed)
    if variant in POSITIONS or variant.startswith("latents_"):
        row = from_run(run(options, model=model))
    else:
        options = options.resolved()
        setting = persona_setting(options, model=model)
        assert options.algorithm.steps
        count = options.algorithm.make_search().candidates * options.algorithm.steps
        if variant in ("random_direction", "random_latents"):
            run(options, model=model)
            aside = args.out / f"{persona}_{variant}_s{seed}"
            aside.mkdir(parents=True, exist_ok=True)
            row = with_random(options.at(aside), setting, Path(options.run.out), seed)
        elif variant == "random_search":
            run(options, model=model)
            row = by_objective(setting, Path(options.run.out), count, seed)
        else:
            row = by_behaviour(setting, count, seed)
    row |= {"persona": persona, "variant": variant, "seed": seed, "triggers": trigger_words(persona, row["text"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, row)
    return row


def verdicts(rows: list[dict[str, Any]], method: str) -> list[str]:
    """The stated targets, and how many seeds met them."""
    if method == "saega":
        return _saega_verdicts(rows)
    lines = []
    for persona in dict.fromkeys(row["persona"] for row in rows):
        for variant in ("decision", "matched"):
            mine = [row for row in rows if row["persona"] == persona and row["variant"] == variant]
            if not mine:
                continue
            if variant == "decision":
                met = [
                    row["test"]["rate"] <= DECISION_RATE
                    and row["test"]["rate"] <= row["oracle"]["rate"] + ORACLE_MARGIN
                    and A_RATE[0] <= row["test"]["a_rate"] <= A_RATE[1]
                    for row in mine
                ]
                wanted = f"rate <= {DECISION_RATE:.0%}, within 5 points of the oracle, A-rate 35 to 65 %"
                probe = ", ".join(f"{row['probe_correlation']:.2f}" for row in mine)
                lines.append(f"{persona} decision: {sum(met)} of {len(met)} seeds ({wanted}); probe {probe}")
            else:
                met = [row["test"]["rate"] <= MATCHED_RATE for row in mine]
                lines.append(f"{persona} matched: {sum(met)} of {len(met)} seeds (rate <= {MATCHED_RATE:.0%})")
    return lines


def _saega_verdicts(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    low, high = SAEGA_A_RATE
    for persona in dict.fromkeys(row["persona"] for row in rows):
        mine = [row for row in rows if row["persona"] == persona and row["variant"] == "decision"]
        met = [row["test"]["rate"] <= SAEGA_RATE and low <= row["test"]["a_rate"] <= high for row in mine]
        probe = ", ".join(f"{row['probe_correlation']:.2f}" for row in mine)
        wanted = f"rate <= {SAEGA_RATE:.0%}, A-rate {low:.0%} to {high:.0%}"
        lines.append(f"{persona} decision: {sum(met)} of {len(met)} seeds ({wanted}); probe {probe}")
    return lines


def table(rows: list[dict[str, Any]], method: str) -> str:
    """Markdown: one line per persona and variant, test rates per seed, then means."""
    seeds = sorted({row["seed"] for row in rows})
    head = ["persona", "variant", *(f"s{seed}" for seed in seeds), "A-rate", "triggers of words", "example"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for persona in dict.fromkeys(row["persona"] for row in rows):
        mine = [row for row in rows if row["persona"] == persona]
        reference = next((row for row in mine if "baseline" in row), None)
        if reference:
            for name in ("baseline", "oracle"):
                value = f"{100 * reference[name]['rate']:.1f}"
                a_rate = f"{100 * reference[name]['a_rate']:.0f}"
                lines.append(f"| {persona} | {name} | {value} |" + " |" * (len(seeds) - 1) + f" {a_rate} | | |")
        for variant in VARIANTS[method]:
            some = {row["seed"]: row for row in mine if row["variant"] == variant}
            if not some:
                continue
            lines.append(_line(persona, variant, seeds, some))
            if variant == "decision":
                by_validation = {seed: row["validation_selected"] for seed, row in some.items()}
                lines.append(_line(persona, "decision, validation-selected", seeds, by_validation))
    return "\n".join(lines)


def _line(persona: str, label: str, seeds: list[int], some: dict[int, dict[str, Any]]) -> str:
    picked = {seed: (row["test"], row["text"]) for seed, row in some.items()}
    rates = [f"{100 * picked[s][0]['rate']:.1f}" if s in picked else "" for s in seeds]
    a_rates = [100 * test["a_rate"] for test, _ in picked.values()]
    words = [(len(trigger_words(persona, text) or ()), len(text.split())) for _, text in picked.values()]
    example = next(iter(picked.values()))[1].strip().replace("|", "\\|")
    return (
        f"| {persona} | {label} | {' | '.join(rates)} | {min(a_rates):.0f}-{max(a_rates):.0f} | "
        f"{sum(hit for hit, _ in words)} of {sum(n for _, n in words)} | `{example}` |"
    )


def main(argv: list[str] | None = None) -> int:
    """Compute the missing cells, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(VARIANTS), default="resga")
    parser.add_argument("--out", type=Path, help="default: runs/seeds, runs/seeds-saega")
    parser.add_argument("--model", default="organism:llama")
    parser.add_argument("--sae", default="organism:llama", help="of saega: the SAE whose latents are searched on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--personas", nargs="+", default=list(organisms.BEHAVIOURS))
    parser.add_argument("--variants", nargs="+", help="default: all of the method's")
    args = parser.parse_args(argv)
    args.variants = args.variants or list(VARIANTS[args.method])
    if unknown := [name for name in args.variants if name not in VARIANTS[args.method]]:
        parser.error(f"{args.method} has no variant {unknown[0]}: it has {', '.join(VARIANTS[args.method])}")
    args.out = args.out or Path("runs/seeds" if args.method == "resga" else "runs/seeds-saega")
    model = load(args.model)
    rows = []
    for persona in args.personas:
        for variant in args.variants:
            for seed in args.seeds:
                row = cell(args, model, persona, variant, seed)
                rows.append(row)
                print(f"{persona} {variant} s{seed}: {100 * row['test']['rate']:.1f} % {row['text']!r}", flush=True)
    text = table(rows, args.method) + "\n\n" + "\n".join(f"- {line}" for line in verdicts(rows, args.method)) + "\n"
    print(text)
    files.write_text(args.out / "table.md", text)
    files.write_json(args.out / "results.json", rows)
    with open(args.out / "table.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["persona", "variant", "seed", "rate", "low", "high", "a_rate", "swapped_rate", "text"])
        for row in rows:
            test = row["test"]
            writer.writerow(
                [row["persona"], row["variant"], row["seed"], test["rate"], *test["ci95"], test["a_rate"]]
                + [test["swapped_rate"], row["text"]]
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
