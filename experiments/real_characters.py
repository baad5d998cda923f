"""Characters of a real chat model: what moves its free replies, and what only moves a rate.

python -m experiments.real_characters --model FILE.gguf [--out runs/real_characters] [--quick]

For every character and goal (to elicit it without a system message; to remove it while its role stands there) the model
itself writes the replies to 150 questions. Every search scores as many candidates, in the same contexts. Its prompt is
chosen on validation questions by what the model writes freely; test questions are looked at once, at the end, with all
prompts side by side. Replies are measured in ways that no search saw: the odds of words learned from train replies, the
place of their mean state between plain replies and those in character, at another site than the search's, whether the
question is still the likeliest one after the reply, how much they repeat themselves, and with ``--judge`` what a judge
says. Before the searches a probe measures at every site and read position how well an objective ranks random prompts.
SAEGA reads a dictionary that is trained on the model's replies. ``--letters`` adds the same searches along a published
set of lettered choices, which a small model answers by chance. What is there already under ``--out`` is not computed
again: more seeds or methods of the next call are added to it. Writes results.json and table.md after each character and
goal, and a folder for each search (``jaxsteer report``).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jaxsteer
from experiments.character_tables import folder_of, write_results
from jaxsteer.cli import keep_programs
from jaxsteer.cli.sae import Train
from jaxsteer.errors import UserError
from jaxsteer.evals.neutral_texts import neutral_texts
from jaxsteer.evals.reply_quality import character_axis, reply_quality
from jaxsteer.evals.side_effects import side_effects
from jaxsteer.evals.word_odds import learn_words
from jaxsteer.files import read_json, write_text
from jaxsteer.models.model import Model
from jaxsteer.models.taps import Intervention
from jaxsteer.personas import Persona, contrast_pairs, load_persona, mean_difference, split
from jaxsteer.personas.written_persona import ready
from jaxsteer.prompts import encode_texts, join_answer, question_conversation, render
from jaxsteer.prompts.soft import load_soft, with_soft
from jaxsteer.runs.files import SOFT as SOFT_FILE
from jaxsteer.runs.files import document
from jaxsteer.sae.recipe import Recipe
from jaxsteer.steer import add
from jaxsteer.study.measurement import Measured, Measurement
from jaxsteer.study.probe import Extent
from jaxsteer.study.probing import probe_positions
from jaxsteer.study.results import SearchRun
from jaxsteer.study.selection import best_prompt
from jaxsteer.writers.endpoint import Endpoint

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
    Arm(name="SAEGA", options={"method": "saega"}),
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
METHODS = (*(arm.name for arm in ARMS), SOFT.name)
LETTERED = ("RESGA, matched", "RESGA, published", "RESGA, random direction", "no gradients")
"""Searches along lettered choices."""
WHO = {"pirate": "a pirate", "ghost": "a ghost", "jester": "a court jester", "accountant": "an accountant"}
INSTRUCTIONS = {
    "elicit": (
        "Answer as {who} would.", "Reply in the voice of {who}.", "Pretend to be {who}.", "Act as {who} in your reply.",
        "Stay in the role of {who}.", "Imagine that {who} answers this.", "Write the way {who} talks.",
    ),
    "reduce": (
        "Do not play a role.", "Stop acting and answer plainly.", "Drop the character and answer the question.",
        "Reply in neutral, factual language.", "Answer like an encyclopedia.", "Answer as an AI assistant.",
        "Answer in ordinary words.",
    ),
}  # fmt: skip
"""Beside the persona's own sentences, of which the first is the plain instruction: ten are compared on validation."""
DICTIONARY = {"arch": "topk", "k": 24, "tokens": 400_000, "batch": 1024, "pool": 32_768, "rows": 16}
"""SAEGA's, trained on the model's replies: 4 latents for each dimension."""
PROBED, PROBE_PROMPTS = ("decision", "matched", "published"), 63


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a chat model: GGUF file, directory or hub id")
    parser.add_argument("--out", type=Path, default=Path("runs/real_characters"))
    parser.add_argument("--characters", nargs="+", default=CHARACTERS, choices=CHARACTERS)
    parser.add_argument("--goals", nargs="+", default=GOALS, choices=GOALS)
    parser.add_argument("--seeds", type=int, help="seeds of every search, from 0 (3, quick 1)")
    parser.add_argument("--steps", type=int, default=20, help="steps of 96 candidates in 4 contexts")
    parser.add_argument("--site", default="blocks.18.hook_resid_post", help="where directions and objectives are read")
    parser.add_argument("--read-at", default="blocks.22.hook_resid_post", help="where replies are read")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="these searches only")
    parser.add_argument("--letters", help="also search along this set of lettered choices: a file or a name")
    parser.add_argument("--judge", help="address of an OpenAI-compatible endpoint that scores test replies, too")
    parser.add_argument("--quick", action="store_true", help="the first character, three searches, one seed, no probe")
    args = parser.parse_args(argv)
    args.methods = args.methods or (QUICK if args.quick else METHODS)
    args.seeds = args.seeds or (1 if args.quick else 3)
    keep_programs()
    try:
        model = jaxsteer.load(args.model)
        characters = args.characters[:1] if args.quick else args.characters
        pairs = [(name, goal) for name in characters for goal in args.goals]
        personas = [persona_of(model, name, goal, args.out) for name, goal in pairs]
        if "SAEGA" in args.methods:
            train_dictionary(model, personas, args)
        names = ("characters", "goals", "methods", "seeds", "steps", "site", "read_at", "letters", "quick")
        settings = {name: getattr(args, name) for name in names}
        letters = run_letters(model, args) if args.letters else {}
        blocks = list[dict[str, Any]]()
        for pair, persona in zip(pairs, personas, strict=True):
            blocks.append(run_block(model, *pair, persona, args))
            write_results(args.out, model, settings, blocks, letters)
    except KeyboardInterrupt:
        print(f"Interrupted. What is done stands in {args.out}; the same command goes on.", file=sys.stderr)
        return 130
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print((args.out / "table.md").read_text(encoding="utf-8"))
    return 0


