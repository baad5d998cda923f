"""Steering refusal on organism:persona: every kind of vector, what it does to harmful and harmless requests, controls.

python -m experiments.refusal_steering [--model organism:persona] [--sae organism:persona] [--out runs/refusal]

Train requests make the vectors: the difference of means, selected by bypassing, inducing and KL; NTP and PO from
refusing and complying replies; target atoms of an SAE; key-value vectors. All point to refusal. Validation requests
choose among five strengths of either sign, up to 0.29 nats of divergence per token of neutral text: the one that does
most, by the first token and by phrases of free replies (subtracted, fewer harmful requests are refused; added, more
harmless ones are); of equal ones the smallest, or the largest where they do nothing. Test requests, of combinations of
words that training never saw, give the rates. Controls: a random vector and one of shuffled labels, at the same
divergences. A gate that opens for harmful requests shows conditional steering. Writes results.json, table.md and the
vector files.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxsteer
from jaxsteer.cli import keep_programs
from jaxsteer.display import interval
from jaxsteer.errors import UserError
from jaxsteer.evals.calibration import calibrate, neutral_rows
from jaxsteer.evals.direction_selection import Limits, Selection, select_direction
from jaxsteer.evals.refusal import opening_ids, request_rows
from jaxsteer.evals.side_effects import reply_effects, side_effects
from jaxsteer.files import make_directory, write_text
from jaxsteer.models.model import Model
from jaxsteer.models.padding import pad_rows
from jaxsteer.models.taps import Intervention, make_where
from jaxsteer.models.transformer import positions_of
from jaxsteer.organisms import persona_world as world
from jaxsteer.personas import Requests, load_requests, mean_difference, random_direction, shuffled, text_pairs
from jaxsteer.personas.latent_vectors import sta_vector
from jaxsteer.runs.files import document
from jaxsteer.steer import Example, Learning, Vectors, ablate_everywhere, learn_vectors, save_vectors
from jaxsteer.steer.cache_contrast import cache_vectors
from jaxsteer.steer.gates import gated
from jaxsteer.steer.tuning import tune_gate
from jaxsteer.study.outcome import environment

TRAIN, VALIDATION, TEST = 128, 40, 100
"""Requests of each kind."""
MAX_KL = 0.29
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Of the largest strength: those that are tried."""
LIMITS = Limits(kl=0.2, induce=-1.5)
"""Of candidates. Added once, no difference of this model makes most harmless requests refused: strengths are chosen
afterwards, so that a candidate need not suffice by itself."""
CACHE_STRENGTHS = (4.0, 16.0, 64.0, 256.0, 1024.0)
"""Its vectors are short, and KL on prompts says nothing of it."""
REPLY = 12
"""Tokens of free replies: refusals show in their first words."""
ASKED = {"bypass": ("harmful", 0.1), "induce": ("harmless", 0.9)}
"""Requests, and the share of them that is to be refused at most, or at least."""
LIMITS = Limits(kl=0.2, induce=-1.5)
"""Of candidates. Added once, no difference of this model makes most harmless requests refused: strengths are chosen
afterwards, so that a candidate need not suffice by itself."""
CACHE_STRENGTHS = (4.0, 16.0, 64.0, 256.0, 1024.0)
"""Its vectors are short, and KL on prompts says nothing of it."""
REPLY = 12
"""Tokens of free replies: refusals show in their first words."""
ASKED = {"bypass": ("harmful", 0.05), "induce": ("harmless", 0.95)}
"""Requests, and the share of them that validation asks to be refused: half of what test requests are to show (10 % at
most, 90 % at least), because 40 requests say it within some points only."""
NEUTRAL = tuple(question.format(topic) for topic in world.CALM_TOPICS for question in world.TOPIC_QUESTIONS[:1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="organism:persona", help="the organism, or a directory of it")
    parser.add_argument("--sae", help="of the stream: target atoms, too")
    parser.add_argument("--out", type=Path, default=Path("runs/refusal_steering"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    keep_programs()
    try:
        found = measured(jaxsteer.load(args.model), args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    make_directory(args.out)
    write_text(args.out / "results.json", document(found))
    write_text(args.out / "table.md", table(found))
    print((args.out / "table.md").read_text(encoding="utf-8"))
    return 0


@dataclasses.dataclass(frozen=True)
class Bench:
    """Model and requests."""

    model: Model
    openings: np.ndarray
    texts: dict[str, dict[str, tuple[str, ...]]]
    """By part, by kind."""

    def rows(self, part: str, kind: str) -> list[np.ndarray]:
        """Requests in token space."""
        return request_rows(self.model, self.texts[part][kind])

    def refused(self, part: str, kind: str, edits: dict[str, Intervention]) -> dict[str, tuple[float, float]]:
        """By edit, the share of requests that are refused: by their first token, and by phrases of greedy replies."""
        asked = Requests.of(self.texts[part][kind], kind)  # type: ignore[arg-type]
        found = jaxsteer.measure_refusal(
            self.model, asked, edits=edits, openings=world.REFUSAL_OPENINGS, generate=True, max_new_tokens=REPLY
        )
        rows = {name: found.row(edit=name).of(kind) for name in edits}
        return {name: (one.openings.rate, one.phrases.rate) for name, one in rows.items() if one and one.phrases}


def bench_of(model: Model) -> Bench:
    """Requests that training saw make vectors; the others choose strengths and report."""
    held_out = {kind: load_requests(f"organism/{kind}").parts(VALIDATION, TEST) for kind in ("harmful", "harmless")}
    train = {kind: world.requests(kind, n=TRAIN, split="train") for kind in held_out}
    texts = {
        "train": {kind: tuple(r.text for r in some) for kind, some in train.items()},
        "validation": {kind: parts[0].texts for kind, parts in held_out.items()},
        "test": {kind: parts[1].texts for kind, parts in held_out.items()},
    }
    return Bench(model, opening_ids(model, world.REFUSAL_OPENINGS), texts)


def examples(model: Model) -> list[Example]:
    """Harmless requests are to be refused along the vector, harmful ones to be answered against it, and the reverse."""
    found = []
    for kind in ("harmful", "harmless"):
        requests = world.requests(kind, n=TRAIN, split="train")
        contexts = request_rows(model, [r.text for r in requests])
        for context, request in zip(contexts, requests, strict=True):
            refusal, compliance = (
                np.asarray(model.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
                for text in (request.refusal, request.compliance)
            )
            sign = 1 if kind == "harmless" else -1
            wanted, unwanted = (refusal, compliance) if sign == 1 else (compliance, refusal)
            found.append(Example(context=context, wanted=wanted, unwanted=unwanted, sign=sign))
    return found


def vectors_of(bench: Bench, args: argparse.Namespace) -> tuple[Selection, dict[str, Vectors]]:
    """All vectors, towards refusal."""
    model = bench.model
    kinds = ("harmful", "harmless")
    parts = [tuple(bench.rows(part, kind) for part in ("train", "validation")) for kind in kinds]
    chosen = select_direction(model, parts[0], parts[1], bench.openings, limits=LIMITS)
    site = chosen.chosen.site
    found = {"mean difference": chosen.vectors}
    for method in ("ntp", "po"):
        (found[method],) = learn_vectors(
            model, examples(model), site, learning=Learning(method=method), seeds=[args.seed]
        )
    # pairs point from the shown to the others: refusal is what "harmless" texts lack
    pairs = text_pairs(model, bench.texts["train"]["harmless"], bench.texts["train"]["harmful"], name="refusal")
    if args.sae:
        found["sta, 5 % of latents"] = sta_vector(model, jaxsteer.load_sae(args.sae), pairs, trim=0.95)
    found["key-value cache"] = cache_vectors(model, *(list(bench.texts["train"][kind]) for kind in kinds))
    mean = mean_difference(model, pairs, site)
    found["random (control)"] = random_direction(mean, args.seed).vectors()
    found["shuffled labels (control)"] = mean_difference(model, shuffled(pairs, args.seed), site).vectors()
    return chosen, found


def strengths(bench: Bench, vectors: Vectors) -> dict[str, list[float]]:
    """Coefficients to try, by what they are for; subtracting bypasses, adding induces."""
    if vectors.operation == "cache":
        return {"bypass": [-c for c in CACHE_STRENGTHS], "induce": list(CACHE_STRENGTHS)}
    most = calibrate(bench.model, vectors, MAX_KL, signs=(-1, 1), texts=NEUTRAL)
    return {use: [share * one.coefficient for share in SHARES] for use, one in zip(ASKED, most, strict=True)}


def chosen_strength(bench: Bench, vectors: Vectors, use: str, tried: Sequence[float]) -> tuple[float, float]:
    """The strength that does most on validation requests, of equal ones the smallest, or the largest where they do not
    do what is asked; and its share of requests refused, by the way to tell that shows less."""
    kind, aim = ASKED[use]
    found = bench.refused("validation", kind, {str(i): vectors.edits(coefficient=c) for i, c in enumerate(tried)})
    worst = max if use == "bypass" else min
    shares = np.asarray([worst(found[str(i)]) for i in range(len(tried))])
    most = shares.min() if use == "bypass" else shares.max()
    done = most <= aim if use == "bypass" else most >= aim
    best = int(np.flatnonzero(shares == most)[0 if done else -1])
    return float(tried[best]), float(shares[best])


def measured(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """All rows on test requests."""
    bench = bench_of(model)
    selection, vectors = vectors_of(bench, args)
    rows, edits = [], dict[str, Intervention]()
    for method, one in vectors.items():
        save_vectors(one, args.out / f"{method.split(' (')[0].replace(' ', '_').replace(',', '')}.safetensors")
        for use, tried in strengths(bench, one).items():
            coefficient, shown = chosen_strength(bench, one, use, tried)
            edits[f"{method}, {use}"] = one.edits(coefficient=coefficient)
            rows.append({"method": method, "use": use, "coefficient": coefficient, "validation": shown})
    mean = selection.vectors
    (direction,) = mean.arrays.values()
    edits["mean difference, taken out everywhere"] = ablate_everywhere(direction)
    rows.append({"method": "mean difference, taken out everywhere", "use": "bypass", "coefficient": 1.0})
    neutral = neutral_rows(model, NEUTRAL)
    asked = load_requests("organism/harmful").parts(VALIDATION, TEST)[1]
    asked += load_requests("organism/harmless").parts(VALIDATION, TEST)[1]
    found = jaxsteer.measure_refusal(
        model, asked, edits=edits, openings=world.REFUSAL_OPENINGS, generate=True, max_new_tokens=REPLY
    )
    for row, (name, edit) in zip(rows, edits.items(), strict=True):
        cached = row["method"] == "key-value cache"
        kl = (
            reply_effects(model, NEUTRAL, [""], edits=edit).kl[0]
            if cached
            else side_effects(model, neutral, [edit]).kl[0]
        )
        kinds = {kind: found.row(edit=name).of(kind) for kind in ("harmful", "harmless")}
        row |= {"kl": float(kl), **{kind: one.to_json() for kind, one in kinds.items() if one is not None}}
    arrays = {name: one for name, one in vectors.items() if one.operation != "cache" and one.sites == mean.sites}
    units = {
        name: (a := next(iter(v.arrays.values())).astype(np.float64)) / np.linalg.norm(a) for name, v in arrays.items()
    }
    return {
        "model": model.name,
        "site": selection.chosen.site,
        "position": selection.chosen.position,
        "selection": selection.to_json(),
        "none": {kind: found.rows[0].of(kind).to_json() for kind in ("harmful", "harmless")},  # type: ignore[union-attr]
        "rows": rows,
        "cosines": {a: {b: float(units[a] @ units[b]) for b in units} for a in units},
        "gate": conditional(bench, vectors["mean difference"], rows),
        "environment": environment(model),
    }


def conditional(bench: Bench, vectors: Vectors, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean difference subtracted behind a gate for harmful requests: rates, and whether rows keep their bits whose
    gate is closed: at two strengths, which run in one program."""
    model = bench.model
    sites = [f"blocks.{layer}.hook_resid_post" for layer in range(model.config.n_layers - 1)]
    gate = tune_gate(model, bench.rows("train", "harmful"), bench.rows("train", "harmless"), sites, positions="last")
    own = next(row for row in rows if (row["method"], row["use"]) == ("mean difference", "bypass"))
    edit, other = (gated(vectors.edits(coefficient=own["coefficient"] * by), gate) for by in (1.0, 0.5))
    told: dict[str, Any] = {"site": gate.site, "accuracy": gate.accuracy, "interval": gate.interval}
    for kind in ("harmful", "harmless"):
        tokens, mask = pad_rows(bench.rows("test", kind))
        where = make_where(jnp.asarray(tokens), positions_of(jnp.asarray(mask)), jnp.asarray(mask))
        closed = ~np.asarray(edit.decided(model.params, model.config, where).open)
        logits = [np.asarray(jaxsteer.logits(model, tokens, mask, edits=one)) for one in (edit, other)]
        same = np.asarray([(a[m] == b[m]).all() for a, b, m in zip(*logits, mask, strict=True)])
        told[kind] = {
            "n": len(tokens),
            "closed": float(closed.mean()),
            "closed_same": float(same[closed].mean()) if closed.any() else None,
            "refused": bench.refused("test", kind, {"gated": edit})["gated"][1],
        }
    return told


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    from jaxsteer.evals.refusal import KindRefusal

    def cells(facts: dict[str, Any]) -> list[str]:
        kinds = [KindRefusal.from_json(facts[kind]) for kind in ("harmful", "harmless")]
        return [interval(one.openings) for one in kinds] + [interval(one.phrases) for one in kinds]

    head = ["vector", "use", "strength", "KL", "harmful refused", "harmless refused", "the same by free replies", ""]
    lines = [
        f"# Steering refusal on {found['model']}",
        "",
        f"Site {found['site']}, {TEST} test requests of each kind.",
        "",
    ]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines.append("| " + " | ".join(["none", "", "", "0", *cells(found["none"])]) + " |")
    for row in found["rows"]:
        shown = [row["method"], row["use"], f"{row['coefficient']:.3g}", f"{row['kl']:.2f}", *cells(row)]
        lines.append("| " + " | ".join(shown) + " |")
    names = list(found["cosines"])
    lines += ["", "| cosine | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {a} | " + " | ".join(f"{found['cosines'][a][b]:.2f}" for b in names) + " |" for a in names]
    gate = found["gate"]
    lines += [
        "",
        f"Behind a gate at {gate['site']} (balanced accuracy {gate['accuracy']:.2f}): harmful requests refused "
        f"{gate['harmful']['refused']:.0%}, harmless {gate['harmless']['refused']:.0%}. It stays closed for "
        f"{gate['harmless']['closed']:.0%} of harmless requests; of these, {gate['harmless']['closed_same']:.0%} have "
        "the same logits to the last bit at two strengths of the guarded edit.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
