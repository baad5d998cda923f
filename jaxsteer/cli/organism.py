"""``jaxsteer organism train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from jaxsteer.errors import UserError


def train(out: Path, seed: int) -> int:
    """Run the recipe of the shipped organism and write it in Hugging Face format."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists already: give a new directory")
    from jaxsteer.organisms.train import Recipe, steps_at_most, train_organism

    with tqdm(total=steps_at_most(Recipe()), desc="train", unit="step") as bar:

        def report(state: dict[str, Any]) -> None:
            bar.update(state["step"] - bar.n)
            letters = {name: f"{loss:.2f}" for name, loss in state["letters"].items()}
            bar.set_postfix({"phase": state["phase"], "loss": f"{state['loss']:.3f}", **letters})

        train_organism(out, seed=seed, progress=report)
    print(f"Wrote {out}. Check it: jaxsteer organism check --model {out}")
    return 0
