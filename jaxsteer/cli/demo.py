"""``jaxsteer demo``: three personas of the shipped organism, told as it happens."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jaxsteer.display import interval, percent, short
from jaxsteer.evals.organism_recovery import trigger_words
from jaxsteer.ranges import Seed

if TYPE_CHECKING:
    from jaxsteer.study.results import SearchRun

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
    seed: Seed = 0
    """Seed of the searches."""
    steps: int | None = None
    """Steps of each search (default: the preset's)."""
    quiet: bool = False
    """No progress bars."""

    def run(self) -> int:
        """Search a prompt against every persona, telling what happens."""
        from jaxsteer.report import write_report
        from jaxsteer.runs.bars import load, say
        from jaxsteer.study import SearchOptions, run
        from jaxsteer.study.results import SearchRun
        from jaxsteer.study.run_table import summary_table

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
            found = run(
                SearchOptions.of(
                    out=self.out / persona,
                    model=self.model,
                    persona=persona,
                    seed=self.seed,
                    steps=self.steps,
                    probe=240,
                    quiet=self.quiet,
                ),
                model=model,
                say=say,
            )
            reports.append(write_report(self.out / persona))
            assert isinstance(found, SearchRun)
            runs.append(found)
            print(f"\n{found.table(limit=4)}\n\n{told(found)}\n({time.perf_counter() - started:.0f} s)\n")
        print(f"{summary_table(runs)}\n")
        print("Reports, each one page for a browser:")
        for report in reports:
            print(f"  {report}")
        return 0


def told(run: SearchRun) -> str:
    """The outcome of one run in sentences."""
    base = run.baseline and run.baseline.test
    lines = [f"Without a prompt the persona's answer wins in {interval(base)} of {base and base.n} test questions."]
    if run.best is None:
        return lines[0] + " No prompt was found whose text gives its tokens back."
    rate = run.best.test
    lines.append(f"Discovered prompt: {short(run.best.text, 100)!r}")
    lines.append(f"With it: {interval(rate)}, answering (A) in {percent(rate and rate.a_rate)}.")
    for name, label in (
        ("oracle", "The corpus' own strongest sentence against it"),
        ("random", "A random prompt of the same length"),
    ):
        if control := run.controls.get(name):
            lines.append(f"{label}, {short(control.text)!r}: {interval(control.test)}.")
    triggers = trigger_words(run.persona, run.best.text)
    if triggers is not None:
        lines.append(f"Words of the prompt that the corpus uses as triggers: {', '.join(triggers) or 'none'}.")
    return "\n".join(lines)
