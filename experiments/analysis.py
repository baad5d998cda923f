"""Why do discovered prompts work? Five analyses of finished runs, of any model.

python -m experiments.analysis RUN_OR_STUDY [...] [--out runs/analysis] [--only TEXT] [--sae ID_OR_PATH] [--quick]

* ``attribution``: which tokens carry the effect, each left out, and each replaced by random ones.
* ``divergence``: how far states with and without the prompt part, layer by layer, beside random prompts.
* ``states``: principal axes of states without and with the prompt, under random prompts and under sentences that
  invite and forbid the persona; how far each comes on the way from the one to the other.
* ``latents``: which SAE latents prompts switch on or off, and what prompts have in common (Jaccard), beside random
  prompts and the persona's signature.
* ``recovery`` (organisms only): which of the generator's trigger words a prompt recovers.

States are read at the decision token of validation questions, in both choice orders. One file per run and analysis
under ``--out``/cells; what exists is not computed again. Writes analysis.md, CSV files and figures.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from experiments.analysis_figures import figures_of
from jaxsteer.checkpoints.loading import ORGANISM, load
from jaxsteer.errors import UserError
from jaxsteer.evals.attribution import attribute
from jaxsteer.evals.decision_states import active_latents, decision_states, divergence, jaccard, share_of_way
from jaxsteer.evals.organism_recovery import recovery, trigger_words
from jaxsteer.files import read_json
from jaxsteer.models.model import Model
from jaxsteer.personas import Item, Persona, contrast_pairs, load_persona, sae_signature, search_conversations, split
from jaxsteer.prompts import Placement, build_slots, prompt_text
from jaxsteer.prompts.tokens import decoded
from jaxsteer.report import read_run, run_folders
from jaxsteer.runs import files
from jaxsteer.sae import SAE, load_sae
from jaxsteer.statistics import principal
from jaxsteer.study.probe import probe_prompts, stream_sites
from jaxsteer.study.setting import context_items, token_mask

QUESTIONS, RANDOM = 24, 8
QUICK_QUESTIONS, QUICK_RANDOM = 6, 2
NONE, PROMPT, AGAINST, FOR = "no prompt", "prompt", "sentence against", "sentence for"


class Subject:
    """One finished run: its prompt, its model and questions, and states that several analyses share."""

    def __init__(self, folder: Path, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        self.config, self.result = read_json(folder / files.CONFIG), read_run(folder).result
        assert self.result.best is not None
        self.prompt = self.result.best
        self.placement = Placement(style=self.config["style"], slot=self.config["slot"])

    @property
    def model(self) -> Model:
        """Loaded once for all runs of the same model."""
        return _model(self.config["model"], self.config.get("dtype"))

    @functools.cached_property
    def persona(self) -> Persona:
        """With its questions."""
        return load_persona(self.config["persona"])

    @functools.cached_property
    def items(self) -> tuple[Item, ...]:
        """Validation questions."""
        asked = split(self.persona, seed=self.config["split_seed"]).validation
        return context_items(asked, self.args.questions)

    @functools.cached_property
    def allowed(self) -> np.ndarray:
        """(V,) tokens that the search could use."""
        return token_mask(self.model, self.config["tokens"], self.config.get("ban") or ())

    @functools.cached_property
    def texts(self) -> dict[str, str]:
        """What is compared, by name."""
        conversations = search_conversations(self.items[:1], "decision", placement=self.placement)
        length = len(self.prompt.ids)
        slots = build_slots(
            self.model.tokenizer,
            [c for c, _ in conversations],
            length,
            read=["input_last" for _ in conversations],
            max_positions=self.model.config.max_positions,
        )
        drawn = probe_prompts(self.model.tokenizer, slots, self.allowed, (), n=max(8, self.args.random), seed=0)
        texts = {NONE: "", PROMPT: self.prompt.text}
        if self.persona.counter_cues and self.persona.pro_cues:
            texts |= {AGAINST: self.persona.counter_cues[0], FOR: self.persona.pro_cues[0]}
        random = (prompt_text(self.model.tokenizer, ids) for ids in drawn[: self.args.random])
        return texts | {f"random {i}": text for i, text in enumerate(random)}

    @functools.cached_property
    def states(self) -> dict[str, np.ndarray]:
        """Per text (L, n, D): the stream after every block."""
        sites = stream_sites(self.model.config.n_layers)
        found = decision_states(self.model, self.items, list(self.texts.values()), sites, placement=self.placement)
        return dict(zip(self.texts, found, strict=True))

    def at(self, site: str) -> dict[str, np.ndarray]:
        """Per text (n, D): the stream at a site."""
        sites = stream_sites(self.model.config.n_layers)
        if site in sites:
            return {name: states[sites.index(site)] for name, states in self.states.items()}
        found = decision_states(self.model, self.items, list(self.texts.values()), [site], placement=self.placement)
        return {name: states[0] for name, states in zip(self.texts, found, strict=True)}

    @functools.cached_property
    def sae(self) -> SAE | None:
        """That of ``--sae``, of the run, or of the organism; None for other models."""
        name = self.config["model"]
        source = self.args.sae or self.config.get("sae") or (name if name.startswith(ORGANISM) else None)
        return None if source is None else _sae(source)


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@functools.lru_cache(maxsize=1)
def _model(name: str, dtype: str | None) -> Model:
    return load(name, dtype=dtype)


_sae = functools.lru_cache(maxsize=1)(load_sae)


def attribution(run: Subject) -> dict[str, Any]:
    """Effects of the prompt's tokens, and which of them belong to trigger words."""
    found = attribute(run.model, run.items, run.prompt.ids, allowed=run.allowed, placement=run.placement).to_json()
    triggers = [trigger_words(run.persona.name, token) for token in found["tokens"]]
    return {**found, "trigger": None if triggers[0] is None else [bool(words) for words in triggers]}


