"""What a search found, scored again from its text and measured on questions."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxsteer import __version__
from jaxsteer.evals.choice import choice_eval, distinct, rate
from jaxsteer.models.model import Model
from jaxsteer.objectives import Objective, needs
from jaxsteer.personas import instructions
from jaxsteer.processes import is_first
from jaxsteer.prompt_search import Found, SearchResult
from jaxsteer.prompt_search.rescore import rescore
from jaxsteer.prompts import prompt_text, retokenises_many
from jaxsteer.study import files
from jaxsteer.study.objective_stage import Say
from jaxsteer.study.options import ReportOptions, RunOptions
from jaxsteer.study.setting import PersonaSetting, Setting

MARKED = 4
"""Prompts reported although their text does not re-tokenise; they are never selected."""


def finals(setting: Setting, objective: Objective, result: SearchResult) -> list[dict[str, Any]]:
    """The frontier scored again from its text, best objective first, and then the marked ones.

    ``target`` and ``cross_entropy`` come from the text; ``search_target`` is what the search had from the ids. A prompt
    whose text does not give its ids back has no score from text: it is marked and never selected.
    """
    tokenizer = setting.model.tokenizer
    good = [found for found in result.found if found.retokenises]
    texts = [prompt_text(tokenizer, found.ids) for found in good]
    model, reads = setting.model, needs(objective, setting.model.config)
    again = rescore(model, setting.slots, objective, reads, texts, combine=setting.scoring.combination)
    rows = [
        _row(found, text, new.target, new.cross_entropy) for found, text, new in zip(good, texts, again, strict=True)
    ]
    rows.sort(key=lambda row: -row["target"])
    marked = [found for found in result.found if not found.retokenises][:MARKED]
    return rows + [_row(f, prompt_text(tokenizer, f.ids), f.target, f.cross_entropy) for f in marked]


def _row(found: Found, text: str, target: float, cross_entropy: float) -> dict[str, Any]:
    return {
        "text": text,
        "ids": list(found.ids),
        "target": target,
        "cross_entropy": cross_entropy,
        "search_target": found.target,
        "step": found.step,
        "population": found.problem,
        "retokenises": found.retokenises,
    }


def evaluate(
    setting: PersonaSetting,
    prompts: list[dict[str, Any]],
    report: ReportOptions,
    run: RunOptions,
    *,
    seed: int,
    say: Say,
) -> dict[str, Any]:
    """Rates of the reported prompts, the baseline and the controls on validation and test questions.

    Writes the item-level results to choices.json. ``selected`` is an index into ``prompts``, or ``None`` when no
    prompt re-tokenises.
    """
    model = setting.model
    good = [p for p in prompts if p["retokenises"]][: report.report_prompts]
    reported = good + [p for p in prompts if not p["retokenises"]]
    controls = {"random": random_prompt(setting, seed)}
    if setting.persona.counter_cues:
        cue = setting.persona.counter_cues[0]
        # Public data brings no cue that is known to work: a plain sentence stands in its place, under its own name.
        known = cue not in instructions(setting.persona.behaviour)
        controls = {"oracle" if known else "instruction": cue, **controls}
    texts = ["", *controls.values(), *(p["text"] for p in reported)]
    rates: dict[str, list[dict[str, Any]]] = {}
    records = {}
    for name in ("validation", "test"):
        items = distinct(getattr(setting.splits, name))
        bar = tqdm(total=2 * len(items) * len(texts), desc=name, disable=run.quiet or not is_first(), leave=False)

        def advance(done: int, total: int, bar: tqdm = bar) -> None:
            bar.update(done - bar.n)

        with bar:
            results = choice_eval(model, items, texts, progress=advance, placement=setting.placement)
        found = [rate(results[0]), *(rate(result, results[0]) for result in results[1:])]
        rates[name] = [one.to_json() for one in found]
        records[name] = [result.to_json() for result in results]
    files.write_json(Path(run.out) / files.CHOICES, _compact(records))
    say(f"Evaluation: {len(texts)} prompts on {rates['test'][0]['n']} test rows (both choice orders)")
    both = [{name: rates[name][i] for name in rates} for i in range(len(texts))]
    reported = [{**p, **r} for p, r in zip(reported, both[1 + len(controls) :], strict=True)]
    return {
        "baseline": both[0],
        "controls": {
            name: {"text": text, **r}
            for (name, text), r in zip(controls.items(), both[1 : 1 + len(controls)], strict=True)
        },
        "prompts": reported,
        "selected": select(reported, report.select),
        "selected_by": report.select,
    }


def select(prompts: Sequence[dict[str, Any]], by: str) -> int | None:
    """Index of the prompt to report: the best objective, or the lowest validation rate, among those that re-tokenise.

    Equal validation rates are settled by the lower mean probability of the persona's answer, then by the objective.
    """
    usable = [i for i, p in enumerate(prompts) if p["retokenises"]]
    if not usable:
        return None
    if by == "objective":
        return max(usable, key=lambda i: (prompts[i]["target"], -i))
    validation = [p["validation"] for p in prompts]
    return min(usable, key=lambda i: (validation[i]["rate"], validation[i]["probability"], -prompts[i]["target"]))


def random_prompt(setting: Setting, seed: int) -> str:
    """One prompt of random allowed tokens that re-tokenises, fixed by the seed: what no search at all achieves."""
    rng = np.random.default_rng([seed, 1])
    ids = rng.choice(np.flatnonzero(setting.allowed), (64, setting.slots.length)).astype(np.int32)
    good = retokenises_many(setting.model.tokenizer, setting.slots, ids)
    return prompt_text(setting.model.tokenizer, ids[int(np.argmax(good))])


def _compact(records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Per split the rows once, and per prompt its log-probabilities to six digits."""
    out = {}
    for name, results in records.items():
        shared = {k: v for k, v in results[0].items() if k not in ("prompt", "log_probs", "joined")}
        rows = [
            {"prompt": r["prompt"], "log_probs": [[round(a, 6), round(b, 6)] for a, b in r["log_probs"]]}
            for r in results
        ]
        out[name] = {**shared, "prompts": rows}
    return out


def environment(model: Model) -> dict[str, Any]:
    """Versions and hardware, without anything that names this machine."""
    return {
        "jaxsteer": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "dtype": str(model.params.embed.dtype),
    }
