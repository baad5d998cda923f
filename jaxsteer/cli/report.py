"""``jaxsteer report``: the page of a run or a study made again, and its plots as files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from jaxsteer.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Make the page of a run, or of a directory of many, from its files, and its plots as SVG, PNG and CSV."""

    directory: Positional[Path]
    """Output directory of jaxsteer search (also with --vary), axis run, circuits, sae explain or an experiment, or any
    directory with runs in it."""
    attribute: bool = False
    """First measure which tokens of every run's selected prompt carry its effect (runs the model) and keep it there."""
    explanations: Path | None = None
    """Directory of `sae explain` of the SAE of a SAEGA run: its latents are named by their words, the page says whether
    the prompt holds them, and metrics.json keeps it."""
    plots: bool = False
    """Also write every plot to plots/ in the directory, with the numbers behind it."""

    def run(self) -> int:
        """Write the files and say where they are."""
        from jaxsteer.circuits.study_result import CircuitStudy
        from jaxsteer.explain.result import ExplainResult
        from jaxsteer.lens.lens_files import read_result
        from jaxsteer.report import (
            is_axis,
            is_circuits,
            is_explained,
            is_lens,
            is_study,
            read_axis,
            read_run,
            read_study,
            run_folders,
            write_plots,
            write_report,
        )
        from jaxsteer.runs.bars import progress_bar

        characters, several = is_axis(self.directory), is_study(self.directory)
        circuits = is_circuits(self.directory)
        if self.attribute and (characters or circuits or is_lens(self.directory)):
            raise UserError("--attribute is about the prompts of searches: here are none")
        if self.explanations is not None and (characters or circuits or is_lens(self.directory)):
            raise UserError("--explanations name the latents of SAEGA runs: here are none")
        if self.attribute:
            _attribute(run_folders(self.directory))
        if self.explanations is not None:
            _name(run_folders(self.directory), self.explanations)
        if several:
            runs = read_study(self.directory).runs
            missing = [self.directory / run for run in runs if not (self.directory / run / "report.html").is_file()]
            with progress_bar("pages of runs", len(missing), unit="page") as advance:
                for number, folder in enumerate(missing):
                    advance(number)
                    write_report(folder)
        page = write_report(self.directory)
        if characters:
            print(read_axis(self.directory).result.table())
        elif is_lens(self.directory):
            print(read_result(self.directory).table())
        elif is_explained(self.directory):
            print(ExplainResult.read(self.directory).table())
        elif circuits:
            print(CircuitStudy.read(self.directory).table())
        else:
            print(read_study(self.directory).table() if several else read_run(self.directory).result.table())
        print(f"\nReport: {page}")
        if self.plots:
            paths = write_plots(self.directory)
            print(f"Plots: {len(paths)} files in {paths[0].parent}" if paths else "Plots: there are no numbers for any")
        return 0


def _attribute(folders: Sequence[Path]) -> None:
    """Attribute the runs that have not been, and make their pages again."""
    from jaxsteer.models.model import Model
    from jaxsteer.report import read_run, write_report
    from jaxsteer.runs.bars import load
    from jaxsteer.study.attribution import attribute_run

    models: dict[tuple[str, str | None], Model] = {}
    for folder in folders:
        found = read_run(folder)
        if len(folders) > 1 and (found.result.attribution is not None or found.result.best is None):
            continue
        key = (str(found.config.get("model")), found.config.get("dtype"))
        if key not in models and "model" in found.config:
            models = {key: load(key[0], dtype=key[1])}  # one at a time: they may be large
        attribute_run(folder, model=models.get(key))
        write_report(folder)


def _name(folders: Sequence[Path], explanations: Path) -> None:
    """Name the latents of the runs that raised some, and make their pages again."""
    from jaxsteer.explain import load_explanations
    from jaxsteer.explain.pipeline import TABLE
    from jaxsteer.report import read_run, write_report
    from jaxsteer.study.latent_names import name_latents

    table = load_explanations(explanations / TABLE if explanations.is_dir() else explanations)
    some = [folder for folder in folders if len(folders) == 1 or read_run(folder).result.signature is not None]
    if not some:
        raise UserError("--explanations name the latents of SAEGA runs: here are none")
    for folder in some:
        name_latents(folder, table, name=str(explanations))
        write_report(folder)
