"""Rows of a study's main table, made from the results of its runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsteer.display import visible
from jaxsteer.evals.rates import Difference
from jaxsteer.study.results import Prompt, SearchRun
from jaxsteer.study.table_row import TableRow, rate_fields, reply_fields

Place = tuple[str, str]
"""Model and persona."""

ZERO = "zero-shot"
NOT_METHOD = frozenset(
    "format version data_hash model persona method seed split_seed pooled vary problems init_from out".split()
)
"""Keys of config.json that do not set one method of a study apart from another."""
RANKS = {"baseline": 0, "control": 1, "search": 2}
SHARED = "model persona kind method n prompt site read_position goal".split()
AVERAGED = "rate preference judged a_rate swapped_rate auroc debiased_rate probe_correlation".split()


def rows_of_runs(runs: Mapping[str, SearchRun], configs: Mapping[str, Mapping[str, Any]]) -> list[TableRow]:
    """One row per model, persona and method: without a prompt, controls, and what each kind of search selected.

    Where several searches (seeds) share a row, its rate is their mean and its interval reaches from the lowest to the
    highest end of theirs; ``each`` has them one by one.
    """
    names = _methods(runs, configs)
    groups: dict[tuple[str, str, str, str], list[TableRow]] = {}
    for name, run in runs.items():
        for row in _rows(name, run, names[name]):
            alike = groups.setdefault((row.model, row.persona, row.kind, row.method), [])
            # runs share their baseline and their controls
            if row.kind == "search" or not any((one.prompt, one.rate) == (row.prompt, row.rate) for one in alike):
                alike.append(row)
    return sorted((merged(rows) for rows in groups.values()), key=lambda row: RANKS[row.kind])


def _methods(runs: Mapping[str, SearchRun], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A name for every run's method: with those settings that are not the same in all runs of the study."""
    keys = dict.fromkeys(key for config in configs.values() for key in config if key not in NOT_METHOD)
    several = [key for key in keys if len({json.dumps(c.get(key), sort_keys=True) for c in configs.values()}) > 1]
    found = {}
    for name, run in runs.items():
        parts = [visible(run.method).upper()]
        parts += [f"{key.replace('_', ' ')} {_short(value)}" for key in several if (value := configs[name].get(key))]
        found[name] = ", ".join(parts)
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return Path(text).stem if "/" in text else text


def _rows(name: str, run: SearchRun, method: str) -> Iterator[TableRow]:
    of_search = {
        "run": name,
        "seed": run.seed,
        "attribution": run.attribution,
        "site": run.site,
        "read_position": run.read_position,
        "probe_correlation": run.probe_correlation,
    }
    given: list[tuple[str, str, Prompt | None, dict[str, Any]]] = [("baseline", ZERO, run.baseline, {})]
    given += [("control", control, prompt, {}) for control, prompt in run.controls.items()]
    given += [("search", method, run.best, of_search)]
    for kind, label, prompt, more in given:
        if prompt is not None and prompt.rate is not None:
            yield TableRow(
                model=run.model,
                persona=persona_of(run),
                kind=kind,
                method=label,
                prompt=prompt.text,
                target=prompt.target,
                cross_entropy=prompt.cross_entropy,
                judged=prompt.judged,
                **(
                    {**reply_fields(prompt.rate, prompt.replies, run.goal or "reduce"), "note": prompt.note}
                    if run.in_words
                    else rate_fields(prompt.rate)
                ),
                **more,
            )


def persona_of(run: SearchRun) -> str:
    """The name of its persona; of one in words with what was wanted."""
    return f"{run.persona} ({run.goal or 'reduce'})" if run.in_words else run.persona


def merged(rows: Sequence[TableRow]) -> TableRow:
    """Several searches as one row; they are its ``each``."""
    first = rows[0]
    if len(rows) == 1:
        return first
    means = {key: _mean(getattr(row, key) for row in rows) for key in AVERAGED}
    ends = [end for row in rows for end in row.ci95 or ()]
    change = _mean(row.difference.value for row in rows if row.difference is not None)
    return TableRow(
        **{key: getattr(first, key) for key in SHARED},
        **means,  # type: ignore[arg-type]
        ci95=(min(ends), max(ends)) if ends else None,
        range=(min(row.rate for row in rows), max(row.rate for row in rows)),
        difference=None if change is None else Difference(value=change),
        letter_collapse=any(row.letter_collapse for row in rows),
        note=next((row.note for row in rows if row.note), None),
        each=tuple(rows),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
