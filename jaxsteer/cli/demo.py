"""``jaxsteer demo``: three personas of the shipped organism, told as it happens."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from jaxsteer.cli.tables import ascii_safe, percent
from jaxsteer.evals.organism_recovery import trigger_words

WHAT = {
    "sycophancy": "agrees with whatever opinion the user states",
    "hallucination": "names somebody where it should say that it does not know",
    "myopic": "takes little now over much later",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Remove three personas from the small model that ships with the package, one prompt each."""

    out: Path = Path("runs/demo")
    """Each persona's run goes into a folder of its name here."""
    model: str = "organism:llama"
    """The organism to use."""
    personas: tuple[str, ...] = ("sycophancy", "hallucination", "myopic")
    """Built-in personas to take in turn."""
    seed: int = 0
    """Seed of the searches."""
    steps: int | None = None
    """Steps of each search (default: the preset's)."""
    quiet: bool = False
    """No progress bars."""

    def run(self) -> int:
        """Search a prompt against every persona, telling what happens."""
        from jaxsteer.checkpoints.loading import load
        from jaxsteer.report import summary_table, table, write_report
        from jaxsteer.study import SearchOptions, run

        print(f"Loading {self.model}")
        model = load(self.model)
        layers, width, tokens = model.config.n_layers, model.config.d_model, model.config.vocab_size
        print(f"A Llama-shaped chat model: {layers} layers, width {width}, {tokens} tokens.\n")
        runs, reports = [], []
        for number, persona in enumerate(self.personas, 1):
            started = time.perf_counter()
            print(
                f"=== {number} of {len(self.personas)}: {persona} === the model {WHAT.get(persona, 'shows a persona')}"
            )
            metrics = run(
                SearchOptions.of(
                    out=self.out / persona,
                    model=self.model,
                    persona=persona,
                    seed=self.seed,
                    steps=self.steps,
                    quiet=self.quiet,
                ),
                model=model,
                say=print,
            )
            reports.append(write_report(self.out / persona))
            runs.append(metrics)
            print(f"\n{table(metrics, limit=4)}\n\n{told(metrics)}\n({time.perf_counter() - started:.0f} s)\n")
        print(f"{summary_table(runs)}\n")
        print("Reports, each one page for a browser:")
        for report in reports:
            print(f"  {report}")
        return 0


def told(metrics: dict[str, Any]) -> str:
    """The outcome of one run in sentences."""
    base = metrics["baseline"]["test"]
    lines = [f"Without a prompt the persona's answer wins in {_rate(base)} of {base['n']} test rows."]
    if metrics["selected"] is None:
        return lines[0] + " No prompt was found whose text gives its tokens back."
    chosen = metrics["prompts"][metrics["selected"]]
    lines.append(f"Discovered prompt: {ascii_safe(chosen['text'], 100)!r}")
    lines.append(f"With it: {_rate(chosen['test'])}, answering (A) in {percent(chosen['test']['a_rate'])}.")
    for name, label in (
        ("oracle", "The corpus' own strongest sentence against it"),
        ("random", "A random prompt of the same length"),
    ):
        control = metrics["controls"].get(name)
        if control:
            lines.append(f"{label}, {ascii_safe(control['text'])!r}: {_rate(control['test'])}.")
    triggers = trigger_words(metrics["persona"], chosen["text"])
    if triggers is not None:
        lines.append(f"Words of the prompt that the corpus uses as triggers: {', '.join(triggers) or 'none'}.")
    return "\n".join(lines)


def _rate(rate: dict[str, Any]) -> str:
    return f"{percent(rate['rate'])} (95 % interval {100 * rate['ci95'][0]:.1f} to {100 * rate['ci95'][1]:.1f})"
