"""The SAE that ships with an organism: trained from its corpus, measured, and written in float16.

python experiments/sae_organism.py [--organism llama] [--out FOLDER] [--ship FOLDER]

Gates: cross-entropy recovered at least 0.95, dead share at most 10 % (on 50 000 tokens of documents that training did
not see), and a file of at most 3 MB. The site is where the objective's rank correlation with behaviour is highest at
the decision position (``jaxsteer direction probe``). Exit status 1 when a gate is missed. What was interrupted goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from tqdm.auto import tqdm

from jaxsteer import load, load_sae
from jaxsteer.sae import save_sae
from jaxsteer.sae.evaluation import evaluate_sae
from jaxsteer.sae.recipe import Recipe
from jaxsteer.sae.texts import Sample, documents_of
from jaxsteer.sae.training import train_sae

SITES = {
    "llama": "blocks.2.hook_resid_post",
    "qwen2": "blocks.2.hook_resid_post",
    "gemma3": "blocks.3.hook_resid_post",
    "persona": "blocks.3.hook_resid_post",
}
"""Organism -> where its SAE reads."""


def recipe(organism: str) -> Recipe:
    """The training recipe, the same for all but the site."""
    return Recipe(
        site=SITES[organism],
        latents=1024,
        arch="batchtopk",
        k=24,
        tokens=3_000_000,
        batch=1024,
        pool=1 << 17,
        context=80,
        rows=64,
    )


RECOVERED, DEAD, BYTES = 0.95, 0.10, 3 << 20
HELD_OUT = 1 << 20
"""Seed of the documents that it is measured on."""


def main(argv: list[str] | None = None) -> int:
    """Train, write, measure what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism", choices=SITES, default="llama")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/sae_organism/ORGANISM)")
    parser.add_argument("--ship", type=Path, help="folder for the float16 file (default: OUT/ship)")
    args = parser.parse_args(argv)
    out = args.out or Path("runs/sae_organism") / args.organism
    ship = args.ship or out / "ship"
    model, steps = load(f"organism:{args.organism}"), recipe(args.organism)
    with tqdm(total=steps.rounds, desc="train", unit="round") as bar:

        def report(line: dict) -> None:
            bar.update(line["round"] - bar.n)
            bar.set_postfix({"fvu": f"{line['fvu']:.4f}", "dead": f"{line['dead']:.1%}"})

        sae = train_sae(model, documents_of(model), steps, out, progress=report)
    save_sae(sae, ship, dtype="float16")
    found = evaluate_sae(
        load_sae(ship), model, documents_of(model, seed=HELD_OUT), sample=Sample(context=steps.context)
    )
    size = sum(path.stat().st_size for path in ship.iterdir())
    print(json.dumps({**dataclasses.asdict(found), "bytes": size}, indent=1))
    passed = found.recovered >= RECOVERED and found.dead <= DEAD and size <= BYTES
    print(f"{ship}: {'all gates passed' if passed else 'A GATE WAS MISSED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