def diverge(run: Subject) -> dict[str, Any]:
    """Per text and layer, cosine and relative norm against no prompt."""
    texts = [name for name in run.texts if name != NONE]
    found = {name: divergence(run.states[name], run.states[NONE]).to_json() for name in texts}
    return {"sites": stream_sites(run.model.config.n_layers), "texts": run.texts, "divergence": found}


def axes(run: Subject) -> dict[str, Any]:
    """Principal axes of all states at the run's site, and every text's share of the way between the two sentences."""
    site, sites = run.result.site, stream_sites(run.model.config.n_layers)
    site = site if site in sites else sites[-1]  # an objective of a user's own may read elsewhere
    states = run.at(site)
    found = principal(np.concatenate(list(states.values())))
    way = {}
    if AGAINST in states:
        way = {name: share_of_way(x, states[FOR], states[AGAINST]) for name, x in states.items()}
    return {
        "site": site,
        "explained": found.explained.tolist(),
        "coordinates": {name: found.coordinates(x).tolist() for name, x in states.items()},
        "share_of_way": way,
    }


def latents(run: Subject) -> dict[str, Any] | None:
    """Latents that every text switches on or off against no prompt, and those of the persona's signature."""
    if run.sae is None:
        return None
    site = str(run.sae.config.site_in)
    on = {name: active_latents(run.sae, states) for name, states in run.at(site).items()}
    switched = {name: np.flatnonzero(active != on[NONE]).tolist() for name, active in on.items() if name != NONE}
    signature = None
    if AGAINST in run.texts:
        pairs = contrast_pairs(run.model, run.persona, run.items, "decision", placement=run.placement)
        signature = sorted(sae_signature(run.model, run.sae, pairs).indices.tolist())
    counts = {name: int(active.sum()) for name, active in on.items()}
    return {"site": site, "dictionary": run.sae.n_latents, "on": counts, "switched": switched, "signature": signature}


def recover(run: Subject) -> dict[str, Any] | None:
    """Trigger words of the selected prompt, and of all that the run reports."""
    vocabulary = decoded(run.model.tokenizer, np.flatnonzero(run.allowed))
    texts = [prompt.text for prompt in run.result.prompts]
    named = {"selected": [run.prompt.text], "all reported": texts}
    found = {name: recovery(run.persona.name, some, vocabulary) for name, some in named.items()}
    return {name: one.to_json() for name, one in found.items() if one is not None} or None


ANALYSES: dict[str, Callable[[Subject], dict[str, Any] | None]] = {
    "attribution": attribution,
    "divergence": diverge,
    "states": axes,
    "latents": latents,
    "recovery": recover,
}


