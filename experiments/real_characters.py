"""Characters of a real chat model: what moves its free replies, and what only moves a rate.

python -m experiments.real_characters --model FILE.gguf [--out runs/real_characters] [--quick]

For every character and goal (to elicit it without a system message; to remove it while its role stands there) the model
itself writes the replies to 150 questions. Every search scores as many candidates, in the same contexts. Its prompt is
chosen on validation questions by what the model writes freely; test questions are looked at once, at the end, with all
prompts side by side. Replies are measured in ways that no search saw: the odds of words learned from train replies, the
place of their mean state between plain replies and those in character, at another site than the search's, whether the
question is still the likeliest one after the reply, and how much they repeat themselves. What is there already under
``--out`` is not computed again. Writes results.json, table.md, and a folder for each search (``jaxsteer report``).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jaxsteer
from jaxsteer.cli import keep_programs
from jaxsteer.display import decimals, ends, percent
from jaxsteer.errors import UserError
from jaxsteer.evals.neutral_texts import neutral_texts
from jaxsteer.evals.reply_quality import character_axis, reply_quality
from jaxsteer.evals.side_effects import side_effects
from jaxsteer.evals.word_odds import learn_words
from jaxsteer.files import read_json, write_text
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention
from jaxsteer.personas import Persona, contrast_pairs, load_persona, mean_difference, split
from jaxsteer.prompts import encode_texts, question_conversation, render
from jaxsteer.prompts.soft import load_soft, with_soft
from jaxsteer.report.study import FORMAT
from jaxsteer.report.table_rows import merged
from jaxsteer.steer import add
from jaxsteer.study.files import SOFT as SOFT_FILE
from jaxsteer.study.files import document
from jaxsteer.study.measurement import Measured, Measurement
from jaxsteer.study.outcome import environment
from jaxsteer.study.results import SearchRun
from jaxsteer.study.selection import best_prompt
from jaxsteer.study.table_row import TableRow
from jaxsteer.study.written_persona import ready

CHARACTERS = ("pirate", "ghost", "jester", "accountant")
GOALS = ("elicit", "reduce")
LEADS = 3
"""Prompts of every search that are compared on validation questions."""
SEARCH = {"population": 6, "children": 16, "contexts": 4, "prompt_length": 8, "fluency": "medium", "probe": "off"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One kind of search; ``random`` directions are another one for every seed."""

    name: str
    options: dict[str, Any]
    random: bool = False


GCG = {"population": None, "children": None, "search_width": 96}
"""As many candidates per step as the others have."""
ARMS = (
    Arm(name="RESGA, decision", options={}),
    Arm(name="RESGA, matched", options={"read_position": "matched"}),
    Arm(name="RESGA, published", options={"read_position": "published"}),
    Arm(name="RESGA, random direction", options={}, random=True),
    Arm(name="no gradients", options={"algorithm": "mutation"}),
    Arm(name="no gradients, random direction", options={"algorithm": "mutation"}, random=True),
    Arm(name="GCG on the replies", options={"algorithm": "gcg", "objective": "answer", **GCG}),
)
SOFT = Arm(
    name="prefix tuning",
    options={"algorithm": "soft", "objective": "answer", "population": None, "children": None, "fluency": None},
)
STRENGTHS = (0.15, 0.3, 0.6)
"""Of activation steering, in mean norms of the stream."""
MAX_KL = 0.5
"""What steering may do to neutral text, nats per token."""
QUICK = ("RESGA, decision", "RESGA, random direction", "no gradients")


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a chat model: GGUF file, directory or hub id")
    parser.add_argument("--out", type=Path, default=Path("runs/real_characters"))
    parser.add_argument("--characters", nargs="+", default=CHARACTERS, choices=CHARACTERS)
    parser.add_argument("--goals", nargs="+", default=GOALS, choices=GOALS)
    parser.add_argument("--seeds", type=int, help="seeds of every search, from 0 (3, quick 1)")
    parser.add_argument("--steps", type=int, help="steps of 96 candidates in 4 contexts (40, quick 20)")
    parser.add_argument("--site", default="blocks.18.hook_resid_post", help="where directions and objectives are read")
    parser.add_argument("--read-at", default="blocks.22.hook_resid_post", help="where replies are read")
    parser.add_argument("--quick", action="store_true", help="the pirate, three searches, one seed")
    args = parser.parse_args(argv)
    keep_programs()
    try:
        model = jaxsteer.load(args.model)
        characters = args.characters[:1] if args.quick else args.characters
        blocks = [run_block(model, name, goal, args) for name in characters for goal in args.goals]
        write_results(args, model, blocks)
    except KeyboardInterrupt:
        print(f"Interrupted. What is done stands in {args.out}; the same command goes on.", file=sys.stderr)
        return 130
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print((args.out / "table.md").read_text(encoding="utf-8"))
    return 0


