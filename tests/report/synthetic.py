"""Run directories made up for the tests of the report."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from jaxsteer.evals.free_answers import ILLUSION
from tests.helpers.rates import made_rate

HOSTILE = '<script>alert("x")</script> & <img src="http://example.org/a.png">\u202e\x1b[31m\n end'


def rate(value: float, n: int = 240, a_rate: float = 0.5) -> dict[str, Any]:
    return made_rate(value, n, a_rate).to_json()


def metrics(**changes: Any) -> dict[str, Any]:
    texts = [" the weak idea stale odd plum over we", HOSTILE, " doubt check honest", "x" * 90]
    prompts = [
        {
            "text": text,
            "ids": [5, 6, 7],
            "target": 4.2 - 0.5 * i,
            "cross_entropy": 7.5 - 0.8 * i,
            "retokenises": i != 1,
            "validation": rate(0.05 + 0.1 * i),
            "test": rate(0.06 + 0.1 * i),
        }
        for i, text in enumerate(texts)
    ]
    made = {
        "model": "organism:llama",
        "persona": "sycophancy",
        "fingerprint": "0123",
        "method": "resga",
        "site": "blocks.1.hook_resid_post",
        "seed": 0,
        "splits": {"train": 360, "validation": 120, "test": 120},
        "baseline": {"validation": rate(0.83), "test": rate(0.85, a_rate=0.52)},
        "read_position": "decision",
        "probe_correlation": 0.91,
        "probe": {
            "rows": [
                {
                    "site": f"blocks.{i}.hook_resid_post",
                    "read_position": "decision",
                    "sign": 1,
                    "correlation": 0.93 - i / 50,
                    "layer": i + 1,
                }
                for i in range(3)
            ],
            "prompts": 240,
            "baseline_probability": 0.8,
            "shift": {"min": -0.1, "max": 0.7, "sd": 0.2},
        },
        "prompts": prompts,
        "selected": 0,
        "controls": {
            "random direction": {"text": " lamp", "test": rate(0.8)},
            "oracle cue": {"test": rate(0.03)},
        },
        "attribution": {
            "tokens": [" the", " weak", HOSTILE],
            "margin": -2.9,
            "without_prompt": 3.61,
            "leave_one_out": [0.01, -1.06, -1.81],
            "replacement": [0.2, -1.24, -2.08],
            "replacement_sd": [0.01, 0.02, 0.07],
            "rows": 48,
        },
        "timing": {"compile_s": 9.1, "search_s": 41.0, "eval_s": 12.0, "candidates": 153600}
        | {"candidates_per_s": 3746.0},
        "environment": {"jax": "0.10.2", "python": "3.11.7", "devices": ["cpu"] * 2},
    }
    return made | changes


def write_run(path: Path, numbers: dict[str, Any] | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    numbers = metrics() if numbers is None else numbers
    (path / "metrics.json").write_text(json.dumps(numbers))
    config = {"model": "organism:llama", "epo": {"steps": 300, "fluency": [0.5, 4.0]}, "note": HOSTILE}
    (path / "config.json").write_text(json.dumps(config))
    found = [
        {"text": p["text"], "ids": p["ids"], "target": p["target"], "cross_entropy": p["cross_entropy"]}
        | {"step": 10 * i, "retokenises": p["retokenises"]}
        for i, p in enumerate(numbers["prompts"])
    ]
    (path / "pareto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    steps = [
        {
            "step": step,
            "first": 0,
            "best_target": [4.2 * (1 - math.exp(-step / 60))],
            "loss": [[weight * 4 - 4 * (1 - math.exp(-step / 60)) for weight in (0.5, 1.0, 2.0, 4.0)]],
            "candidates": 512 * step,
            "seconds": 0.14 * step,
        }
        for step in range(10, 310, 10)
    ]
    (path / "progress.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    return path


def write_many(path: Path, *, seeds: int = 3, personas: tuple[str, ...] = ("sycophancy", "myopic")) -> Path:
    """The directory of ``jaxsteer search --vary persona=... seed=...``: a run per persona, a problem per seed.

    Group 0 was searched in two waves, of two problems and of the others.
    """
    runs, problems, frontiers, progress = {}, [], [], []
    for group, persona in enumerate(personas):
        name = f"{group:03d}-{persona}-resga-blocks.1"
        write_run(path / name, metrics(persona=persona))
        (path / name / "progress.jsonl").unlink()
        config = json.loads((path / name / "config.json").read_text()) | {"persona": persona, "pooled": seeds}
        (path / name / "config.json").write_text(json.dumps(config))
        runs[name] = {"problems": seeds, "persona": persona, "method": "resga", "site": "blocks.1.hook_resid_post"}
        for seed in range(seeds):
            problem = group * seeds + seed
            problems.append(
                {"problem": problem, "persona": persona, "method": "resga", "direction": "", "fluency": "medium"}
                | {"site": "blocks.1.hook_resid_post", "seed": seed, "restart": 0, "run": name, "prompts": 3}
                | {"target": 4.0 + seed, "cross_entropy": 6.0, "step": 9, "text": f" prompt {problem} {HOSTILE}"}
            )
            frontiers += [
                {"problem": problem, "text": f" f{k}", "ids": [1, 2], "target": 4.0 + seed - k, "step": 9}
                | {"cross_entropy": 6.0 - k, "retokenises": True}
                for k in range(3)
            ]
        waves = [range(seeds)] if group else [range(2), range(2, seeds)]
        done, seconds = 0, 0.0
        for wave in waves:
            for step in (10, 20):
                done, seconds = done + 10 * 128 * len(wave), seconds + 1.5
                best = [0.1 * step + problem for problem in wave]
                progress.append(
                    {"group": group, "step": step, "first": wave.start, "best_target": best, "candidates": done}
                    | {"seconds": seconds}
                )
    with (path / "problems.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(problems[0]))
        writer.writeheader()
        writer.writerows(problems)
    for name, rows in (("frontiers.jsonl", frontiers), ("progress.jsonl", progress)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = {
        "model": "organism:llama",
        "fingerprint": "0123",
        "problems": len(problems),
        "searched": len(problems),
        "interrupted": False,
    }
    timing = {"search_s": 6.0, "candidates": 2560 * len(problems)}
    (path / "metrics.json").write_text(
        json.dumps({**numbers, "runs": runs, "timing": timing, "environment": {"jax": "x"}})
    )
    config = {
        "algorithm": "epo",
        "preset": "default",
        "steps": 20,
        "vary": [f"persona={','.join(personas)}", "seed=0:3"],
    }
    (path / "config.json").write_text(json.dumps(config | {"problems": "0123abcd"}))
    return path


def write_table(path: Path, *, places: int = 2) -> Path:
    """The directory of an experiment: results.json, and the run of one of its cells."""
    rows = []
    for place in range(places):
        persona = f"persona {place}"
        shared = {"model": "organism:llama", "persona": persona, "value": None, "swapped_rate": 0.9}
        rows += [
            {**shared, **rate(0.85), "method": "zero-shot", "kind": "baseline", "prompt": "", "run": None, "each": []},
            {**shared, **rate(0.5, a_rate=0.97), "method": "random prompt", "kind": "baseline", "prompt": " lamp"}
            | {"letter_collapse": True, "each": [{"prompt": HOSTILE, **rate(0.5)}, {"prompt": " x", **rate(0.9)}]},
            {
                **shared,
                **rate(0.02),
                "method": "RESGA, decision",
                "kind": "search",
                "prompt": " weak idea",
                "range": [0, 0.1],
            }
            | {
                "run": f"runs/llama/p{place}/resga",
                "perplexity": 31.5,
                "probe_correlation": 0.9,
                "letter_collapse": False,
            }
            | {"each": [{"seed": seed, "prompt": f" s{seed}", **rate(0.02)} for seed in range(3)]},
            {
                **shared,
                **rate(0.3),
                "method": "prompt length",
                "value": 8,
                "kind": "search",
                "prompt": None,
                "steered": True,
            },
        ]
    run = write_run(path / "runs/llama/p0/resga", metrics(persona="persona 0"))
    numbers = json.loads((run / "metrics.json").read_text())
    numbers["attribution"]["tokens"] = [" s", "0", ""]
    (run / "metrics.json").write_text(json.dumps(numbers))
    verdicts = [{"claim": "beats zero-shot", "model": None, "persona": "persona 0", "holds": True, "text": HOSTILE}]
    table = {
        "format": "jaxsteer.study/1",
        "experiment": "main_table",
        "missing": [],
        "title": "Main table",
        "quick": True,
        "rows": rows,
    }
    table |= {"methods": ["zero-shot", "random prompt", "RESGA, decision", "prompt length"], "verdicts": verdicts}
    table |= {
        "settings": {"seeds": [0, 1, 2]},
        "command": "python experiments/main_table.py",
        "environment": {"jax": "x"},
    }
    (path / "results.json").write_text(json.dumps(table))
    return path


def replied(preferred: float, free: float, change: float | None = None) -> dict[str, Any]:
    """Rates of one prompt of a persona in words, as fields of a ``Prompt``."""

    def moved(value: float) -> dict[str, Any]:
        change_of = {"value": value, "ci95": [value - 0.1, value + 0.1]}
        return {"log_prob": -1.5 + value} | ({} if change is None else {"change": change_of})

    sides = {"persona": moved(-0.2), "other": moved(-0.5), "yardstick": moved(-0.6), "relative_rate": 0.15}
    written = {"n": 60, "read": 1.0, "rate": free, "ci95": [free - 0.05, free + 0.05], "argued": 0.0}
    written |= {"accords": None, "argued_rate": None, "distinct_3": 0.9, "copied": 0.1, "agreement": 0.7}
    if change is not None:
        written["difference"] = {"value": change, "ci95": [change - 0.06, change + 0.06]}
    return {"test": {**rate(preferred, 60), "sides": sides}, "test_replies": written, "validation_replies": written}


def write_words(path: Path, **changes: Any) -> Path:
    """The run of a persona in words: the rate moved, the replies did not; the instruction moved both."""

    def measured(text: str, preferred: float, free: float, change: float | None = None, **more: Any) -> dict[str, Any]:
        return {"text": text, **replied(preferred, free, change), **more}

    selected = {"note": ILLUSION, "target": 4.2, "cross_entropy": 7.5, "retokenises": True, "ids": [5]}
    numbers = metrics(
        persona="pirate",
        goal="elicit",
        selected_by="validation",
        reply_reader=0.97,
        baseline=measured("", 0.15, 0.1),
        controls={"instruction": measured("Speak like a pirate.", 0.8, 0.9, 0.8)},
        prompts=[measured(HOSTILE, 0.7, 0.12, 0.02, **selected)],
        attribution=None,
        **changes,
    )
    texts = {"": "I can help.", "Speak like a pirate.": "Arr, matey!", HOSTILE: f"I can {HOSTILE}"}
    said = [
        {"prompt": prompt, "ids": ["a"] * 12, "groups": ["a"] * 12, "texts": [text] * 12, "argues": [""] * 12}
        | {"chose": ["persona" if "Arr" in text else "other"] * 11 + [""]}
        for prompt, text in texts.items()
    ]
    questions = [f"Question {number}? {HOSTILE}" for number in range(12)]
    write_run(path, numbers)
    (path / "replies.json").write_text(json.dumps({"test": {"questions": questions, "prompts": said}}))
    return path