def persona_of(model: Model, character: str, goal: str, out: Path) -> Persona:
    """A character with the model's replies, which are kept."""
    folder = out / f"{character}-{goal}"
    folder.mkdir(parents=True, exist_ok=True)
    return ready(model, load_persona(f"characters/{character}"), goal, folder, print, quiet=False)  # type: ignore[arg-type]


def train_dictionary(model: Model, personas: Sequence[Persona], args: argparse.Namespace) -> None:
    """An SAE of ``--site`` on all replies in their conversations, and its evaluation."""
    out, texts = args.out / "sae", args.out / "replies.jsonl"
    if (out / "evaluation.json").is_file():
        return
    rows = []
    for persona in personas:
        for item in persona.items:
            asked = render(model.tokenizer, question_conversation(item.asked), "")
            rows += [json.dumps({"text": join_answer(asked, reply)}) for reply in (item.matching, item.not_matching)]
    write_text(texts, "\n".join(dict.fromkeys(rows)) + "\n")
    recipe = Recipe(site=args.site, latents=4 * model.config.d_model, **DICTIONARY)
    Train(model=args.model, data=(texts,), recipe=recipe, out=out, evaluate=min(50_000, recipe.tokens)).run()


def run_block(model: Model, character: str, goal: str, persona: Persona, args: argparse.Namespace) -> dict[str, Any]:
    """All searches of one character and goal, and what their prompts do on test questions."""
    folder, begun = args.out / f"{character}-{goal}", time.perf_counter()
    settings = {name: getattr(args, name) for name in ("seeds", "steps", "site", "read_at", "quick", "judge")}
    settings["methods"] = list(args.methods)
    if (folder / "block.json").is_file() and (kept := read_json(folder / "block.json")).get("settings") == settings:
        return kept
    probed = [] if args.quick else probe_of(model, persona, folder)
    chosen: dict[str, list[dict[str, Any]]] = {}
    for arm in ARMS:
        for seed in range(args.seeds if arm.name in args.methods else 0):
            print(f"{character}, {goal}: {arm.name}, seed {seed}", flush=True)
            run = search(model, folder, persona, arm, seed, args)
            if arm.name == QUICK[0]:
                random = {"prompt": run.controls["random"].text, "seed": seed}
                chosen.setdefault("random prompt", []).append(random)
            if run.best is not None:
                facts = {"prompt": run.best.text, "cross_entropy": run.best.cross_entropy, "target": run.best.target}
                taken = {"candidates": run.timing.candidates, "seconds": run.timing.search_s}
                chosen.setdefault(arm.name, []).append(facts | taken | {"seed": seed})
    chosen |= sentences(model, persona, character)
    soft = None
    if SOFT.name in args.methods:
        search(model, folder, persona, SOFT, 0, args)
        soft = folder / folder_of(SOFT.name, 0) / SOFT_FILE
    found = measured(model, persona, chosen, soft, args)
    told = {"character": character, "goal": goal, "seconds": time.perf_counter() - begun, "settings": settings}
    block = {**told, "probe": probed, **found}
    write_text(folder / "block.json", document(block))
    return block


