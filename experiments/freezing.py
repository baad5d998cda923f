"""What carries a character's vector: parts frozen to the unsteered run, altogether and layer by layer.

python -m experiments.freezing --model FILE.gguf [--persona characters/pirate] [--block 15] [--out runs/freezing]

The model answers questions in the role and without it. The difference of the mean streams over the replies to --train
questions, after block --block, is the vector, added to all tokens but the first. On --test other questions both replies
are teacher-forced; the metric is the mean log-probability per token of the reply in the role minus that of the plain
one. In the blocks above, patterns, queries and keys, values, attention or MLP outputs are those of the run without the
vector (jaxsteer.circuits.freeze_table); --layer-test questions are measured with one layer frozen at a time. Writes
results.json, table.md, and the words of the value vectors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsteer import steer
from jaxsteer.circuits.freeze_table import FreezeTable, freeze_table
from jaxsteer.circuits.freezing import FREEZES
from jaxsteer.circuits.rows import Rows, make_rows
from jaxsteer.circuits.value_vectors import read_words, value_vectors
from jaxsteer.cli import keep_programs
from jaxsteer.files import make_directory, write_text
from jaxsteer.models.model import Model
from jaxsteer.models.reading import read_rows
from jaxsteer.models.sites import find_sites, resid_site
from jaxsteer.objectives import TargetLogProb
from jaxsteer.objectives.terms import ByContext
from jaxsteer.personas import load_persona
from jaxsteer.personas.items import Item
from jaxsteer.personas.replies import with_replies
from jaxsteer.prompts import encode_turns
from jaxsteer.runs.bars import load, progress_bar


def reply_rows(model: Model, items: Sequence[Item]) -> Rows:
    """Every question with the reply in the role, then every question with the plain one, as rows with answers."""
    chats = [[{"role": "user", "content": item.question}] for item in items]
    replies = [item.matching for item in items] + [item.not_matching for item in items]
    ids = [model.tokenizer(reply, add_special_tokens=False)["input_ids"] for reply in replies]
    return make_rows(model, [*chats, *chats], answers=ids)


def mean_vector(model: Model, items: Sequence[Item], site: str) -> np.ndarray:
    """The mean stream over replies in the role minus that over plain ones."""
    means = []
    for replies in ([item.matching for item in items], [item.not_matching for item in items]):
        said = [
            encode_turns(
                model.tokenizer,
                [{"role": "user", "content": item.question}, {"role": "assistant", "content": reply}],
                generation_prompt=False,
            )
            for item, reply in zip(items, replies, strict=True)
        ]
        masks = [row.mask("assistant", turns=[-1]) for row in said]
        found = read_rows(
            model, [row.ids for row in said], masks, tuple(find_sites(site, model.config).values()), batch_size=8
        )
        means.append(np.concatenate([states[0] for _, states in found]).mean(0))
    return means[0] - means[1]


def frozen(model: Model, items: Sequence[Item], edits: Any, above: Sequence[int], by_layer: bool) -> FreezeTable:
    """The table on these questions."""
    signs = jnp.asarray(np.repeat([1.0, -1.0], len(items)), jnp.float32)
    metric = ByContext(TargetLogProb(per_token=True), signs)
    groups = [str(i) for i in range(len(items))] * 2
    what = ("patterns", "values", "mlps") if by_layer else tuple(FREEZES)
    with progress_bar("freezing", unit="row") as advance:
        return freeze_table(
            model, reply_rows(model, items), metric, edits, what, layers=above, by_layer=by_layer, groups=groups,
            progress=advance,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a chat model: a directory, .gguf file or hub id")
    parser.add_argument("--persona", default="characters/pirate", help="a character in words")
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0])
    parser.add_argument("--train", type=int, default=24)
    parser.add_argument("--test", type=int, default=10)
    parser.add_argument("--layer-test", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/freezing"))
    options = parser.parse_args(argv)
    keep_programs()
    begun, model = time.monotonic(), load(options.model)
    persona, site = load_persona(options.persona), resid_site(options.block)
    asked = persona.ask[: options.train + options.test]
    with progress_bar("replies") as advance:
        items = with_replies(model, dataclasses.replace(persona, ask=asked), goal="elicit", progress=advance).items
    train, test = items[: options.train], items[options.train :]
    vector = mean_vector(model, train, site)
    above = range(options.block + 1, model.config.n_layers)
    tables = {}
    for strength in options.strengths:
        edits = steer.add(site, vector, strength)
        tables[f"{strength:g}"] = frozen(model, test, edits, above, by_layer=False)
    layers = frozen(model, test[: options.layer_test], steer.add(site, vector, options.strengths[0]), above, True)
    values = value_vectors(model, vector, site)
    heads = values.heads.reshape(-1, vector.size)
    longest = np.argsort(-np.linalg.norm(heads, axis=1))[:5]
    names = ["the vector", "all heads", *(f"L{i // model.config.n_heads}H{i % model.config.n_heads}" for i in longest)]
    words = read_words(model, np.stack([vector, values.summed, *heads[longest]]), names)
    seconds = round(time.monotonic() - begun)
    make_directory(options.out)
    found = {"strengths": {k: t.to_json() for k, t in tables.items()}, "by_layer": layers.to_json()}
    found |= {
        "words": words.to_json(),
        "questions": len(test),
        "norm": float(np.linalg.norm(vector)),
        "seconds": seconds,
    }
    write_text(options.out / "results.json", json.dumps(found, indent=1) + "\n")
    parts = [f"strength {k}, {len(test)} questions\n{t.table()}" for k, t in tables.items()]
    parts += [f"{min(len(test), options.layer_test)} questions, layer by layer\n{layers.table()}", words.table()]
    text = "\n\n".join([*parts, f"{seconds} s"]) + "\n"
    write_text(options.out / "table.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