def subjects(args: argparse.Namespace) -> list[Subject]:
    """The runs that were asked for and selected a prompt. Raises ``UserError`` when there is none."""
    found = []
    for given in args.directories:
        for folder in run_folders(given):
            name = folder.name if folder == given else folder.relative_to(given).as_posix()
            name = f"{given.name}/{name}" if len(args.directories) > 1 and folder != given else name
            if args.only in name and read_run(folder).result.best is not None:
                found.append(Subject(folder, name, args))
    if not found:
        raise UserError(f"no run of {', '.join(map(str, args.directories))} selected a prompt (--only {args.only!r})")
    return sorted(found, key=lambda run: (run.config["model"], str(run.config.get("dtype"))))  # each model once


def tables(runs: Sequence[Subject], cells: dict[tuple[str, str], Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of every table, from the cells alone."""
    of = {name: [(run, cells[run.name, name]) for run in runs if cells.get((run.name, name))] for name in ANALYSES}
    made = {
        "attribution": [_attribution_row(run, cell) for run, cell in of["attribution"]],
        "divergence": _divergence_rows(of["divergence"]),
        "states": [_states_row(run, cell) for run, cell in of["states"]],
        "latents": _latent_rows(of["latents"]),
        "recovery": _recovery_rows(of["recovery"]),
    }
    return {name: rows for name, rows in made.items() if rows}


def _about(run: Subject) -> dict[str, Any]:
    return {"model": run.result.model, "persona": run.result.persona, "run": run.name}


def _attribution_row(run: Subject, cell: dict[str, Any]) -> dict[str, Any]:
    effects = np.asarray(cell["replacement"])
    order = np.argsort(effects)
    row = {**_about(run), "prompt": run.prompt.text, "without": cell["without_prompt"], "with": cell["margin"]}
    row["strongest"] = ", ".join(f"{cell['tokens'][i].strip()} ({effects[i]:+.1f})" for i in order[:3])
    if cell["trigger"] is not None:
        trigger = np.asarray(cell["trigger"], bool)
        row["share of tokens: triggers"] = float(trigger.mean())
        away = np.minimum(effects, 0)
        row["share of effect: triggers"] = float(abs(away[trigger].sum() / away.sum())) if away.any() else None
    return row


def _divergence_rows(found: Sequence[tuple[Subject, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Per model, persona and site, means over runs; of random prompts also the least and the most."""
    groups: dict[tuple[str, str, str], list[tuple[int, dict[str, Any]]]] = {}
    for run, cell in found:
        for at, site in enumerate(cell["sites"]):
            groups.setdefault((run.result.model, run.result.persona, site), []).append((at, cell["divergence"]))
    rows = []
    for (model, persona, site), members in groups.items():
        row: dict[str, Any] = {"model": model, "persona": persona, "site": site, "runs": len(members)}
        for key in ("cosine", "relative_norm"):
            mine = [texts[PROMPT][key][at] for at, texts in members]
            drawn = [v[key][at] for at, texts in members for name, v in texts.items() if name.startswith("random ")]
            row |= {key: float(np.mean(mine)), f"{key}: random": float(np.mean(drawn))}
            row |= {f"{key}: random, least": min(drawn), f"{key}: random, most": max(drawn)}
        rows.append(row)
    return rows


def _states_row(run: Subject, cell: dict[str, Any]) -> dict[str, Any]:
    way = cell["share_of_way"]
    random = [share for name, share in way.items() if name.startswith("random ")]
    row = {**_about(run), "site": cell["site"], "explained by 2 axes": sum(cell["explained"])}
    if way:
        row |= {"way: no prompt": way[NONE], "way: prompt": way[PROMPT], "way: random, mean": float(np.mean(random))}
        row |= {"way: random, most": max(random)}
    return row


def _latent_rows(found: Sequence[tuple[Subject, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean Jaccard per model of the latents that two prompts switch: same persona, other persona, random, signature."""
    rows = []
    for model in dict.fromkeys(run.result.model for run, _ in found):
        here = [(run, cell) for run, cell in found if run.result.model == model]
        for persona in dict.fromkeys(run.result.persona for run, _ in here):
            mine = [cell for run, cell in here if run.result.persona == persona]
            others = [cell["switched"][PROMPT] for run, cell in here if run.result.persona != persona]
            prompts = [cell["switched"][PROMPT] for cell in mine]
            random = [ids for cell in mine for name, ids in cell["switched"].items() if name.startswith("random ")]
            random = list(map(list, dict.fromkeys(map(tuple, random))))
            groups = {
                "each other": itertools.combinations(prompts, 2),
                "prompts of other personas": itertools.product(prompts, others),
                "random prompts": itertools.product(prompts, random),
                "random with each other": itertools.combinations(random, 2),
                AGAINST: [(c["switched"][PROMPT], c["switched"][AGAINST]) for c in mine if AGAINST in c["switched"]],
                "signature": [(c["switched"][PROMPT], c["signature"]) for c in mine if c["signature"]],
            }
            switched = float(np.mean([len(ids) for ids in prompts]))
            row = {"model": model, "persona": persona, "runs": len(mine), "switched by a prompt": switched}
            row["switched by a random one"] = float(np.mean([len(ids) for ids in random])) if random else None
            for name, pairs in groups.items():
                known = [value for a, b in pairs if (value := jaccard(a, b)) is not None]
                row[f"Jaccard: {name}"] = float(np.mean(known)) if known else None
            rows.append(row)
    return rows


def _recovery_rows(found: Sequence[tuple[Subject, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Per model and persona the selected prompts of all runs together; then every run."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run, cell in found:
        groups.setdefault((run.result.model, run.result.persona), []).append(cell["selected"])
    rows = []
    for (model, persona), cells in groups.items():
        words, triggers = (sum(cell[key] for cell in cells) for key in ("words", "triggers"))
        union = sorted({word for cell in cells for word in cell["found"]})
        recall = len(union) / (len(cells[0]["found"]) + len(cells[0]["missed"]))
        row = {"model": model, "persona": persona, "run": f"all {len(cells)}", "prompts": "selected", "words": words}
        row |= {"triggers": triggers, "precision": triggers / words if words else None, "recall": recall}
        rows.append(row | {"chance": cells[0]["chance"], "found": " ".join(union)})
    keys = ("words", "triggers", "precision", "recall", "chance")
    for run, cell in found:
        for name, one in cell.items():
            row = {**_about(run), "prompts": name, **{key: one[key] for key in keys}}
            rows.append(row | {"found": " ".join(one["found"])})
    return rows


def markdown(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """A section with one table; layers and runs beyond a page's worth stand in the CSV file alone."""

    def text(value: Any) -> str:
        shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
        return re.sub(r"([|`\\])", r"\\\1", "".join(c if c.isprintable() else " " for c in shown)).strip()

    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(text(row.get(key)) for key in columns) + " |" for row in rows[:MOST]]
    return "\n".join(lines + ([f"\n... and {len(rows) - MOST} more rows in {title}.csv"] if len(rows) > MOST else []))


MOST = 60
"""Rows of a table in analysis.md."""


def write(out: Path, runs: Sequence[Subject], cells: dict[tuple[str, str], Any]) -> str:
    """analysis.md, a CSV file per table, and the figures; returns the Markdown."""
    found = tables(runs, cells)
    for name, rows in found.items():
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    (out / "figures").mkdir(exist_ok=True)
    for figure in figures_of([(_about(run), {name: cells.get((run.name, name)) for name in ANALYSES}) for run in runs]):
        figure.write(out / "figures")
    text = "\n\n".join(["# Why discovered prompts work", *(markdown(name, rows) for name, rows in found.items())])
    (out / "analysis.md").write_text(text + "\n", encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Compute the missing cells, write tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, help="runs, or directories of many")
    parser.add_argument("--out", type=Path, default=Path("runs/analysis"))
    parser.add_argument("--only", default="", help="only runs with this text in their folder's name")
    parser.add_argument("--sae", help="SAE for latents (default: the run's, or the organism's own)")
    parser.add_argument("--analyses", nargs="+", choices=ANALYSES, default=list(ANALYSES))
    parser.add_argument("--quick", action="store_true", help="few questions and random prompts")
    args = parser.parse_args(argv)
    args.questions, args.random = (QUICK_QUESTIONS, QUICK_RANDOM) if args.quick else (QUESTIONS, RANDOM)
    try:
        runs = subjects(args)
        cells: dict[tuple[str, str], Any] = {}
        for run in tqdm(runs, desc="runs"):
            for name in args.analyses:
                path = args.out / ("quick" if args.quick else "cells") / run.name / f"{name}.json"
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    files.write_json(path, ANALYSES[name](run))
                cells[run.name, name] = _read(path)
        print(write(args.out, runs, cells))
    except UserError as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