def run_block(model: Model, character: str, goal: str, args: argparse.Namespace) -> dict[str, Any]:
    """All searches of one character and goal, and what their prompts do on test questions."""
    folder, begun = args.out / f"{character}-{goal}", time.perf_counter()
    if (folder / "block.json").is_file():
        return read_json(folder / "block.json")
    folder.mkdir(parents=True, exist_ok=True)
    persona = ready(model, load_persona(f"characters/{character}"), goal, folder, print, quiet=False)  # type: ignore[arg-type]
    chosen: dict[str, list[dict[str, Any]]] = {}
    for arm in ARMS:
        if args.quick and arm.name not in QUICK:
            continue
        for seed in range(args.seeds or (1 if args.quick else 3)):
            print(f"{character}, {goal}: {arm.name}, seed {seed}", flush=True)
            run = search(model, folder, persona, arm, seed, args)
            if arm.name == QUICK[0]:
                random = {"prompt": run.controls["random"].text, "seed": seed}
                chosen.setdefault("random prompt", []).append(random)
            if run.best is not None:
                facts = {"prompt": run.best.text, "cross_entropy": run.best.cross_entropy, "target": run.best.target}
                chosen.setdefault(arm.name, []).append(facts | {"seed": seed, "candidates": run.timing.candidates})
    chosen |= sentences(model, persona)
    soft = None
    if not args.quick:
        search(model, folder, persona, SOFT, 0, args)
        soft = folder / folder_of(SOFT.name, 0) / SOFT_FILE
    found = measured(model, persona, chosen, args.site, args.read_at, soft)
    block = {"character": character, "goal": goal, "seconds": time.perf_counter() - begun, **found}
    write_text(folder / "block.json", document(block))
    return block


def search(model: Model, folder: Path, persona: Persona, arm: Arm, seed: int, args: argparse.Namespace) -> SearchRun:
    """One search of one arm, or its result from the last time."""
    objective = {"direction": f"random:{seed}"} if arm.random else {}
    options = {
        **SEARCH,
        "site": args.site,
        "steps": args.steps or (20 if args.quick else 40),
        **objective,
        **arm.options,
    }
    if options.get("objective"):
        options.pop("site")
    kept = {name: value for name, value in options.items() if value is not None}
    out = folder / folder_of(arm.name, seed)
    run = jaxsteer.search(
        model=model, persona=str(folder / "persona.json"), goal=persona.goal, out=out, seed=seed,
        report_prompts=LEADS, test=False, resume=True, **kept,
    )  # fmt: skip
    assert isinstance(run, SearchRun)
    return run


def folder_of(method: str, seed: int) -> str:
    """Where the files of one search are."""
    return f"{method.replace(', ', '-').replace(' ', '_')}-{seed}"


def steered(model: Model, persona: Persona, site: str) -> tuple[dict[str, Any], Intervention | None]:
    """Addition of the searches' direction at the strength that does most to free validation replies at a small KL."""
    direction = mean_difference(model, contrast_pairs(model, persona, split(persona, seed=0).train, "decision"), [site])
    norm = direction.mean_resid_norm[site]
    edits = [add(site, persona.sign * direction.delta[site], c, mean_norm=norm) for c in STRENGTHS]
    asked = [render(model.tokenizer, question_conversation(text), "") for text in neutral_texts(model)]
    kl = side_effects(model, encode_texts(model.tokenizer, asked, style="chat"), edits).kl
    gentle = [i for i in range(len(edits)) if kl[i] <= MAX_KL]
    if not gentle:
        return {}, None
    found = [jaxsteer.measure(model, persona, edits=edits[i], split="validation", questions=24) for i in gentle]
    rows, costs = [one.prompts[0] for one in found], [float(kl[i]) for i in gentle]
    best = gentle[best_prompt([row.rate for row in rows], [row.written for row in rows], costs, goal=persona.goal)]
    return {"coefficient": STRENGTHS[best], "neutral_kl": float(kl[best])}, edits[best]


def sentences(model: Model, persona: Persona) -> dict[str, list[dict[str, Any]]]:
    """The plain instruction, and the best of the persona's sentences for the goal, by validation questions."""
    cues = list(persona.sentences[persona.goal])
    found = jaxsteer.measure(model, persona, cues, split="validation", questions=24)
    assert found.best is not None
    best = found.best.prompt
    return {"instruction": [{"prompt": cues[0]}], f"best of {len(cues)} instructions": [{"prompt": best}]}


def measured(
    model: Model,
    persona: Persona,
    chosen: dict[str, list[dict[str, Any]]],
    searched: str,
    site: str,
    soft: Path | None,
) -> dict[str, Any]:
    """Every chosen prompt on test questions, in one table: rates, which side moved, free replies and their quality."""
    parts = split(persona, seed=0)
    axis, words = character_axis(model, parts.train, site), learn_words(parts.train)
    texts = [facts["prompt"] for rows in chosen.values() for facts in rows]
    found: Measurement = jaxsteer.measure(model, persona, texts, split="test", questions=60, side_effects=True)
    questions = [item.question for item in parts.test][: found.questions]

    def row(method: str, one: Measured, facts: dict[str, Any]) -> dict[str, Any]:
        scores = [words.score(text, one.prompt) for text in one.answers]
        quality = reply_quality(model, axis, questions, one.answers, scores)
        shown = [words.shows(text, one.prompt) for text in one.answers]
        more = {"quality": quality.to_json(), "in_character": shown, "note": one.note}
        return {"method": method, **facts, **one.to_json(), **more}

    rows, at = [row("none", found.baseline, {})], iter(found.prompts)
    for method, several in chosen.items():
        rows += [row(method, next(at), facts) for facts in several]
    facts, edits = steered(model, persona, searched)
    if edits is not None:
        one = jaxsteer.measure(model, persona, edits=edits, split="test", questions=60, side_effects=True)
        rows.append(row("activation steering", one.prompts[0], facts))
    if soft is not None:
        with_it, text = with_soft(model, load_soft(soft))
        one = jaxsteer.measure(with_it, persona, [text], split="test", questions=60, side_effects=True)
        rows.append(row("prefix tuning", one.prompts[0], {}))
    return {"questions": questions, "axis_site": site, "rows": rows}


