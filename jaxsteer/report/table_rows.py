"""Rows of a study's main table, made from the metrics of its runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsteer.report.run_files import controls, named, number, selected, split_rate

Row = dict[str, Any]
Place = tuple[str, str]
"""Model and persona."""

ZERO = "zero-shot"
NOT_METHOD = frozenset(
    "format version data_hash model persona method seed split_seed pooled vary problems init_from out".split()
)
"""Keys of config.json that do not set one method of a study apart from another."""
RANKS = {"baseline": 0, "control": 1, "search": 2}
COPIED = "rate ci95 n a_rate swapped_rate letter_collapse auroc debiased_rate difference flips".split()
SHARED = "model persona kind method n prompt site read_position".split()
AVERAGED = "rate a_rate swapped_rate auroc debiased_rate probe_correlation".split()


def unprompted(row: Row) -> bool:
    """Whether a row is the model as it is: neither prompted nor steered."""
    return row["kind"] == "baseline" and row.get("prompt") == "" and not row.get("steered")


def rows_of_runs(runs: Mapping[str, Mapping[str, Any]], configs: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row per model, persona and method: without a prompt, controls, and what each kind of search selected.

    Where several searches (seeds) share a row, its rate is their mean and its interval reaches from the lowest to the
    highest end of theirs; ``each`` has them one by one.
    """
    names = _methods(runs, configs)
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for run, metrics in runs.items():
        for entry in _entries(run, metrics, names[run]):
            alike = groups.setdefault((entry["model"], entry["persona"], entry["kind"], entry["method"]), [])
            same = entry["kind"] != "search" and any(
                (e["prompt"], e["rate"]) == (entry["prompt"], entry["rate"]) for e in alike
            )
            if not same:  # runs share their baseline and their controls
                alike.append(entry)
    rows = [_merged(entries) for entries in groups.values()]
    return sorted(rows, key=lambda row: RANKS[row["kind"]])


def _methods(runs: Mapping[str, Mapping[str, Any]], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A name for every run's method: with those settings that are not the same in all runs of the study."""
    keys = dict.fromkeys(key for config in configs.values() for key in config if key not in NOT_METHOD)
    several = [key for key in keys if len({json.dumps(c.get(key), sort_keys=True) for c in configs.values()}) > 1]
    found = {}
    for run, metrics in runs.items():
        parts = [named(metrics.get("method")).upper()]
        parts += [f"{key.replace('_', ' ')} {_short(value)}" for key in several if (value := configs[run].get(key))]
        found[run] = ", ".join(parts)
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return Path(text).stem if "/" in text else text


def _entries(run: str, metrics: Mapping[str, Any], method: str) -> Iterator[Row]:
    place = {"model": named(metrics.get("model")), "persona": named(metrics.get("persona"))}
    chosen = selected(metrics)
    given: list[tuple[str, str, Any]] = [("baseline", ZERO, metrics.get("baseline"))]
    given += [("control", named(row), row) for row in controls(metrics)]
    given += [("search", method, chosen)] if chosen is not None else []
    for kind, name, entry in given:
        rate = split_rate(entry, "test") or split_rate(entry, "validation")
        if rate is None:
            continue
        row = {**place, "kind": kind, "method": name, "prompt": "" if kind == "baseline" else entry.get("text")}
        row |= {key: rate[key] for key in COPIED if key in rate}
        if kind == "search":
            row |= {"run": run, "seed": metrics.get("seed"), "attribution": metrics.get("attribution")}
            row |= {key: metrics.get(key) for key in ("site", "read_position", "probe_correlation")}
            row |= {key: entry.get(key) for key in ("target", "cross_entropy")}
        yield row


def _merged(entries: Sequence[Row]) -> Row:
    first = entries[0]
    if len(entries) == 1:
        return {**first, "each": []}

    def mean(key: str) -> float | None:
        known = [value for entry in entries if (value := number(entry.get(key))) is not None]
        return sum(known) / len(known) if known else None

    ends = [end for entry in entries for end in entry.get("ci95") or ()]
    rates = [entry["rate"] for entry in entries]
    changes = [v for entry in entries if (v := number((entry.get("difference") or {}).get("value"))) is not None]
    return {
        **{key: first.get(key) for key in SHARED},
        **{key: mean(key) for key in AVERAGED},
        "ci95": [min(ends), max(ends)] if ends else None,
        "range": [min(rates), max(rates)],
        "difference": {"value": sum(changes) / len(changes)} if changes else None,
        "letter_collapse": any(entry.get("letter_collapse") for entry in entries),
        "each": list(entries),
    }
