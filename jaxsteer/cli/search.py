"""``jaxsteer search`` and ``jaxsteer config``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from jaxsteer.cli.parsing import parse_as
from jaxsteer.errors import UserError
from jaxsteer.runs.files import REPORT
from jaxsteer.runs.folder import GO_ON
from jaxsteer.study import SearchOptions
from jaxsteer.study import run as run_search
from jaxsteer.study.config_file import config_text, help_of, read_config
from jaxsteer.study.options import KINDS, OPTIONS, from_flat
from jaxsteer.study.problem_table import number_of_searches

SHORT = ("model", "persona", "out", "method", "sae", "algorithm", "prompt_length", "steps", "vary", "resume")
"""The options that ``--help`` shows."""
MORE = (
    "--help-all shows every option. --config FILE reads them from a .yaml or .toml file, by the same names; the "
    "command line goes before the file, and jaxsteer config prints one with all options."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Find prompts that move a model away from a persona, and measure them on held-out questions."""

    options: Annotated[SearchOptions, arg(name="")]

    def run(self) -> int:
        """Do the search, write its report and print its table."""
        from jaxsteer.cli.cores import use_cores
        from jaxsteer.processes import is_first
        from jaxsteer.report import write_report
        from jaxsteer.runs.bars import progress_bar, say
        from jaxsteer.runs.result import Unfinished
        from jaxsteer.study.object_store import working_directory
        from jaxsteer.study.study_result import Study

        options, out = self.options, str(self.options.run.out).rstrip("/")
        use_cores(number_of_searches(options), options.model)
        with working_directory(options.run.out, say=say) as folder:
            try:
                found = run_search(options.at(folder), say=say)
            except Unfinished as error:
                print(f"\n{error.result.table()}\n")
                raise
            runs = found.runs if isinstance(found, Study) else None
            pages = [*(runs or ()), *([""] if runs is None or runs else [])]
            with progress_bar("report", len(pages), unit="page", quiet=options.run.quiet) as advance, _noting(out):
                for number, name in enumerate(pages if is_first() else (), 1):
                    write_report(folder / name)
                    advance(number)
        if is_first():
            page = "none: no run was finished" if runs is not None and not runs else f"{out}/{REPORT}"
            print(f"\n{found.table()}\n\nReport: {page}" + ("" if runs is None else "; all problems: problems.csv"))
        if found.interrupted:
            raise KeyboardInterrupt(f"what was found until then is reported in {out}: {GO_ON}")
        return 0


@contextlib.contextmanager
def _noting(out: str) -> Iterator[None]:
    """What Ctrl-C leaves of a run whose page alone is missing."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(f"the results are in {out}; jaxsteer report {out} writes the page")
        raise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Print a configuration file for jaxsteer search --config, with all options, their defaults and what they do."""

    toml: bool = False
    """TOML instead of YAML."""

    def run(self) -> int:
        """Print."""
        print(config_text(toml=self.toml), end="")
        return 0


def parse_search(arguments: Sequence[str]) -> Search:
    """The search that ``arguments`` and the file of ``--config`` ask for.

    Raises ``SystemExit`` after help, and after explaining what is wrong with the arguments; ``UserError`` for a file
    that cannot be read.
    """
    parser = argparse.ArgumentParser(prog="jaxsteer search", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    given, rest = parser.parse_known_args(arguments)
    if "--help-all" in rest:
        rest = ["--help"]
    elif {"-h", "--help"} & set(rest):
        parse_as(_short(), ["--help"], prog="jaxsteer search", description=f"{Search.__doc__} {MORE}")
    default = None if given.config is None else Search(options=from_flat({"out": "", **read_config(given.config)}))
    search = parse_as(Search, rest, prog="jaxsteer search", description=f"{Search.__doc__} {MORE}", default=default)
    if search.options.run.out == "":
        raise UserError(f"--out is missing: give a directory for the run's files, here or in {given.config}")
    return search


def _short() -> type:
    """A command of the options that matter most."""
    fields: list[Any] = []
    for name in SHORT:
        kind, default = Annotated[KINDS[name], arg(help=help_of(name))], OPTIONS[name][1].default
        fields.append((name, kind) if default is dataclasses.MISSING else (name, kind, default))
    return dataclasses.make_dataclass("Search", fields, kw_only=True)