SIDE_BY_SIDE = ("none", "instruction", "RESGA, decision", "activation steering")
"""Methods whose replies the page shows."""
HEAD = (
    "method", "free replies", "position", "word odds", "answers the question", "distinct 3-grams", "rate",
    "relative rate", "KL", "nats per token", "prompt",
)  # fmt: skip


def write_results(args: argparse.Namespace, model: Model, blocks: Sequence[dict[str, Any]]) -> None:
    """results.json, of which ``jaxsteer report`` makes the page, and table.md."""
    settings = {name: getattr(args, name) for name in ("characters", "goals", "seeds", "steps", "site", "read_at")}
    head = {"format": FORMAT, "title": f"Characters of {model.name}", "quick": args.quick, "settings": settings}
    shown = page(model.name, blocks) | {"environment": environment(model)}
    whole = head | {"model": model.name, "site": args.site} | shown | {"blocks": blocks}
    write_text(args.out / "results.json", document(whole))
    lines = [f"# Characters of {model.name}", ""]
    for block in blocks:
        lines += [f"## {block['character']}, {block['goal']} (n = {len(block['questions'])} test questions)", ""]
        lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in block["rows"]] + [""]
    write_text(args.out / "table.md", "\n".join(lines))


def page(model: str, blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows (docs/report.md): rates of free replies, the table, and replies side by side."""
    rows, tables, replies = [], [], []
    for block in blocks:
        name, several = f"{block['character']} ({block['goal']})", dict[str, list[TableRow]]()
        for row in block["rows"]:
            several.setdefault(row["method"], []).append(table_row(model, name, block, row))
        rows += [merged(alike).to_json() | {"run": alike[0].run} for alike in several.values()]
        told = [[text.strip("`") for text in cells(row)] for row in block["rows"]]
        tables.append({"title": f"{name}: replies measured in other ways", "head": HEAD, "rows": told})
        first = {row["method"]: row for row in reversed(block["rows"])}
        columns = [
            {"name": method, "texts": first[method]["answers"], "in_character": first[method].get("in_character", ())}
            for method in SIDE_BY_SIDE
            if method in first
        ]
        replies.append({"title": f"{name}: what the model writes", "questions": block["questions"], "columns": columns})
    return {"rows": rows, "tables": tables, "replies": replies}


def table_row(model: str, persona: str, block: dict[str, Any], row: dict[str, Any]) -> TableRow:
    """One prompt, by its free replies, as a row of the page's main table."""
    one, bare, seed = Measured.from_json(row), row["method"] == "none", row.get("seed")
    searched = "candidates" in row
    free = one.written
    return TableRow(
        model=model,
        persona=persona,
        goal=block["goal"],
        method="zero-shot" if bare else row["method"],
        kind="baseline" if bare else "search" if searched else "control",
        seed=seed,
        run=f"{block['character']}-{block['goal']}/{folder_of(row['method'], row['seed'])}" if searched else None,
        prompt=None if one.steered else one.prompt,
        steered=one.steered,
        rate=math.nan if free is None or free.rate is None else free.rate,
        ci95=None if free is None else free.ci95,
        n=None if free is None else free.n,
        difference=None if free is None else free.difference,
        preference=None if one.rate is None else one.rate.rate,
        perplexity=None if one.side_effects is None else one.side_effects.prompt_perplexity,
        note=row["note"] or None,
    )


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    free, quality, sides, effects = (row.get(name) or {} for name in ("written", "quality", "sides", "side_effects"))
    note = " ~" if row["note"] else ""
    return [
        row["method"] + (f", seed {row['seed']}" if "seed" in row else ""),
        f"{percent(free.get('rate'))} ({ends(free.get('ci95'))})",
        f"{decimals(quality['position'])} ({' to '.join(decimals(end) for end in quality['position_ci95'])})",
        decimals(quality["score"]),
        f"{percent(quality['relevant'])} ({ends(quality['relevant_ci95'])})",
        percent(free.get("distinct_3")),
        f"{percent(row.get('rate'))}{note}",
        percent(sides.get("relative_rate")),
        decimals(effects.get("kl")),
        decimals(row.get("cross_entropy"), 1),
        f"`{row['prompt']}`",
    ]


if __name__ == "__main__":
    sys.exit(main())