def probe_of(model: Model, persona: Persona, folder: Path) -> list[dict[str, Any]]:
    """Rank correlation of objective and preference over random prompts, at every site and read position."""
    if not (folder / "probe.json").is_file():
        found = probe_positions(model, persona, PROBED, extent=Extent(prompts=PROBE_PROMPTS))
        write_text(folder / "probe.json", document(found.to_json()))
    return read_json(folder / "probe.json")["rows"]


def run_letters(model: Model, args: argparse.Namespace) -> dict[str, SearchRun]:
    """Searches along lettered choices: what a rate with its controls says where the model cannot read the letters."""
    persona = load_persona(args.letters)
    folder = args.out / "letters"
    folder.mkdir(parents=True, exist_ok=True)
    return {arm.name: search(model, folder, persona, arm, 0, args) for arm in ARMS if arm.name in LETTERED}


def search(model: Model, folder: Path, persona: Persona, arm: Arm, seed: int, args: argparse.Namespace) -> SearchRun:
    """One search of one arm, or its result from the last time."""
    objective = {"direction": f"random:{seed}"} if arm.random else {}
    options = {**SEARCH, "site": args.site, "steps": args.steps, **objective, **arm.options}
    if arm.name == "SAEGA":
        options["sae"] = str(args.out / "sae")
    if options.get("objective") or arm.name == "SAEGA":
        options.pop("site")
    kept = {name: value for name, value in options.items() if value is not None}
    source, out = folder / "persona.json", folder / folder_of(arm.name, seed)
    run = jaxsteer.search(
        model=model, persona=str(source if source.is_file() else args.letters), goal=persona.goal, out=out, seed=seed,
        report_prompts=LEADS, test=bool(persona.items[0].lettered), resume=True, **kept,
    )  # fmt: skip
    assert isinstance(run, SearchRun)
    return run


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


def sentences(model: Model, persona: Persona, character: str) -> dict[str, list[dict[str, Any]]]:
    """The plain instruction, and the best of ten sentences for the goal, by validation questions."""
    more = [sentence.format(who=WHO[character]) for sentence in INSTRUCTIONS[persona.goal]]
    cues = list(dict.fromkeys([*persona.sentences[persona.goal], *more]))[:10]
    found = jaxsteer.measure(model, persona, cues, split="validation", questions=24)
    assert found.best is not None
    best = found.best.prompt
    return {"instruction": [{"prompt": cues[0]}], f"best of {len(cues)} instructions": [{"prompt": best}]}


def measured(
    model: Model,
    persona: Persona,
    chosen: dict[str, list[dict[str, Any]]],
    soft: Path | None,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Every chosen prompt on test questions, in one table: rates, which side moved, free replies and their quality."""
    parts = split(persona, seed=0)
    axis, words = character_axis(model, parts.train, args.read_at), learn_words(parts.train)
    texts = [facts["prompt"] for rows in chosen.values() for facts in rows]
    judge = None if args.judge is None else Endpoint(url=args.judge)
    measure = functools.partial(
        jaxsteer.measure, persona=persona, split="test", questions=60, side_effects=True, judge=judge
    )
    found: Measurement = measure(model, prompts=texts)
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
    facts, edits = steered(model, persona, args.site)
    if edits is not None:
        one = measure(model, edits=edits)
        rows.append(row("activation steering", one.prompts[0], facts))
    if soft is not None:
        with_it, text = with_soft(model, load_soft(soft))
        one = measure(with_it, prompts=[text])
        rows.append(row("prefix tuning", one.prompts[0], {}))
    return {"questions": questions, "axis_site": args.read_at, "rows": rows}


if __name__ == "__main__":
    sys.exit(main())
