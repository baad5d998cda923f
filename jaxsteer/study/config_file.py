"""Configuration files of a search: the names of its options in YAML or TOML."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import textwrap
import tomllib
from pathlib import Path
from typing import Any

from jaxsteer.errors import UserError, first_line
from jaxsteer.files import read_text
from jaxsteer.study.option_values import choices_of
from jaxsteer.study.options import KINDS, OPTIONS, STAGES, convert_values

HEAD = """Options of jaxsteer search, for jaxsteer search --config FILE; the command line goes before the file.
What is commented out has no default, or takes that of the preset."""


def read_config(path: Path) -> dict[str, Any]:
    """The options that a file gives, by name.

    Raises ``UserError`` for a file that cannot be read, an unknown name, with the nearest known one, and a value that
    the option cannot have.
    """
    text = read_text(path)
    if path.suffix == ".toml":
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # also numbers of too many digits
            raise UserError(f"--config {path} is not TOML: {first_line(error)}") from None
    elif path.suffix in (".yaml", ".yml"):
        values = _yaml(text, path)
    else:
        raise UserError(f"--config expects a .yaml or .toml file, got {path}")
    try:
        return convert_values(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _yaml(text: str, path: Path) -> dict[str, Any]:
    """A mapping whose values are texts, null, lists and mappings: the options' types say what a text means. YAML itself
    would take 4:12 for 252 and "no" for false."""
    import yaml

    class Texts(yaml.SafeLoader):
        """Of the types that YAML guesses only null; a name stands once, and so does a value: aliases of aliases make a
        short file endlessly long."""

        yaml_implicit_resolvers = {
            first: [rule for rule in rules if rule[0] == "tag:yaml.org,2002:null"]
            for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read: write the value where it is needed")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [name.value for name, _ in node.value]
            if repeated := {name for name in names if names.count(name) > 1}:
                raise yaml.YAMLError(f"{min(repeated)} stands twice")
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(text, Texts)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"--config {path} must name options and their values, as in `steps: 60`")
    return values or {}


def config_text(*, toml: bool = False) -> str:
    """A configuration file with every option, its default and its help as a comment."""
    equals, parts = " = " if toml else ": ", [_comment(HEAD)]
    for stage, options in STAGES.items():
        parts.append(f"# {'-' * 8} {inspect.getdoc(options)}\n")
        for name, (owner, field) in OPTIONS.items():
            if owner != stage:
                continue
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            known = isinstance(default, str | bool | int | float | list)
            line = f"{name}{equals}{json.dumps(default)}" if known else f"# {name}{equals}"
            choices = f" One of {', '.join(found)}." if (found := choices_of(KINDS[name])) else ""
            parts.append(f"{_comment(help_of(name) + choices)}{line.rstrip()}\n")
    return "\n".join(parts)


def help_of(name: str) -> str:
    """What an option does."""
    return " ".join(_docstrings(STAGES[OPTIONS[name][0]])[name].split())


@functools.cache
def _docstrings(options: type) -> dict[str, str]:
    """The docstring of every field."""
    (definition,) = ast.parse(inspect.getsource(options)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _comment(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False) + "\n"
